// The query rows of decode attention on their way into shared memory: the group of query heads that
// share one key/value head, of one token. Called by all threads of a block of whole warps.
#pragma once

#include "../cross_attention.h"
#include "../rotary_attention.h"
#include "norm.cuh"
#include "reduce.cuh"
#include "rope.cuh"
#include "vec.cuh"

namespace mllama {

// The group's first row of q, of sequence b whose only row is `token`.
template <typename T, typename Params>
__device__ __forceinline__ const T* group_rows(const Params& p, int64_t token, int64_t b,
                                               int kv_head) {
  return static_cast<const T*>(p.q) +
         (p.cu_seqlens == nullptr ? b * p.q_batch_stride : token * p.q_token_stride) +
         kv_head * (p.num_q_heads / p.num_kv_heads) * p.q_head_stride;
}

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

// A warp per row; q as it is or normalised, with the roundings of rms_norm.
template <typename T>
__device__ __forceinline__ void load_normed_query(const CrossAttentionParams& p, int64_t token,
                                                  int64_t b, int kv_head, T* query,
                                                  int row_elements) {
  constexpr int kMaxPerLane = 128 / kWarpSize;
  const int lane = threadIdx.x % kWarpSize, head_dim = static_cast<int>(p.head_dim);
  const int group = static_cast<int>(p.num_q_heads / p.num_kv_heads);
  const T* q = group_rows<T>(p, token, b, kv_head);
  const T* weight = static_cast<const T*>(p.q_norm_weight);
  for (int row = threadIdx.x / kWarpSize; row < group; row += blockDim.x / kWarpSize) {
    float value[kMaxPerLane];
    Statistic<T> sum = 0;
#pragma unroll
    for (int i = 0; i < kMaxPerLane; ++i) {
      const int d = lane + i * kWarpSize;
      value[i] = d < head_dim ? to_f32(q[row * p.q_head_stride + d]) : 0.0f;
      sum += static_cast<Statistic<T>>(value[i]) * value[i];
    }
    const float rstd = static_cast<float>(inverse_rms(warp_sum(sum), head_dim, p.eps));
#pragma unroll
    for (int i = 0; i < kMaxPerLane; ++i) {
      const int d = lane + i * kWarpSize;
      if (d >= head_dim) continue;
      if (weight != nullptr) {
        value[i] = __fmul_rn(round_to<T>(__fmul_rn(value[i], rstd)), to_f32(weight[d]));
      }
      query[row * row_elements + d] = from_f32<T>(value[i]);
    }
  }
}

}  // namespace mllama
