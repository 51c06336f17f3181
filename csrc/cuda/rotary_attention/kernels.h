// What rotary_attention.cu can call. Every stream is that of the current device.
#pragma once

#include <cuda_runtime.h>

#include "../../rotary_attention.h"
#include "../common/tensor_map_dims.h"

namespace mllama {

// Rotates the keys and writes them, with the values, into the pages; not paged: rotated keys into
// scratch. Writes what rows of no sequence get. All below attend to what it wrote.
cudaError_t rotary_append(const RotaryAttentionParams& p, CUstream_st* stream);

// Any call.
cudaError_t rotary_prefill_sm80(const RotaryAttentionParams& p, CUstream_st* stream);
// 16 bits, on a device for which runs_sm90a() holds, keys and values that tensor maps can describe.
cudaError_t rotary_prefill_sm90(const RotaryAttentionParams& p, CUstream_st* stream);

// The keys and values that are attended to: rows of the pages or, rotated keys apart, of k and v.
constexpr RowsTensor rotary_pages(const RotaryAttentionParams& p, const void* cache) {
  const int64_t head = p.page_size * p.head_dim;
  return {cache, p.page_size, p.head_dim, p.num_kv_heads, head, p.num_pages, p.num_kv_heads * head};
}
constexpr RowsTensor rotary_rows(const RotaryAttentionParams& p, const void* base,
                                 int64_t batch_stride, int64_t token_stride, int64_t head_stride) {
  if (p.cu_seqlens != nullptr) {
    return {base, p.tokens, token_stride, p.num_kv_heads, head_stride, 1, p.head_dim};
  }
  return {base, p.max_seqlen, token_stride, p.num_kv_heads, head_stride, p.batch, batch_stride};
}
constexpr RowsTensor rotary_keys(const RotaryAttentionParams& p) {
  const int64_t row = p.num_kv_heads * p.head_dim;
  return p.page_table != nullptr ? rotary_pages(p, p.k_cache)
                                 : rotary_rows(p, p.k_cache, p.max_seqlen * row, row, p.head_dim);
}
constexpr RowsTensor rotary_values(const RotaryAttentionParams& p) {
  return p.page_table != nullptr
             ? rotary_pages(p, p.v_cache)
             : rotary_rows(p, p.v, p.v_batch_stride, p.v_token_stride, p.v_head_stride);
}

// One query row per sequence over a cache, at most kSplitKvMaxGroup query heads per key/value head.
// Rows that belong to no sequence get zeros.
cudaError_t rotary_decode_split(const RotaryAttentionParams& p, CUstream_st* stream);
int64_t rotary_decode_workspace(const RotaryAttentionParams& p);  // bytes

// Likewise, in 16 bits with at most kClusterMaxGroup heads, on a device for which runs_sm90a()
// holds, by clusters of `blocks`; without a workspace, and the append is part of it. How many
// blocks the device has for a call: 0 if it cannot hold the clusters.
int64_t rotary_cluster_blocks(const RotaryAttentionParams& p);
cudaError_t rotary_decode_cluster(const RotaryAttentionParams& p, int64_t blocks,
                                  CUstream_st* stream);

}  // namespace mllama
