// Causal grouped-query attention on the main loop of core_sm80.cuh: the prefill of
// rotary_attention.cu for all element types on sm_80 and newer.

#include "../attention/core_sm80.cuh"
#include "../attention/masks.cuh"
#include "../common/launch.h"
#include "block.cuh"
#include "kernels.h"

namespace mllama {
namespace {

// Keys of one sequence and head: rows at fixed strides or, with a page table, in pages. Like the
// query rows it is kept in shared memory: at head dim 128 the main loop leaves no registers for
// either.
template <typename T>
struct KeySpan {
  const T* k;  // first key, or page 0 of the cache, at the head
  const T* v;
  const int32_t* page_table;  // of the sequence, or null
  int64_t k_stride, v_stride, page_stride, num_pages;
  int page_size, length;
};

template <typename T>
__device__ __forceinline__ KeySpan<T> dense_span(const RotaryAttentionParams& p, int64_t b,
                                                 int64_t kv_head, const SequenceRows& rows) {
  KeySpan<T> span{};
  span.k = static_cast<const T*>(p.k_cache) + (rows.begin * p.num_kv_heads + kv_head) * p.head_dim;
  span.v = first_row<T>(p.v, p.cu_seqlens, b, rows.begin, p.v_batch_stride, p.v_token_stride) +
           kv_head * p.v_head_stride;
  span.k_stride = p.num_kv_heads * p.head_dim;
  span.v_stride = p.v_token_stride;
  span.length = static_cast<int>(rows.count);
  return span;
}

template <typename T>
__device__ __forceinline__ KeySpan<T> paged_span(const RotaryAttentionParams& p, int64_t b,
                                                 int64_t kv_head, int64_t length) {
  const int64_t head = kv_head * p.page_size * p.head_dim;
  KeySpan<T> span{};
  span.k = static_cast<const T*>(p.k_cache) + head;
  span.v = static_cast<const T*>(p.v_cache) + head;
  span.page_table = p.page_table + b * p.max_pages;
  span.k_stride = span.v_stride = p.head_dim;
  span.page_stride = p.num_kv_heads * p.page_size * p.head_dim;
  span.num_pages = p.num_pages;
  span.page_size = static_cast<int>(p.page_size);
  span.length = static_cast<int>(length);
  return span;
}

// page_size is a multiple of 16, so a run never leaves its page; rows of a page outside the cache
// read as zero.
template <typename T, int kBlockN>
struct SequenceKeys {
  const KeySpan<T>* span;

  __device__ __forceinline__ RowRun<T> k_run(int block, int first) const {
    return run(span->k, span->k_stride, block * kBlockN + first);
  }
  __device__ __forceinline__ RowRun<T> v_run(int block, int first) const {
    return run(span->v, span->v_stride, block * kBlockN + first);
  }

 private:
  __device__ __forceinline__ RowRun<T> run(const T* base, int64_t stride, int key) const {
    const int count = span->length - key;
    if (count <= 0) return {base, stride, 0};
    if (span->page_table == nullptr) return {base + key * stride, stride, count};
    const int slot = key / span->page_size;
    const int64_t page = __ldg(span->page_table + slot);
    if (page < 0 || page >= span->num_pages) return {base, stride, 0};
    return {base + page * span->page_stride + (key - slot * span->page_size) * stride, stride,
            count};
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    rotary_attention_kernel(const __grid_constant__ RotaryAttentionParams p) {
  using T = typename Config::T;
  extern __shared__ __align__(16) char shared[];
  const RotaryBlock block(p, Config::kBlockM);
  if (block.empty()) return;

  __shared__ QueryRows<T> rows;
  __shared__ KeySpan<T> span;
  if (threadIdx.x == 0) {
    block.fill(rows, p, Config::kHeadDim);
    span = p.page_table == nullptr ? dense_span<T>(p, block.b, block.kv_head, block.sequence)
                                   : paged_span<T>(p, block.b, block.kv_head, block.length);
  }
  __syncthreads();

  const RotaryQuery<T> query = block.query<T>(p);
  CausalMask<Config> mask(block.first, block.count, block.group, static_cast<int>(block.past));
  SequenceKeys<T, Config::kBlockN> keys{&span};
  attend<Config>(rows, query, keys, mask, softmax_scale_log2(p.softmax_scale), shared);
}

template <typename Config>
cudaError_t launch_attend(const RotaryAttentionParams& p, cudaStream_t stream) {
  const int64_t blocks = rotary_blocks(p, Config::kBlockM);
  if (blocks == 0) return cudaSuccess;
  return launch(rotary_attention_kernel<Config>, blocks, Config::kThreads, Config::kSharedBytes,
                stream, {}, p);
}

}  // namespace

cudaError_t rotary_prefill_sm80(const RotaryAttentionParams& p, CUstream_st* stream) {
  return dispatch_dtype(p.dtype, [&](auto element) {
    return dispatch_config<decltype(element)>(
        p.head_dim, [&](auto config) { return launch_attend<decltype(config)>(p, stream); });
  });
}

}  // namespace mllama
