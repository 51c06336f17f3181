// What the kernels of sample share: one row, worked on by the blocks of a group (one_block.cu:
// one block; cluster.cu: a cluster). sample_math.h defines the result, bit for bit.
//
// Order      The row is cut into one span per warp, in the order of the tokens. Lane l of a step
//            holds tokens 4 l to 4 l + 3 of 128, in every pass, so what a pass stores needs no
//            barrier; the final draw is settled by the sums of blocks, then of warps, and one warp
//            walks its span.
// Largest    A maximum over (logit, first token) in one 64-bit number: the greedy token, too.
// Cuts       Top-k counts tokens, top-p adds weights, per level in 256 bins of 1/8 logit each; the
//            bin with the cut is split again, three times at most. Bins are linear in the logit,
//            which spreads the tokens over some hundred of them; they end early where the whole
//            bin stays. Each pass has bins of its own, so that a block may go on while others still
//            read.
// Options    Of the row, the same for all its threads: no branch on them diverges, and every block
//            comes to the same decision. Those of the first pass are in registers, the others wait
//            in shared memory.
// Precision  What changes logits, and distance, in float32, rounded step by step; all else
//            integers, added in shared memory in any order with the same sum.
#pragma once

#include "../common/sm90.cuh"
#include "likeliest.cuh"

namespace mllama {
namespace {

constexpr int kPasses = 4;   // that find a cut: of 31 bits, kBinBits at a time
constexpr int kNumbers = 6;  // of a row, that are needed after its first pass
static_assert(kSampleThreads == 4 * kBins, "four lanes per bin");

struct SampleShared : LikeliestShared {
  uint64_t bins[2 * kPasses][kBins];
  uint64_t block_largest, block_mass;  // what the block tells the others
  uint64_t group_largest;
  uint64_t numbers[kNumbers];  // of the row, in the order of numbers_of
  int64_t target;              // of the draw, counted from the block's first token
  struct {
    uint64_t before, amount;
    int bin;
  } found;
};

// The array whose number of the row a lane reads; null: none.
__device__ __forceinline__ const uint64_t* numbers_of(const SampleParams& p, int lane) {
  const void* numbers = nullptr;
  if (lane == 0) numbers = p.seeds;
  if (lane == 1) numbers = p.steps;
  if (lane == 2) numbers = p.top_k;
  if (lane == 3) numbers = p.top_p;
  if (lane == 4) numbers = p.min_p;
  if (lane == 5) numbers = p.num_likeliest;
  return static_cast<const uint64_t*>(numbers);
}

// Made anew where they are used: registers are scarce.
__device__ __forceinline__ FilterOptions filters_in(const SampleParams& p,
                                                    const SampleShared& shared) {
  const auto integer = [&](const int64_t* numbers, int i) {
    return numbers ? reinterpret_cast<const int64_t*>(shared.numbers + i) : nullptr;
  };
  const auto real = [&](const double* numbers, int i) {
    return numbers ? reinterpret_cast<const double*>(shared.numbers + i) : nullptr;
  };
  return filter_options(integer(p.top_k, 2), real(p.top_p, 3), real(p.min_p, 4),
                        integer(p.num_likeliest, 5));
}

// The group of a kernel with one block per row.
struct OneBlock {
  __device__ int rank() const { return 0; }
  __device__ int size() const { return 1; }
  __device__ void sync() const { __syncthreads(); }
  __device__ uint64_t load(const uint64_t* shared, int) const { return *shared; }
};

__device__ __forceinline__ uint64_t warp_max_u64(uint64_t x) {
  const uint32_t high = static_cast<uint32_t>(x >> 32);
  const uint32_t largest = __reduce_max_sync(0xffffffffu, high);
  const uint32_t low = high == largest ? static_cast<uint32_t>(x) : 0u;
  return static_cast<uint64_t>(largest) << 32 | __reduce_max_sync(0xffffffffu, low);
}

// Inclusive running sum over every kStride-th lane.
template <int kStride>
__device__ __forceinline__ uint64_t warp_running_sum(uint64_t x, int lane) {
#pragma unroll
  for (int offset = kStride; offset < kWarpSize; offset *= 2) {
    const uint64_t before = __shfl_up_sync(0xffffffffu, x, offset);
    if (lane >= offset) x += before;
  }
  return x;
}

// 64-bit sums from 32-bit atomics: the carry follows the low word, in whatever order.
__device__ __forceinline__ void add_to_bin(uint64_t* bin, uint64_t amount) {
  uint32_t* words = reinterpret_cast<uint32_t*>(bin);
  const uint32_t low = static_cast<uint32_t>(amount);
  const uint32_t carry = atomicAdd(words, low) > ~low;
  const uint32_t high = static_cast<uint32_t>(amount >> 32) + carry;
  if (high != 0) atomicAdd(words + 1, high);
}

// The largest of all threads of the group. One warp per block reads from the others.
template <typename Group>
__device__ uint64_t group_max(uint64_t x, SampleShared& shared, const Group& group) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  x = warp_max_u64(x);
  if (lane == 0) shared.warp_values[warp] = x;
  __syncthreads();
  if (warp == 0) {
    x = warp_max_u64(shared.warp_values[lane]);
    if (lane == 0) shared.block_largest = x;
  }
  group.sync();
  if (warp == 0) {
    x = warp_max_u64(lane < group.size() ? group.load(&shared.block_largest, lane) : 0);
    if (lane == 0) shared.group_largest = x;
  }
  __syncthreads();
  return shared.group_largest;
}

// The bin in which the amount from the most likely token on reaches need(amount of all bins), into
// shared.found; false if none does. All blocks find the same.
template <typename Group, typename Need>
__device__ bool find_bin(const uint64_t* bins, uint64_t above, const Need& need,
                         SampleShared& shared, const Group& group) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int bin = threadIdx.x / 4, part = threadIdx.x % 4;
  uint64_t amount = 0;
  for (int rank = part; rank < group.size(); rank += 4) amount += group.load(bins + bin, rank);
  amount += __shfl_xor_sync(0xffffffffu, amount, 1);
  amount += __shfl_xor_sync(0xffffffffu, amount, 2);
  const uint64_t until = warp_running_sum<4>(amount, lane);
  if (lane == kWarpSize - 1) shared.warp_values[warp] = until;
  __syncthreads();
  const uint64_t warps = warp_running_sum<1>(shared.warp_values[lane], lane);
  const uint64_t total = __shfl_sync(0xffffffffu, warps, kWarpSize - 1);
  const uint64_t earlier = __shfl_sync(0xffffffffu, warps, warp == 0 ? 0 : warp - 1);
  const uint64_t end = above + until + (warp == 0 ? 0 : earlier);
  const uint64_t wanted = need(total);
  if (part == 0 && end - amount < wanted && end >= wanted)
    shared.found = {end - amount, amount, bin};
  __syncthreads();
  return above + total >= wanted;
}

