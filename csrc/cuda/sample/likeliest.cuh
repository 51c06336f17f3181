// The likeliest tokens of a row, and log-probabilities of its logits as they were given.
//
// Order      A warp keeps the largest keys of its tokens sorted, one a lane, and takes in what is
//            larger than the last: some 20 + 20 ln(tokens / 20) insertions. Its list goes to shared
//            memory; one warp makes the block's list of those, and one in every block the row's
//            list of the blocks'. The first of it is the largest logit, which the sum of weights
//            needs.
// Traffic    the row twice more from L2, for the lists and for the sum, and two meetings.
#pragma once

#include "scaled_row.cuh"

namespace mllama {
namespace {

constexpr int kSampleThreads = 1024;
constexpr int kSampleWarps = kSampleThreads / kWarpSize;
static_assert(kSampleWarps == kWarpSize, "a warp holds one value of every warp");
static_assert(kMaxLikeliest <= kWarpSize, "a lane holds one of the likeliest");

struct LikeliestShared {
  uint64_t warp_values[kSampleWarps];
  uint64_t warp_lists[kMaxLikeliest][kSampleWarps + 1];  // one more: no bank conflicts
  uint64_t block_list[kMaxLikeliest], block_total;       // what the block tells the others
  float largest;                                         // of the logits as given
  double log_mass;
};

// The `wanted` largest keys of those that a warp has seen, lane i holding the i-th. Keys are not
// equal to one another, and larger than 0.
struct LargestKeys {
  int wanted;
  uint64_t key = 0, least = 0;

  // One candidate of each lane; 0: none.
  __device__ void add(uint64_t candidate) {
    const int lane = threadIdx.x % kWarpSize;
    uint32_t pending = __ballot_sync(0xffffffffu, candidate > least);
    while (pending != 0) {
      const uint64_t added = __shfl_sync(0xffffffffu, candidate, __ffs(pending) - 1);
      const uint64_t before = __shfl_up_sync(0xffffffffu, key, 1);
      if (added > key) key = lane == 0 || before > added ? added : before;
      least = __shfl_sync(0xffffffffu, key, wanted - 1);
      pending &= pending - 1;
      pending &= __ballot_sync(0xffffffffu, candidate > least);
    }
  }
};

__device__ __forceinline__ void report_nothing(const SampleParams& p, int64_t row) {
  const int i = threadIdx.x;
  if (i < kMaxLikeliest) p.likeliest[row * kMaxLikeliest + i] = kInvalidToken;
  if (i <= kMaxLikeliest) p.logprobs[row * (1 + kMaxLikeliest) + i] = NAN;
}

// Writes the likeliest and their log-probabilities; shared.largest and shared.log_mass are then
// there for the chosen token's. `wanted`: from 0 to kMaxLikeliest.
template <typename T, typename Group>
__device__ void report_likeliest(const SampleParams& p, const ScaledRow<T>& row,
                                 int64_t first_token, int steps, int wanted,
                                 LikeliestShared& shared, const Group& group) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int kept = max(wanted, 1);
  const int64_t own_token = first_token + lane * kTokensPerLane;
  LargestKeys largest{kept};
  for (int step = 0; step < steps; ++step) {
    const int64_t token = own_token + step * kTokensPerStep;
    float z[kTokensPerLane];
    row.load_given(token, z);
#pragma unroll
    for (int i = 0; i < kTokensPerLane; ++i)
      largest.add(token + i < p.vocab ? token_key(z[i], token + i) : 0);
  }
  if (lane < kept) shared.warp_lists[lane][warp] = largest.key;
  __syncthreads();
  if (warp == 0) {
    largest = {kept};
    for (int i = 0; i < kept; ++i) largest.add(shared.warp_lists[i][lane]);
    if (lane < kept) shared.block_list[lane] = largest.key;
  }
  group.sync();
  if (warp == 0) {
    largest = {kept};
    for (int i = 0; i < kept; ++i)
      largest.add(lane < group.size() ? group.load(&shared.block_list[i], lane) : 0);
    if (lane == 0) shared.largest = logit_of_key(static_cast<uint32_t>(largest.key >> 32));
  }
  __syncthreads();
  uint64_t total = 0;
  for (int step = 0; step < steps; ++step) {
    float z[kTokensPerLane];
    row.load_given(own_token + step * kTokensPerStep, z);
#pragma unroll
    for (int i = 0; i < kTokensPerLane; ++i) total += weight_of(level_of(z[i], shared.largest));
  }
  total = warp_sum(total);
  if (lane == 0) shared.warp_values[warp] = total;
  __syncthreads();
  if (warp == 0) {
    total = warp_sum(shared.warp_values[lane]);
    if (lane == 0) shared.block_total = total;
  }
  group.sync();
  if (warp == 0) {
    total = warp_sum(lane < group.size() ? group.load(&shared.block_total, lane) : 0);
    const double mass = log_mass(static_cast<int64_t>(total));
    if (lane == 0) shared.log_mass = mass;
    if (group.rank() == 0 && lane < kMaxLikeliest) {
      const bool is_asked = lane < wanted && largest.key != 0;
      const float logit = logit_of_key(static_cast<uint32_t>(largest.key >> 32));
      p.likeliest[row.row * kMaxLikeliest + lane] =
          is_asked ? token_of_key(largest.key) : kInvalidToken;
      p.logprobs[row.row * (1 + kMaxLikeliest) + 1 + lane] =
          is_asked ? log_probability(logit, shared.largest, mass) : NAN;
    }
  }
  __syncthreads();
}

}  // namespace
}  // namespace mllama
