// vision_attention for sm_90a.
#pragma once

#include "../vision_attention.h"
#include "tensor_map_dims.h"

namespace mllama {

constexpr RowsTensor vision_rows(const VisionAttentionParams& p, const void* base,
                                 int64_t batch_stride, int64_t token_stride, int64_t head_stride) {
  return {base, p.seqlen, token_stride, p.num_heads, head_stride, p.batch, batch_stride};
}
constexpr RowsTensor vision_queries(const VisionAttentionParams& p) {
  return vision_rows(p, p.q, p.q_batch_stride, p.q_token_stride, p.q_head_stride);
}
constexpr RowsTensor vision_keys(const VisionAttentionParams& p) {
  return vision_rows(p, p.k, p.k_batch_stride, p.k_token_stride, p.k_head_stride);
}
constexpr RowsTensor vision_values(const VisionAttentionParams& p) {
  return vision_rows(p, p.v, p.v_batch_stride, p.v_token_stride, p.v_head_stride);
}

// Whether it takes a call on a device for which runs_sm90a() holds: 16-bit elements, and tensors
// that maps can describe.
constexpr bool uses_vision_sm90(const VisionAttentionParams& p) {
  return element_size(p.dtype) == 2 && vision_queries(p).mappable(p.head_dim, 2) &&
         vision_keys(p).mappable(p.head_dim, 2) && vision_values(p).mappable(p.head_dim, 2);
}

// Returns a cudaError_t.
int vision_attention_sm90(const VisionAttentionParams& p, CUstream_st* stream);

}  // namespace mllama
