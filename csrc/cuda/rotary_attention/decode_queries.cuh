// The query rows of decode attention, rotated on their way into shared memory. Called by all
// threads of a block of whole warps.
#pragma once

#include "../../rotary_attention.h"
#include "../attention/decode_tile.cuh"
#include "../common/rope.cuh"
#include "../common/vec.cuh"

namespace mllama {

template <typename T>
__device__ __forceinline__ void load_rotated_query(const RotaryAttentionParams& p, int64_t token,
                                                   int64_t b, int kv_head, T* query,
                                                   int row_elements) {
  const int head_dim = static_cast<int>(p.head_dim);
  const int group = static_cast<int>(p.num_q_heads / p.num_kv_heads);
  const int chunks = head_dim / 2 / Vec<T>::kSize;
  const T* q = group_rows<T>(p, token, b, kv_head);
  const int64_t angles = token % p.cos_rows;
  const T* cos = static_cast<const T*>(p.cos) + angles * p.cos_row_stride;
  const T* sin = static_cast<const T*>(p.sin) + angles * p.sin_row_stride;
  for (int i = threadIdx.x; i < group * chunks; i += blockDim.x) {
    const int row = i / chunks, chunk = i % chunks;
    const RopeChunk<T> at(chunk, head_dim, p.interleaved);
    const T* from = q + row * p.q_head_stride;
    Vec<T> first = load_vec(from + at.first), second = load_vec(from + at.second);
    rotate_chunk(first, second, load_vec(cos + chunk * Vec<T>::kSize),
                 load_vec(sin + chunk * Vec<T>::kSize), p.interleaved);
    store_vec(query + row * row_elements + at.first, first);
    store_vec(query + row * row_elements + at.second, second);
  }
}

}  // namespace mllama
