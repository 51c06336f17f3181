// The query rows of decode attention, normalised on their way into shared memory. Called by all
// threads of a block of whole warps.
#pragma once

#include "../../cross_attention.h"
#include "../attention/decode_tile.cuh"
#include "../common/rms.cuh"
#include "../common/vec.cuh"

namespace mllama {

// Eight lanes per row; q as it is or normalised.
template <typename T>
__device__ __forceinline__ void load_normed_query(const CrossAttentionParams& p, int64_t token,
                                                  int64_t b, int kv_head, T* query,
                                                  int row_elements) {
  constexpr int kLanes = 8, kVecs = 128 / Vec<T>::kSize / kLanes;  // of head dims up to 128
  const int lane = threadIdx.x % kLanes, head_dim = static_cast<int>(p.head_dim);
  const int group = static_cast<int>(p.num_q_heads / p.num_kv_heads);
  const T* q = group_rows<T>(p, token, b, kv_head);
  const T* weight = static_cast<const T*>(p.q_norm_weight);
  for (int first_row = 0; first_row < group; first_row += blockDim.x / kLanes) {
    const int row = first_row + threadIdx.x / kLanes;
    Vec<T> v[kVecs], w[kVecs];
#pragma unroll
    for (int c = 0; c < kVecs; ++c) {
      const int column = (c * kLanes + lane) * Vec<T>::kSize;
      v[c] = load_vec_if(row < group && column < head_dim, q + row * p.q_head_stride + column);
      w[c] = load_vec_if(weight != nullptr && column < head_dim, weight + column);
    }
    if (weight != nullptr) normalize_row(v, w, head_dim, p.eps);
#pragma unroll
    for (int c = 0; c < kVecs; ++c) {
      const int column = (c * kLanes + lane) * Vec<T>::kSize;
      if (row < group && column < head_dim) store_vec(query + row * row_elements + column, v[c]);
    }
  }
}

}  // namespace mllama
