// One row of logits behind biases, penalties, allowed tokens and temperature, four tokens a lane.
#pragma once

#include "../../sample_row.h"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"

namespace mllama {
namespace {

constexpr int kTokensPerLane = 4;
constexpr int kTokensPerStep = kTokensPerLane * kWarpSize;

template <typename T>
struct alignas(kTokensPerLane * sizeof(T)) Quad {
  T data[kTokensPerLane];
};

// The tokens of a row that have a bias, which a warp passes in rising order together with its own:
// a step that holds none costs one comparison.
struct BiasCursor {
  const int64_t* tokens;
  const float* values;
  int place, count;
  int next;  // the token at `place`

  __device__ BiasCursor(const SampleParams& p, int64_t row, int place)
      : tokens(p.bias_tokens + row * p.num_biases),
        values(p.bias + row * p.num_biases),
        place(place),
        count(static_cast<int>(p.num_biases)) {
    find_next();
  }
  __device__ void find_next() {
    next = place < count && tokens[place] >= 0 ? static_cast<int>(tokens[place]) : INT_MAX;
  }
  // The lane's tokens from `token` on, of a step that ends before `end`.
  __device__ void add(int end, int token, float (&z)[kTokensPerLane]) {
    while (next < end) {
      const float value = values[place];
#pragma unroll
      for (int i = 0; i < kTokensPerLane; ++i) {
        if (token + i == next) z[i] = __fadd_rn(z[i], value);
      }
      ++place;
      find_next();
    }
  }
};

template <typename T>
struct ScaledRow {
  const SampleParams& p;
  int64_t row;
  const T* logits;
  ScaleOptions options;
  int first_bias;  // of the warp's tokens
  bool vectorized, are_valid;

  // `first_token`: of the warp.
  __device__ ScaledRow(const SampleParams& p, int64_t row, bool vectorized, int64_t first_token)
      : p(p),
        row(row),
        logits(static_cast<const T*>(p.logits) + row * p.logits_row_stride),
        options(scale_options(p, row)),
        first_bias(0),
        vectorized(vectorized),
        are_valid(options.are_valid) {
    if (p.num_biases == 0) return;
    const int64_t* tokens = p.bias_tokens + row * p.num_biases;
    bool rise = true;
    for (int i = threadIdx.x % kWarpSize; i < p.num_biases; i += kWarpSize) {
      rise = rise && is_bias_token(tokens, i, p.vocab);
      first_bias += tokens[i] >= 0 && tokens[i] < first_token;
    }
    first_bias = warp_sum(first_bias);
    are_valid = __all_sync(0xffffffffu, rise) && are_valid;
  }

  // What a pass over the warp's tokens carries from step to step.
  __device__ BiasCursor biases() const { return BiasCursor(p, row, first_bias); }

  // As given. Tokens behind the row are -inf.
  __device__ void load_given(int64_t token, float (&z)[kTokensPerLane]) const {
    read(logits, token,
         [&](int i, T value, bool exists) { z[i] = exists ? to_f32(value) : -INFINITY; });
  }

  // Scaled. What is not finite cannot be hidden.
  __device__ void load(int64_t token, BiasCursor& biases, float (&z)[kTokensPerLane]) const {
    load_given(token, z);
    const int lane = threadIdx.x % kWarpSize, own = static_cast<int>(token);
    biases.add(own + (kWarpSize - lane) * kTokensPerLane, own, z);
    if (options.repetition != 1) {
      read(p.seen + row * p.vocab, token, [&](int i, bool is_seen, bool exists) {
        if (!exists || !is_seen) return;
        z[i] = z[i] < 0 ? __fmul_rn(z[i], options.repetition) : __fdiv_rn(z[i], options.repetition);
      });
    }
    if (options.presence != 0 || options.frequency != 0) {
      read(p.counts + row * p.vocab, token, [&](int i, int32_t count, bool exists) {
        if (!exists || count <= 0) return;
        const float repeated = __fmul_rn(options.frequency, __int2float_rn(count));
        z[i] = __fsub_rn(__fsub_rn(z[i], repeated), options.presence);
      });
    }
    if (p.allowed != nullptr && token < p.vocab) {
      const int32_t word = p.allowed[row * ((p.vocab + 31) / 32) + token / 32];
      const uint32_t bits = static_cast<uint32_t>(word) >> own % 32;
#pragma unroll
      for (int i = 0; i < kTokensPerLane; ++i) {
        if ((bits >> i & 1) == 0 && z[i] < INFINITY) z[i] = -INFINITY;
      }
    }
    if (options.temperature != 1) {
#pragma unroll
      for (int i = 0; i < kTokensPerLane; ++i) z[i] = __fdiv_rn(z[i], options.temperature);
    }
  }

 private:
  // take(i, value, exists) for the lane's tokens; `values` has one element per token of the row.
  template <typename Element, typename Take>
  __device__ void read(const Element* values, int64_t token, const Take& take) const {
    Quad<Element> quad{};
    if (vectorized && token < p.vocab) {
      quad = *reinterpret_cast<const Quad<Element>*>(values + token);
    }
#pragma unroll
    for (int i = 0; i < kTokensPerLane; ++i) {
      const bool exists = token + i < p.vocab;
      if (!vectorized && exists) quad.data[i] = values[token + i];
      take(i, quad.data[i], exists);
    }
  }
};

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

// A logit and its token, by the logit and of equals the smaller token first.
__device__ __forceinline__ uint64_t token_key(float z, int64_t token) {
  return static_cast<uint64_t>(ordered_key(z)) << 32 | ~static_cast<uint32_t>(token);
}
__device__ __forceinline__ int64_t token_of_key(uint64_t key) {
  return static_cast<int64_t>(~static_cast<uint32_t>(key));
}

__device__ __forceinline__ uint32_t level_of(float z, float largest) {
  const float distance = fminf(__fsub_rn(largest, z), kMaxDistance);
  return __float2uint_rz(__fmul_rn(distance, kLevelsPerUnit));
}

// Whether every row of logits, and of what belongs to its tokens, can be read four at a time.
inline bool reads_quads(const SampleParams& p) {
  const int64_t unit = kTokensPerLane * element_size(p.dtype);
  return p.vocab % kTokensPerLane == 0 && reinterpret_cast<uintptr_t>(p.logits) % unit == 0 &&
         (p.rows == 1 || p.logits_row_stride % kTokensPerLane == 0) &&
         reinterpret_cast<uintptr_t>(p.seen) % sizeof(Quad<bool>) == 0 &&
         reinterpret_cast<uintptr_t>(p.counts) % sizeof(Quad<int32_t>) == 0;
}

}  // namespace
}  // namespace mllama
