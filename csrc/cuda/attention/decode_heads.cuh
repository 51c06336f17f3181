// One warp's share of cluster decode (decode_cluster.cuh): up to 8 query heads against chunks of
// 16 keys, 16-bit types, online softmax.
//
// The heads are the columns of m16n8k16 products: scores^T = K q^T and out^T += V^T weights^T. A
// group of 8 fills them, where heads as rows (decode_tile.cuh) would take twice the products and
// twice the registers. Both fragments of K and V come from rows in shared memory by ldmatrix; the
// weights turn from accumulator into operand by movmatrix.
#pragma once

#include "../common/ptx.cuh"
#include "../common/reduce.cuh"
#include "decode.h"
#include "decode_tile.cuh"

namespace mllama {

// The transpose of an 8x8 matrix of 16-bit elements; lane l holds row l / 4, columns 2 * (l % 4) +
// {0, 1}.
__device__ __forceinline__ uint32_t transposed(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(y) : "r"(x));
  return y;
}

// Lane l: heads 2 * (l % 4) + {0, 1}; keys, and dimensions of a step of 16, l / 4 + {0, 8}.
template <typename T, int kHeadDim>
class HeadsWarp {
  using Tile = SplitTile<T, kHeadDim>;
  static constexpr int kSteps = kHeadDim / 16;
  static_assert(kHeadDim % 16 == 0 && kChunkKeys == 16 && kClusterMaxGroup == 8);

  uint32_t query_[kSteps][2];
  float out_[kSteps][4];
  float maximum_[2];  // times scale * log2(e); equal in the 8 lanes that share a head
  float sum_[2];      // of this lane's keys

 public:
  // query: the heads' rows in shared memory, 8 of them.
  __device__ __forceinline__ void load_query(const T* query) {
    const int lane = threadIdx.x % kWarpSize;
    const T* row = query + lane / 4 * Tile::kRowElements + lane % 4 * 2;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      query_[s][0] = *reinterpret_cast<const uint32_t*>(row + s * 16);
      query_[s][1] = *reinterpret_cast<const uint32_t*>(row + s * 16 + 8);
    }
  }

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[s][i] = 0.0f;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      maximum_[h] = -INFINITY;
      sum_[h] = 0.0f;
    }
  }

  // One chunk; keys from `count` on are masked, their rows of v are finite.
  __device__ __forceinline__ void step(const T* k, const T* v, int count, float scale_log2) {
    const int lane = threadIdx.x % kWarpSize;
    // Matrices of one load: keys 0-7 and 8-15 with the first 8 dimensions, then with the second.
    const uint32_t k_address = shared_address(k) + lane % 16 * Tile::kRowBytes + lane / 16 * 16;
    float partial[2][4] = {};  // even and odd steps: two short chains of products
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      uint32_t keys[4];
      ldmatrix_x4(keys, k_address + s * 32);
      mma_m16n8k16<T>(partial[s % 2], keys, query_[s][0], query_[s][1]);
    }
    float scores[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[i] = partial[0][i] + partial[1][i];
      if (lane / 4 + i / 2 * 8 >= count) scores[i] = -INFINITY;
    }

    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float largest = fmaxf(scores[h], scores[h + 2]);
#pragma unroll
      for (int offset = 4; offset < kWarpSize; offset *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
      }
      const float previous = maximum_[h];
      maximum_[h] = fmaxf(previous, largest * scale_log2);
      // exp2(-inf - -inf) is never formed.
      const float shift = maximum_[h] == -INFINITY ? 0.0f : maximum_[h];
      factor[h] = exp2_approx(previous - shift);
#pragma unroll
      for (int i = h; i < 4; i += 2) scores[i] = exp2_approx(fmaf(scores[i], scale_log2, -shift));
      sum_[h] = fmaf(sum_[h], factor[h], scores[h] + scores[h + 2]);
    }
    const uint32_t weights[2] = {transposed(pack_pair<T>(scores[0], scores[1])),
                                 transposed(pack_pair<T>(scores[2], scores[3]))};

    // Matrices of one load: both halves of 16 dimensions with keys 0-7, then with keys 8-15.
    const uint32_t v_address =
        shared_address(v) + (lane / 16 * 8 + lane % 8) * Tile::kRowBytes + lane / 8 % 2 * 16;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      uint32_t values[4];
      ldmatrix_x4_trans(values, v_address + s * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[s][i] *= factor[i % 2];
      mma_m16n8k16<T>(out_[s], values, weights[0], weights[1]);
    }
  }

  // Calls put_statistics(head, maximum, sum), in all lanes that share the head, and put_out(head,
  // dimension, value) for the group's heads; not normalised.
  template <typename PutStatistics, typename PutOut>
  __device__ __forceinline__ void emit(int group, const PutStatistics& put_statistics,
                                       const PutOut& put_out) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int head = lane % 4 * 2 + h;
      float sum = sum_[h];
#pragma unroll
      for (int offset = 4; offset < kWarpSize; offset *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      }
      if (head >= group) continue;
      put_statistics(head, maximum_[h], sum);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int i = h; i < 4; i += 2) put_out(head, s * 16 + i / 2 * 8 + lane / 4, out_[s][i]);
      }
    }
  }
};

}  // namespace mllama
