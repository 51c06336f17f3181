// The prefill of rotary_attention for sm_90a.
#pragma once

#include "../rotary_attention.h"
#include "tensor_map_dims.h"

namespace mllama {

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

// Whether it takes a call on a device for which runs_sm90a() holds: 16-bit elements, and tensors
// that maps can describe.
constexpr bool uses_rotary_sm90(const RotaryAttentionParams& p) {
  return element_size(p.dtype) == 2 && rotary_keys(p).mappable(p.head_dim, 2) &&
         rotary_values(p).mappable(p.head_dim, 2);
}

// Attention alone, over keys that have been rotated and appended already. Returns a cudaError_t.
int rotary_attention_sm90(const RotaryAttentionParams& p, CUstream_st* stream);

}  // namespace mllama
