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
  // log sum exp(softmax_scale * score) over the keys that a query sees, +infinity where it sees
  // none; (batch, num_heads, seqlen) contiguous, float32 (float64 for float64). Null: not wanted.
  // Every implementation writes it.
  void* lse;
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

// The call whose gradients are wanted: out and lse are what it gave and are read. Every element of
// the gradients is written: zeros for queries that see nothing and keys that nothing sees.
struct VisionAttentionBackwardParams : VisionAttentionParams {
  const void* grad_out;  // (batch, seqlen, num_heads, head_dim), last dimension contiguous
  void* grad_q;          // (batch, seqlen, num_heads, head_dim), contiguous
  void* grad_k;          // like grad_q
  void* grad_v;          // like grad_q
  void* workspace;       // vision_attention_backward_workspace() bytes
  int64_t grad_out_batch_stride, grad_out_token_stride, grad_out_head_stride;
};

void vision_attention_backward_cpu(const VisionAttentionBackwardParams& p);
int vision_attention_backward_cuda(const VisionAttentionBackwardParams& p, CUstream_st* stream);
// Bytes of device scratch the CUDA launch needs: a function of shapes alone.
int64_t vision_attention_backward_workspace(const VisionAttentionBackwardParams& p);

}  // namespace mllama
