// The keys of a call, rotated, and where they are cached its values: kernel 1 of
// rotary_attention.cu. A key is rotated once, not once per query block.

#include "../common/dispatch.cuh"
#include "../common/launch.h"
#include "../common/ragged.cuh"
#include "../common/rope.cuh"
#include "block.cuh"
#include "kernels.h"

namespace mllama {
namespace {

constexpr int kAppendThreads = 256;

// One thread per (token, key/value head, chunk of pairs). Rows of q that belong to no sequence get
// a result here: zeros and a log-sum-exp of +infinity.
template <typename T>
__global__ void __launch_bounds__(kAppendThreads)
    append_kernel(const __grid_constant__ RotaryAttentionParams p) {
  const int head_dim = static_cast<int>(p.head_dim);
  const int chunks = head_dim / 2 / Vec<T>::kSize;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kAppendThreads + threadIdx.x;
  const int64_t row = index / chunks;
  const int chunk_index = static_cast<int>(index - row * chunks);
  const int64_t token = row / p.num_kv_heads, kv_head = row - token * p.num_kv_heads;
  if (token >= p.tokens) return;
  const RopeChunk<T> chunk(chunk_index, head_dim, p.interleaved);

  const int64_t b = find_sequence(p.cu_seqlens, p.batch, p.max_seqlen, token, p.tokens);
  if (b < 0) {
    const int64_t group = p.num_q_heads / p.num_kv_heads;
    T* out = static_cast<T*>(p.out) + (token * p.num_q_heads + kv_head * group) * head_dim;
    for (int64_t g = 0; g < group; ++g, out += head_dim) {
      store_vec(out + chunk.first, zero_vec<T>());
      store_vec(out + chunk.second, zero_vec<T>());
      if (p.lse != nullptr && chunk_index == 0) {
        static_cast<float*>(p.lse)[(kv_head * group + g) * p.tokens + token] = INFINITY;
      }
    }
    return;
  }
  const int64_t begin = p.cu_seqlens == nullptr ? b * p.max_seqlen : p.cu_seqlens[b];
  int64_t target = token * p.num_kv_heads + kv_head;  // row of the cache or the scratch
  if (p.page_table != nullptr) {
    const int64_t position = p.cache_lens[b] + token - begin;
    if (position < 0 || position >= p.max_pages * p.page_size) return;
    const int64_t slot = position / p.page_size;
    const int64_t page = p.page_table[b * p.max_pages + slot];
    if (page < 0 || page >= p.num_pages) return;  // the table is unchecked
    target = (page * p.num_kv_heads + kv_head) * p.page_size + position - slot * p.page_size;
  }

  const T* k = first_row<T>(p.k, p.cu_seqlens, b, begin, p.k_batch_stride, p.k_token_stride) +
               (token - begin) * p.k_token_stride + kv_head * p.k_head_stride;
  const int64_t angles = token % p.cos_rows;
  const T* cos = static_cast<const T*>(p.cos) + angles * p.cos_row_stride;
  const T* sin = static_cast<const T*>(p.sin) + angles * p.sin_row_stride;
  Vec<T> first = load_vec(k + chunk.first), second = load_vec(k + chunk.second);
  rotate_chunk(first, second, load_vec(cos + chunk_index * Vec<T>::kSize),
               load_vec(sin + chunk_index * Vec<T>::kSize), p.interleaved);
  T* k_target = static_cast<T*>(p.k_cache) + target * head_dim;
  store_vec(k_target + chunk.first, first);
  store_vec(k_target + chunk.second, second);
  if (p.page_table != nullptr) {
    const T* v = first_row<T>(p.v, p.cu_seqlens, b, begin, p.v_batch_stride, p.v_token_stride) +
                 (token - begin) * p.v_token_stride + kv_head * p.v_head_stride;
    T* v_target = static_cast<T*>(p.v_cache) + target * head_dim;
    store_vec(v_target + chunk.first, load_vec(v + chunk.first));
    store_vec(v_target + chunk.second, load_vec(v + chunk.second));
  }
}

}  // namespace

cudaError_t rotary_append(const RotaryAttentionParams& p, CUstream_st* stream) {
  return dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t threads = p.tokens * p.num_kv_heads * (p.head_dim / 2 / Vec<T>::kSize);
    return launch(append_kernel<T>, ceil_div<int64_t>(threads, kAppendThreads), kAppendThreads, 0,
                  stream, {}, p);
  });
}

}  // namespace mllama