// One row on the threads of a group. Levels::pass() begins a pass over the warp's tokens, of which
// get(step, levels) gives the levels of the lane's four, step by step.
template <typename Group, typename Levels>
struct RowCuts {
  const Levels& levels;
  int steps;
  SampleShared& shared;
  const Group& group;

  // The largest level of a token that has less than need(total) above it, among those up to `cut`.
  template <bool kMass, typename Need>
  __device__ uint32_t find(uint32_t cut, const Need& need) const {
    CutInterval interval;
    uint64_t above = 0, wanted = 0;
    for (int pass = 0;; ++pass) {
      uint64_t* bins = shared.bins[kMass ? kPasses + pass : pass];
      auto reader = levels.pass();
      for (int step = 0; step < steps; ++step) {
        uint32_t level[kTokensPerLane];
        reader.get(step, level);
#pragma unroll
        for (int i = 0; i < kTokensPerLane; ++i) {
          if (level[i] > cut || !interval.contains(level[i])) continue;
          add_to_bin(bins + interval.bin(level[i]), kMass ? weight_of(level[i]) : 1);
        }
      }
      group.sync();
      const auto wanted_of = [&](uint64_t total) {
        return wanted = pass == 0 ? need(total) : wanted;
      };
      if (!find_bin(bins, above, wanted_of, shared, group)) return cut;
      const int bin = shared.found.bin;
      const uint32_t last = interval.last_level(bin);
      const int64_t least = kMass ? weight_of(last) : 1;
      if (interval.keeps_bin(shared.found.before + shared.found.amount, least, wanted)) {
        return min(cut, last);
      }
      above = shared.found.before;
      interval.enter(bin);
    }
  }

  // The token at which the running sum of the weights that stay passes the row's random number;
  // write(token) is called by one lane of the group.
  template <typename Write>
  __device__ void draw(int64_t first_token, uint32_t cut, int64_t min_weight,
                       const Write& write) const {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    uint64_t sum = 0;
    auto summed = levels.pass();
    for (int step = 0; step < steps; ++step) {
      uint64_t weight[kTokensPerLane];
      sum += weights(summed, step, cut, min_weight, weight);
    }
    sum = warp_sum(sum);
    if (lane == 0) shared.warp_values[warp] = sum;
    __syncthreads();
    const uint64_t warps = warp_running_sum<1>(shared.warp_values[lane], lane);
    if (threadIdx.x == kWarpSize - 1) shared.block_mass = warps;
    group.sync();
    if (warp == 0) {
      const uint64_t mass = lane < group.size() ? group.load(&shared.block_mass, lane) : 0;
      const uint64_t blocks = warp_running_sum<1>(mass, lane);
      const int64_t total = __shfl_sync(0xffffffffu, blocks, kWarpSize - 1);
      if (lane == group.rank()) {
        shared.target = draw_target(static_cast<int64_t>(shared.numbers[0]),
                                    static_cast<int64_t>(shared.numbers[1]), total) -
                        static_cast<int64_t>(blocks - mass);
      }
    }
    __syncthreads();
    const int64_t target = shared.target;
    const int64_t end = __shfl_sync(0xffffffffu, warps, warp);
    int64_t before = end - static_cast<int64_t>(sum);
    if (target < before || target >= end) return;
    auto reader = levels.pass();
    for (int step = 0;; ++step) {
      uint64_t weight[kTokensPerLane];
      const int64_t own = weights(reader, step, cut, min_weight, weight);
      const int64_t until = before + static_cast<int64_t>(warp_running_sum<1>(own, lane));
      if (target >= until - own && target < until) {
        int passed = 0;
        int64_t sum_until = until - own;
#pragma unroll
        for (int i = 0; i < kTokensPerLane; ++i) {
          sum_until += static_cast<int64_t>(weight[i]);
          passed += sum_until <= target;
        }
        write(first_token + step * kTokensPerStep + lane * kTokensPerLane + passed);
      }
      before = __shfl_sync(0xffffffffu, until, kWarpSize - 1);
      if (target < before) return;
    }
  }

