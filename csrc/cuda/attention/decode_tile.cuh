// One warp's share of split-KV decode: up to 16 query rows against tiles of a few keys, online
// softmax. 16-bit types use tensor cores, float32 the ordinary units. Both keep the state in
// registers:
//
//   kKeys                                  keys per tile
//   unit(scale_log2)                       what exponents of 2 the maximum counts in
//   init(query)                            query: the tile of 16 query rows in shared memory
//   step(k, v, count, scale_log2, group)   one tile; keys from `count` on are masked
//   store(out, maximum, sum, group)        state to shared memory, out[row * kOutStride + d]
#pragma once

#include "../common/ptx.cuh"
#include "../common/reduce.cuh"
#include "../common/softmax.cuh"
#include "../common/vec.cuh"
#include "decode.h"

namespace mllama {

// The first row of q of the query heads that share a key/value head, of sequence b whose only row
// is `token`.
template <typename T, typename Params>
__device__ __forceinline__ const T* group_rows(const Params& p, int64_t token, int64_t b,
                                               int kv_head) {
  return static_cast<const T*>(p.q) +
         (p.cu_seqlens == nullptr ? b * p.q_batch_stride : token * p.q_token_stride) +
         kv_head * (p.num_q_heads / p.num_kv_heads) * p.q_head_stride;
}

// A row of a tile in shared memory has 16 bytes more than it needs: eight rows then start on
// distinct 16-byte bank groups for head dims 64, 80 and 128 in 16 and 32 bits.
template <typename T, int kHeadDim>
struct SplitTile {
  static constexpr int kRowBytes = kHeadDim * static_cast<int>(sizeof(T)) + 16;
  static constexpr int kRowElements = kRowBytes / static_cast<int>(sizeof(T));
  static constexpr int kChunks = kHeadDim / Vec<T>::kSize;  // 16-byte chunks of a row
  static constexpr int kOutStride = kHeadDim + 8;
  static constexpr int kRows = static_cast<int>(kSplitKvMaxGroup);
};

template <typename T, int kHeadDim>
class SplitWarp {
  using Tile = SplitTile<T, kHeadDim>;
  static constexpr int kSteps = kHeadDim / 16;
  static_assert(kHeadDim % 16 == 0 && Tile::kRows == 16);

  uint32_t query_[kSteps][4];
  float out_[2 * kSteps][4] = {};
  OnlineSoftmax<T, 2> softmax_;

 public:
  static constexpr int kKeys = 16;

  // OnlineSoftmax scales before it subtracts: one FFMA.
  __device__ static __forceinline__ float unit(float) { return 1.0f; }

  __device__ __forceinline__ void init(const T* query) {
    const int lane = threadIdx.x % kWarpSize;
    const uint32_t address = shared_address(query) + lane % 16 * Tile::kRowBytes + lane / 16 * 16;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) ldmatrix_x4(query_[s], address + s * 32);
  }

  __device__ __forceinline__ void step(const T* k, const T* v, int count, float scale_log2, int) {
    const int lane = threadIdx.x % kWarpSize;
    float scores[1][2][4] = {};
    // Matrices of one load: keys 0-7 and 8-15, each with the two halves of 16 dimensions.
    const uint32_t k_address =
        shared_address(k) + (lane / 16 * 8 + lane % 8) * Tile::kRowBytes + lane / 8 % 2 * 16;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      uint32_t keys[4];
      ldmatrix_x4(keys, k_address + s * 32);
      mma_m16n8k16<T>(scores[0][0], query_[s], keys[0], keys[1]);
      mma_m16n8k16<T>(scores[0][1], query_[s], keys[2], keys[3]);
    }
    if (count < kKeys) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (n * 8 + lane % 4 * 2 + i % 2 >= count) scores[0][n][i] = -INFINITY;
        }
      }
    }
    float factor[2];
    softmax_.update(scores, scale_log2, factor);
#pragma unroll
    for (int n = 0; n < 2 * kSteps; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[n][i] *= factor[i / 2];
    }
    // The accumulator layout of the scores is the operand layout of the weights.
    uint32_t weights[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = &scores[0][i / 2][i % 2 * 2];
      weights[i] = pack_pair<T>(pair[0], pair[1]);
    }
    // Matrices of one load: two halves of 16 dimensions, each with keys 0-7 and 8-15.
    const uint32_t v_address = shared_address(v) + lane % 16 * Tile::kRowBytes + lane / 16 * 16;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      uint32_t values[4];
      ldmatrix_x4_trans(values, v_address + s * 32);
      mma_m16n8k16<T>(out_[2 * s], weights, values[0], values[1]);
      mma_m16n8k16<T>(out_[2 * s + 1], weights, values[2], values[3]);
    }
  }

  __device__ __forceinline__ void store(float* out, float* maximum, float* sum, int group) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const int row = lane / 4 + 8 * slot;
      const float total = quad_sum(softmax_.sum[slot]);
      if (row >= group) continue;
      if (lane % 4 == 0) {
        maximum[row] = softmax_.maximum[slot];
        sum[row] = total;
      }
