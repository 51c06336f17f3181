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
// Precision  Penalty, temperature and distance in float32, rounded step by step; all else integers,
//            added in shared memory in any order with the same sum.
#pragma once

#include "../../sample.h"
#include "../../sample_math.h"
#include "../common/reduce.cuh"
#include "../common/sm90.cuh"
#include "../common/vec.cuh"

namespace mllama {
namespace {

constexpr int kSampleThreads = 1024;
constexpr int kSampleWarps = kSampleThreads / kWarpSize;
constexpr int kTokensPerLane = 4;
constexpr int kTokensPerStep = kTokensPerLane * kWarpSize;
constexpr int kPasses = 4;  // that find a cut: of 31 bits, kBinBits at a time
static_assert(kSampleWarps == kWarpSize, "a warp holds one value of every warp");
static_assert(kSampleThreads == 4 * kBins, "four lanes per bin");

struct SampleShared {
  uint64_t bins[2 * kPasses][kBins];
  uint64_t warp_values[kSampleWarps];
  uint64_t block_largest, block_mass;  // what the block tells the others
  uint64_t group_largest;
  int64_t seed, step;
  int64_t target;  // of the draw, counted from the block's first token
  struct {
    uint64_t before, amount;
    int bin;
  } found;
};

// The group of a kernel with one block per row.
struct OneBlock {
  __device__ int rank() const { return 0; }
  __device__ int size() const { return 1; }
  __device__ void sync() const { __syncthreads(); }
  __device__ uint64_t load(const uint64_t* shared, int) const { return *shared; }
};

template <typename T>
struct alignas(kTokensPerLane * sizeof(T)) Quad {
  T data[kTokensPerLane];
};

// A row's logits behind penalty and temperature.
template <typename T>
struct ScaledRow {
  const T* logits;
  const bool* seen;  // null: no penalty
  float penalty, temperature;
  int64_t vocab;
  bool vectorized;

  __device__ ScaledRow(const SampleParams& p, int64_t row, bool vectorized)
      : logits(static_cast<const T*>(p.logits) + row * p.logits_row_stride),
        seen(p.seen == nullptr ? nullptr : p.seen + row * p.vocab),
        penalty(p.repetition_penalty),
        temperature(p.do_sample ? p.temperature : 1.0f),
        vocab(p.vocab),
        vectorized(vectorized) {}

