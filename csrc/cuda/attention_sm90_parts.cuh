// Attention over keys that come in parts, each of which every query row sees whole or not at all
// (attention_sm90.cuh). A part is attended to by itself, as if all rows saw it, and then added to
// the totals of the rows that do: hiding it takes no select per score, and whatever it holds, NaN
// included, stays out of the other rows. A row's result depends on the parts that it sees and on
// their order, not on the other rows.
//
// Shared memory  The totals of all but the last part, float32: what is read and written per part is
//                a few hundredths of what its products read.
#pragma once

#include "softmax.cuh"

namespace mllama {

// Mask policies of keys in parts (attend_sm90).
template <typename Mask>
concept PartedMask = requires(Mask& mask, int block) { mask.begins_part(block); };

// One thread's rows of what the parts add up to. Nothing but this thread touches its memory.
template <typename Config>
class PartTotals {
  using T = typename Config::T;
  using Softmax = OnlineSoftmax<T, Config::kSlots, true>;
  static constexpr int kThreads = Config::kWarps * kWarpSize;  // that compute

 public:
  static constexpr int kBytes = Config::kDimTiles * Config::kSlots * kThreads * sizeof(float2);

  // `memory`: kBytes of shared memory.
  __device__ __forceinline__ explicit PartTotals(char* memory)
      : outputs_(reinterpret_cast<float2*>(memory) + threadIdx.x) {
#pragma unroll
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      maximum_[slot] = -INFINITY;
      sum_[slot] = 0.0f;
    }
  }

  // Behind the last scores of a part: takes its statistics and clears them for the next one.
  // `sees(slot)`: whether the part counts for the row.
  template <typename Sees>
  __device__ __forceinline__ void end(Softmax& softmax, const Sees& sees) {
#pragma unroll
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      stored_[slot] = holds_[slot];
      adds_[slot] = sees(slot);
      kept_factor_[slot] = part_factor_[slot] = 1.0f;
      if (adds_[slot]) {
        const float maximum = fmaxf(maximum_[slot], softmax.maximum[slot]);
        const float shift = maximum == -INFINITY ? 0.0f : maximum;
        kept_factor_[slot] = softmax_exp2<T>(maximum_[slot] - shift);
        part_factor_[slot] = softmax_exp2<T>(softmax.maximum[slot] - shift);
        sum_[slot] = fmaf(sum_[slot], kept_factor_[slot], softmax.sum[slot] * part_factor_[slot]);
        maximum_[slot] = maximum;
        holds_[slot] = true;
      }
    }
    softmax = Softmax();
  }

  // Behind the last product of that part: adds its output to the totals and clears it.
  __device__ __forceinline__ void store(float (&out)[Config::kDimTiles][4]) const {
#pragma unroll
    for (int n = 0; n < Config::kDimTiles; ++n) {
#pragma unroll
      for (int slot = 0; slot < Config::kSlots; ++slot) {
        if (adds_[slot]) *place(n, slot) = total(out[n], n, slot);
        clear(out[n][slot * 2]);
        clear(out[n][slot * 2 + 1]);
      }
    }
  }

  // The same behind the last part: the totals become the output and its statistics.
  __device__ __forceinline__ void finish(float (&out)[Config::kDimTiles][4],
                                         Softmax& softmax) const {
#pragma unroll
    for (int n = 0; n < Config::kDimTiles; ++n) {
#pragma unroll
      for (int slot = 0; slot < Config::kSlots; ++slot) {
        const float2 result = total(out[n], n, slot);
        out[n][slot * 2] = result.x;
        out[n][slot * 2 + 1] = result.y;
      }
    }
#pragma unroll
    for (int slot = 0; slot < Config::kSlots; ++slot) softmax.sum[slot] = sum_[slot];
  }

 private:
  __device__ __forceinline__ float2* place(int n, int slot) const {
    return outputs_ + (n * Config::kSlots + slot) * kThreads;
  }

  // A zero that the compiler knows would be merged into accumulators by moves while products run,
  // and it would then make them wait for each other.
  __device__ __forceinline__ static void clear(float& x) {
    asm volatile("mov.f32 %0, 0f00000000;\n" : "=f"(x));
  }

  // Selects, not factors of 0: what is left out may be NaN.
  __device__ __forceinline__ float2 total(const float (&out)[4], int n, int slot) const {
    float2 kept = stored_[slot] ? *place(n, slot) : make_float2(0.0f, 0.0f);
    if (adds_[slot]) {
      kept.x = fmaf(kept.x, kept_factor_[slot], out[slot * 2] * part_factor_[slot]);
      kept.y = fmaf(kept.y, kept_factor_[slot], out[slot * 2 + 1] * part_factor_[slot]);
    }
    return kept;
  }

  float2* const outputs_;
  float maximum_[Config::kSlots], sum_[Config::kSlots];
  bool holds_[Config::kSlots] = {};  // the totals count a part
  // Of the part that ended last.
  bool stored_[Config::kSlots] = {}, adds_[Config::kSlots] = {};
  float kept_factor_[Config::kSlots], part_factor_[Config::kSlots];
};

// Of keys in one piece.
struct NoTotals {
  __device__ __forceinline__ explicit NoTotals(char*) {}
};

}  // namespace mllama