#pragma unroll
      for (int n = 0; n < 2 * kSteps; ++n) {
        float* to = out + row * Tile::kOutStride + n * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(to) = make_float2(out_[n][2 * slot], out_[n][2 * slot + 1]);
      }
    }
  }
};

// float32. Scores: lane l has key l % 8 and rows 4 (l / 8) .. + 3. Output: lane l has dimensions l
// + 32 j of every row; weights reach it by shuffles.
template <int kHeadDim>
class SplitWarp<float, kHeadDim> {
  using Tile = SplitTile<float, kHeadDim>;
  static constexpr int kRowsPerLane = 4;
  static constexpr int kDims = (kHeadDim + kWarpSize - 1) / kWarpSize;

  const float* query_;
  float out_[Tile::kRows][kDims] = {};
  float maximum_[kRowsPerLane], sum_[kRowsPerLane] = {};

  __device__ static __forceinline__ float of_row(const float (&x)[kRowsPerLane], int row, int key) {
    return __shfl_sync(0xffffffffu, x[row % kRowsPerLane], row / kRowsPerLane * kKeys + key);
  }

 public:
  static constexpr int kKeys = 8;

  // Scaling a difference of scores keeps the rounding of the scale out of large scores.
  __device__ static __forceinline__ float unit(float scale_log2) { return scale_log2; }

  __device__ __forceinline__ void init(const float* query) {
    query_ = query + threadIdx.x % kWarpSize / kKeys * kRowsPerLane * Tile::kRowElements;
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) maximum_[i] = -INFINITY;
  }

  __device__ __forceinline__ void step(const float* k, const float* v, int count, float scale_log2,
                                       int group) {
    const int lane = threadIdx.x % kWarpSize, key = lane % kKeys;
    float scores[kRowsPerLane] = {}, lost[kRowsPerLane] = {};
#pragma unroll 4
    for (int d = 0; d < kHeadDim; d += 4) {
      const float4 a = *reinterpret_cast<const float4*>(k + key * Tile::kRowElements + d);
#pragma unroll
      for (int i = 0; i < kRowsPerLane; ++i) {
        add_dot(scores[i], lost[i], a,
                *reinterpret_cast<const float4*>(query_ + i * Tile::kRowElements + d));
      }
    }
    float weight[kRowsPerLane], factor[kRowsPerLane];
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) {
      const float score = key < count ? scores[i] : -INFINITY;
      const float previous = maximum_[i];
      maximum_[i] = fmaxf(previous, warp_max<kKeys>(score));
      const float shift = maximum_[i] == -INFINITY ? 0.0f : maximum_[i];
      factor[i] = exp2f((previous - shift) * scale_log2);
      weight[i] = exp2f((score - shift) * scale_log2);
      sum_[i] = fmaf(sum_[i], factor[i], weight[i]);
    }
    float values[kKeys][kDims];
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
#pragma unroll
      for (int d = 0; d < kDims; ++d) {
        const int column = lane + d * kWarpSize;
        values[j][d] = column < kHeadDim ? v[j * Tile::kRowElements + column] : 0.0f;
      }
    }
#pragma unroll
    for (int row = 0; row < Tile::kRows; ++row) {
      if (row >= group) continue;
      // The tile's sum first: it rounds less than adding key after key to the total.
      float total[kDims] = {};
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const float row_weight = of_row(weight, row, j);
#pragma unroll
        for (int d = 0; d < kDims; ++d) total[d] = fmaf(row_weight, values[j][d], total[d]);
      }
      const float row_factor = of_row(factor, row, 0);
#pragma unroll
      for (int d = 0; d < kDims; ++d) out_[row][d] = fmaf(out_[row][d], row_factor, total[d]);
    }
  }

  __device__ __forceinline__ void store(float* out, float* maximum, float* sum, int group) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) {
      const int row = lane / kKeys * kRowsPerLane + i;
      const float total = warp_sum<kKeys>(sum_[i]);
      if (lane % kKeys == 0 && row < group) {
        maximum[row] = maximum_[i];
        sum[row] = total;
      }
    }
#pragma unroll
    for (int row = 0; row < Tile::kRows; ++row) {
      if (row >= group) continue;
#pragma unroll
      for (int d = 0; d < kDims; ++d) {
        const int column = lane + d * kWarpSize;
        if (column < kHeadDim) out[row * Tile::kOutStride + column] = out_[row][d];
      }
    }
  }
};

}  // namespace mllama