 private:
  template <typename Reader>
  __device__ static uint64_t weights(Reader& reader, int step, uint32_t cut, int64_t min_weight,
                                     uint64_t (&weight)[kTokensPerLane]) {
    uint32_t level[kTokensPerLane];
    reader.get(step, level);
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kTokensPerLane; ++i) {
      weight[i] = 0;
      if (level[i] <= cut) {
        const int64_t w = weight_of(level[i]);
        weight[i] = w >= min_weight ? w : 0;
      }
      sum += weight[i];
    }
    return sum;
  }
};

// The row's token, and its log-probabilities where it asks for them. `span`: tokens per warp.
// prepare(step, z) sees the scaled logits once; levels_with(largest) gives the levels afterwards.
template <typename T, typename Group, typename Prepare, typename MakeLevels>
__device__ void sample_row(const SampleParams& p, int64_t row, bool vectorized, int span,
                           SampleShared& shared, const Group& group, const Prepare& prepare,
                           const MakeLevels& levels_with) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int i = threadIdx.x; i < 2 * kPasses * kBins; i += kSampleThreads)
    (&shared.bins[0][0])[i] = 0;
  wait_for_previous_kernel();
  start_next_kernel();
  const int64_t first_token = (int64_t{group.rank()} * kSampleWarps + warp) * span;
  const int steps = span / kTokensPerStep;
  const ScaledRow<T> scaled(p, row, vectorized, first_token);
  // Read early, one a lane: their latency passes with that of the logits.
  const uint64_t* numbers = warp == 0 ? numbers_of(p, lane) : nullptr;
  const uint64_t number = numbers == nullptr ? 0 : numbers[row];
  uint64_t best = 0;
  BiasCursor biases = scaled.biases();
#pragma unroll 2
  for (int step = 0; step < steps; ++step) {
    const int64_t token = first_token + step * kTokensPerStep + lane * kTokensPerLane;
    float z[kTokensPerLane];
    scaled.load(token, biases, z);
    prepare(step, z);
#pragma unroll
    for (int i = 0; i < kTokensPerLane; ++i) best = max(best, token_key(z[i], token + i));
  }
  if (threadIdx.x < kNumbers) shared.numbers[threadIdx.x] = number;
  best = group_max(best, shared, group);
  const uint32_t key = static_cast<uint32_t>(best >> 32);
  const FilterOptions filters = filters_in(p, shared);
  const bool is_valid =
      key > kMinusInfinityKey && key < kInfinityKey && scaled.are_valid && filters.are_valid;
  if (p.num_likeliest != nullptr) {
    if (is_valid && filters.num_likeliest >= 0) {
      report_likeliest(p, scaled, first_token, steps, filters.num_likeliest, shared, group);
    } else if (group.rank() == 0) {
      report_nothing(p, row);
    }
  }
  const auto write = [&](int64_t token) {
    p.tokens[row] = token;
    if (filters_in(p, shared).num_likeliest >= 0) {
      p.logprobs[row * (1 + kMaxLikeliest)] =
          log_probability(to_f32(scaled.logits[token]), shared.largest, shared.log_mass);
    }
  };
  if (!is_valid || scaled.options.is_greedy) {
    if (group.rank() != 0 || threadIdx.x != 0) return;
    if (is_valid) {
      write(token_of_key(best));
    } else {
      p.tokens[row] = kInvalidToken;
    }
    return;
  }
  const auto levels = levels_with(scaled, first_token, steps, logit_of_key(key));
  const RowCuts<Group, decltype(levels)> cuts{levels, steps, shared, group};
  uint32_t cut = kMaxLevel - 1;
  if (filters_in(p, shared).top_k > 0) {
    cut = cuts.template find<false>(cut, [&](uint64_t) { return filters_in(p, shared).top_k; });
  }
  if (filters_in(p, shared).drop_share > 0) {
    cut = cuts.template find<true>(
        cut, [&](uint64_t total) { return mass_to_keep(total, filters_in(p, shared).drop_share); });
  }
  cuts.draw(first_token, cut, filters_in(p, shared).min_weight, write);
}

}  // namespace
}  // namespace mllama
