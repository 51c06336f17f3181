// rotary_attention and rotary_attention_cached: causal grouped-query attention with RoPE on q and
// k.
#pragma once

#include "common.h"

namespace mllama {

// Sequence b has rows [cu_seqlens[b], cu_seqlens[b + 1]), of which those beyond max_seqlen (on
// CUDA; on CPU the caller has checked) are of no sequence, or, with cu_seqlens null, its own
// max_seqlen rows. The first row of sequence b in q is q + cu_seqlens[b] * q_token_stride or, with
// cu_seqlens null, q + b * q_batch_stride; likewise for k and v. Row i of sequence b attends to
// positions 0 .. cache_lens[b] + i, with cache_lens null meaning 0. Rows of no sequence give zeros.
struct RotaryAttentionParams {
  const void* q;    // (tokens, num_q_heads, head_dim), last dimension contiguous
  const void* k;    // (tokens, num_kv_heads, head_dim), last dimension contiguous; not yet rotated
  const void* v;    // (tokens, num_kv_heads, head_dim), last dimension contiguous
  const void* cos;  // (cos_rows, head_dim / 2); token t uses row t % cos_rows
  const void* sin;  // like cos
  void* out;        // (tokens, num_q_heads, head_dim), contiguous
  // log sum exp(softmax_scale * score) over the keys that a query sees, +infinity for rows of no
  // sequence; (batch, num_q_heads, max_seqlen) or, with cu_seqlens, (num_q_heads, tokens);
  // contiguous, float32 (float64 for float64). Null: not wanted, as always when paged. Every
  // implementation writes it.
  void* lse;
  // Paged: the caches, (num_pages, num_kv_heads, page_size, head_dim) contiguous, appended to
  // first. Not paged: k_cache is scratch for the rotated keys, (tokens, num_kv_heads, head_dim)
  // contiguous, and v_cache is null: values are read from v.
  void* k_cache;
  void* v_cache;
  const int32_t* page_table;  // (batch, max_pages), or null: not paged
  const int32_t* cu_seqlens;  // (batch + 1,), or null: max_seqlen rows each
  const int32_t* cache_lens;  // (batch,), or null
  void* workspace;            // rotary_attention_workspace() bytes
  int64_t tokens, batch, max_seqlen;
  int64_t num_q_heads, num_kv_heads, head_dim;
  int64_t num_pages, page_size, max_pages;  // 0 when not paged
  int64_t q_batch_stride, q_token_stride, q_head_stride;
  int64_t k_batch_stride, k_token_stride, k_head_stride;
  int64_t v_batch_stride, v_token_stride, v_head_stride;
  int64_t cos_rows, cos_row_stride, sin_row_stride;
  double softmax_scale;
  bool interleaved;
  DType dtype;
};

void rotary_attention_cpu(const RotaryAttentionParams& p);
int rotary_attention_cuda(const RotaryAttentionParams& p, CUstream_st* stream);
// Bytes of device scratch the CUDA launch needs: a function of shapes alone, never of lengths.
int64_t rotary_attention_workspace(const RotaryAttentionParams& p);

// The call whose gradients are wanted, not paged: out and lse are what it gave and are read,
// k_cache is scratch for the rotated keys again, workspace has
// rotary_attention_backward_workspace() bytes. Rows of no sequence get zero gradients; every
// element of the gradients is written.
struct RotaryAttentionBackwardParams : RotaryAttentionParams {
  const void* grad_out;  // (tokens, num_q_heads, head_dim), last dimension contiguous
  void* grad_q;          // (tokens, num_q_heads, head_dim), contiguous
  void* grad_k;          // (tokens, num_kv_heads, head_dim), contiguous; of the keys as given
  void* grad_v;          // (tokens, num_kv_heads, head_dim), contiguous
  int64_t grad_out_batch_stride, grad_out_token_stride, grad_out_head_stride;
};

void rotary_attention_backward_cpu(const RotaryAttentionBackwardParams& p);
int rotary_attention_backward_cuda(const RotaryAttentionBackwardParams& p, CUstream_st* stream);
int64_t rotary_attention_backward_workspace(const RotaryAttentionBackwardParams& p);

}  // namespace mllama
