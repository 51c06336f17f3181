// What vision_attention.cu can call. Every stream is that of the current device.
#pragma once

#include <cuda_runtime.h>

#include "../../vision_attention.h"
#include "../common/tensor_map_dims.h"

namespace mllama {

// Any call.
cudaError_t vision_dense_sm80(const VisionAttentionParams& p, CUstream_st* stream);
// 16 bits, on a device for which runs_sm90a() holds, tensors that maps can describe.
cudaError_t vision_dense_sm90(const VisionAttentionParams& p, CUstream_st* stream);

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

}  // namespace mllama
