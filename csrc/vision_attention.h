// vision_attention: non-causal attention in which only (padding query, padding key) pairs are
// masked.
#pragma once

#include "common.h"

namespace mllama {

struct VisionAttentionParams {
  const void* q;        // (batch, seqlen, num_heads, head_dim), last dimension contiguous
  const void* k;        // like q
  const void* v;        // like q
  const bool* padding;  // (batch, seqlen), rows contiguous; or null: no padding
  void* out;            // (batch, seqlen, num_heads, head_dim), contiguous
  int64_t batch, seqlen, num_heads, head_dim;
  int64_t q_batch_stride, q_token_stride, q_head_stride;
  int64_t k_batch_stride, k_token_stride, k_head_stride;
  int64_t v_batch_stride, v_token_stride, v_head_stride;
  int64_t padding_batch_stride;
  double softmax_scale;
  DType dtype;
};

void vision_attention_cpu(const VisionAttentionParams& p);
int vision_attention_cuda(const VisionAttentionParams& p, CUstream_st* stream);

}  // namespace mllama