  // Tokens behind the row are -inf.
  __device__ void load(int64_t token, float (&z)[kTokensPerLane]) const {
    Quad<T> values;
    Quad<bool> marks{};
    if (vectorized && token < vocab) {
      values = *reinterpret_cast<const Quad<T>*>(logits + token);
      if (seen != nullptr) marks = *reinterpret_cast<const Quad<bool>*>(seen + token);
    }
#pragma unroll
    for (int i = 0; i < kTokensPerLane; ++i) {
      if (token + i >= vocab) {
        z[i] = -INFINITY;
        continue;
      }
      if (!vectorized) {
        values.data[i] = logits[token + i];
        if (seen != nullptr) marks.data[i] = seen[token + i];
      }
      z[i] = to_f32(values.data[i]);
      if (marks.data[i]) z[i] = z[i] < 0 ? __fmul_rn(z[i], penalty) : __fdiv_rn(z[i], penalty);
      if (temperature != 1) z[i] = __fdiv_rn(z[i], temperature);
    }
  }
};

__device__ __forceinline__ uint32_t level_of(float z, float largest) {
  const float distance = fminf(__fsub_rn(largest, z), kMaxDistance);
  return __float2uint_rz(__fmul_rn(distance, kLevelsPerUnit));
}

// In the order of the logits, NaN above all; -0 equals 0.
constexpr uint32_t kInfinityKey = 0xff800000u, kMinusInfinityKey = 0x007fffffu;

__device__ __forceinline__ uint32_t ordered_key(float z) {
  if (z != z) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(__fadd_rn(z, 0.0f));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float logit_of_key(uint32_t key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

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

// One row on the threads of a group. Levels::get(step, levels) gives the levels of four tokens.
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
      for (int step = 0; step < steps; ++step) {
        uint32_t level[kTokensPerLane];
        levels.get(step, level);
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
  // one lane of the group writes it.
  __device__ void draw(const SampleParams& p, int64_t row, int64_t first_token,
                       uint32_t cut) const {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    uint64_t sum = 0;
    for (int step = 0; step < steps; ++step) {
      uint64_t weight[kTokensPerLane];
      sum += weights(step, cut, p.min_weight, weight);
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
        shared.target =
            draw_target(shared.seed, shared.step, total) - static_cast<int64_t>(blocks - mass);
      }
    }
    __syncthreads();
    const int64_t target = shared.target;
    const int64_t end = __shfl_sync(0xffffffffu, warps, warp);
    int64_t before = end - static_cast<int64_t>(sum);
    if (target < before || target >= end) return;
    for (int step = 0;; ++step) {
      uint64_t weight[kTokensPerLane];
      const int64_t own = weights(step, cut, p.min_weight, weight);
      const int64_t until = before + static_cast<int64_t>(warp_running_sum<1>(own, lane));
      if (target >= until - own && target < until) {
        int passed = 0;
        int64_t sum_until = until - own;
#pragma unroll
        for (int i = 0; i < kTokensPerLane; ++i) {
          sum_until += static_cast<int64_t>(weight[i]);
          passed += sum_until <= target;
        }
        p.tokens[row] = first_token + step * kTokensPerStep + lane * kTokensPerLane + passed;
      }
      before = __shfl_sync(0xffffffffu, until, kWarpSize - 1);
      if (target < before) return;
    }
  }

 private:
  __device__ uint64_t weights(int step, uint32_t cut, int64_t min_weight,
                              uint64_t (&weight)[kTokensPerLane]) const {
    uint32_t level[kTokensPerLane];
    levels.get(step, level);
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

// The row's token. `span`: tokens per warp. prepare(step, z) sees the scaled logits once;
// levels_with(largest) gives the levels afterwards.
template <typename T, typename Group, typename Prepare, typename MakeLevels>
__device__ void sample_row(const SampleParams& p, int64_t row, bool vectorized, int span,
                           SampleShared& shared, const Group& group, const Prepare& prepare,
                           const MakeLevels& levels_with) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int i = threadIdx.x; i < 2 * kPasses * kBins; i += kSampleThreads)
    (&shared.bins[0][0])[i] = 0;
  wait_for_previous_kernel();
  start_next_kernel();
  const ScaledRow<T> scaled(p, row, vectorized);
  const int64_t first_token = (int64_t{group.rank()} * kSampleWarps + warp) * span;
  const int steps = span / kTokensPerStep;
  int64_t seed = 0, counter = 0;  // read early: their latency passes with that of the logits
  if (threadIdx.x == 0 && p.do_sample) {
    seed = p.seeds[row];
    counter = *p.step;
  }
  uint64_t best = 0;
#pragma unroll 2
  for (int step = 0; step < steps; ++step) {
    const int64_t token = first_token + step * kTokensPerStep + lane * kTokensPerLane;
    float z[kTokensPerLane];
    scaled.load(token, z);
    prepare(step, z);
#pragma unroll
    for (int i = 0; i < kTokensPerLane; ++i) {
      const uint64_t key = static_cast<uint64_t>(ordered_key(z[i])) << 32;
      best = max(best, key | ~static_cast<uint32_t>(token + i));  // the smaller token of equals
    }
  }
  if (threadIdx.x == 0) {
    shared.seed = seed;
    shared.step = counter;
  }
  best = group_max(best, shared, group);
  const uint32_t key = static_cast<uint32_t>(best >> 32);
  const bool valid = key > kMinusInfinityKey && key < kInfinityKey;
  if (!valid || !p.do_sample) {
    if (group.rank() == 0 && threadIdx.x == 0) {
      p.tokens[row] = valid ? static_cast<int64_t>(~static_cast<uint32_t>(best)) : kInvalidToken;
    }
    return;
  }
  const auto levels = levels_with(scaled, first_token, steps, logit_of_key(key));
  const RowCuts<Group, decltype(levels)> cuts{levels, steps, shared, group};
  uint32_t cut = kMaxLevel - 1;
  if (p.top_k > 0) cut = cuts.template find<false>(cut, [&](uint64_t) { return p.top_k; });
  if (p.drop_share > 0) {
    cut = cuts.template find<true>(
        cut, [&](uint64_t total) { return mass_to_keep(total, p.drop_share); });
  }
  cuts.draw(p, row, first_token, cut);
}

// Whether every row of logits, and of `seen`, can be read four tokens at a time.
inline bool reads_quads(const SampleParams& p) {
  const int64_t unit = kTokensPerLane * element_size(p.dtype);
  return p.vocab % kTokensPerLane == 0 && reinterpret_cast<uintptr_t>(p.logits) % unit == 0 &&
         (p.rows == 1 || p.logits_row_stride % kTokensPerLane == 0) &&
         reinterpret_cast<uintptr_t>(p.seen) % kTokensPerLane == 0;
}

}  // namespace
}  // namespace mllama
