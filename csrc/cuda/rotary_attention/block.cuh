// What the kernels of rotary_attention share: where the rows of a sequence lie, the rows of a
// thread block, and how their queries are read.
#pragma once

#include "../../rotary_attention.h"
#include "../attention/sequence_queries.cuh"

namespace mllama {

// Of k or v: the first of a sequence whose first token is `begin`.
template <typename T>
__device__ __forceinline__ const T* first_row(const void* base, const int32_t* cu_seqlens,
                                              int64_t b, int64_t begin, int64_t batch_stride,
                                              int64_t token_stride) {
  return static_cast<const T*>(base) +
         (cu_seqlens == nullptr ? b * batch_stride : begin * token_stride);
}

// The rows of this thread block. The longest blocks come first, for all sequences and heads.
struct RotaryBlock {
  SequenceRows sequence;
  int64_t b, kv_head;
  int64_t past;    // tokens in the cache before the sequence's own
  int64_t length;  // with its own
  int first, count, group;

  __device__ __forceinline__ RotaryBlock(const RotaryAttentionParams& p, int block_rows)
      : group(static_cast<int>(p.num_q_heads / p.num_kv_heads)) {
    const unsigned kv_heads = static_cast<unsigned>(p.num_kv_heads);
    const unsigned pairs = static_cast<unsigned>(p.batch) * kv_heads;
    kv_head = blockIdx.x % kv_heads;
    b = blockIdx.x % pairs / kv_heads;
    sequence = sequence_rows(p.cu_seqlens, b, p.max_seqlen, p.tokens);
    first = static_cast<int>(gridDim.x / pairs - 1 - blockIdx.x / pairs) * block_rows;
    count = static_cast<int>(sequence.count) * group;
    const bool paged = p.page_table != nullptr;
    const int64_t capacity = p.max_pages * p.page_size;
    // Lengths are unchecked, like the page table.
    past = paged ? min(max(int64_t{p.cache_lens[b]}, int64_t{0}), capacity) : 0;
    length = paged ? min(past + sequence.count, capacity) : sequence.count;
  }

  __device__ __forceinline__ bool empty() const { return first >= count; }

  template <typename T>
  __device__ __forceinline__ void fill(QueryRows<T>& rows, const RotaryAttentionParams& p,
                                       int head_dim) const {
    locate_rows(rows, p, sequence, b, kv_head, group, head_dim);
    rows.first = first;
    rows.count = count;
  }

  template <typename T>
  __device__ __forceinline__ RotaryQuery<T> query(const RotaryAttentionParams& p) const {
    const int64_t angles = sequence.begin % p.cos_rows;
    return {static_cast<const T*>(p.cos) + angles * p.cos_row_stride,
            static_cast<const T*>(p.sin) + angles * p.sin_row_stride, p.cos_row_stride,
            p.sin_row_stride, p.interleaved};
  }
};

constexpr int64_t rotary_blocks(const RotaryAttentionParams& p, int64_t block_rows) {
  return ceil_div(p.max_seqlen * (p.num_q_heads / p.num_kv_heads), block_rows) * p.num_kv_heads *
         p.batch;
}

}  // namespace mllama
