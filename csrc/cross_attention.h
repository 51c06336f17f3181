// cross_attention: grouped-query attention from text rows to image tiles, with a mask per tile.
#pragma once

#include "common.h"

namespace mllama {

// Sequence b has rows [cu_seqlens[b], cu_seqlens[b + 1]), of which those beyond max_seqlen (on
// CUDA; on CPU the caller has checked) are of no sequence, or, with cu_seqlens null, its own
// max_seqlen rows, the first at q + b * q_batch_stride. Its tile t is slot tile_table[b * tiles +
// t] of k and v, or slot b * tiles + t with tile_table null; a slot below 0 is absent. Row r
// (counted over all tokens) sees the tile if tile_mask[r * tile_mask_row_stride + t]; tile_mask
// null shows every present tile. A row that sees no key, and a row of no sequence, gives zeros.
struct CrossAttentionParams {
  const void* q;  // (tokens, num_q_heads, head_dim), last dimension contiguous
  const void* k;  // (num_slots, tile_tokens, num_kv_heads, head_dim), last dim contiguous
  const void* v;  // like k
  const void* q_norm_weight;  // (head_dim,), or null: q is used as it is
  void* out;                  // (tokens, num_q_heads, head_dim), contiguous
  // log sum exp(softmax_scale * score) over the keys that a query sees, +infinity where it sees
  // none and for rows of no sequence; (batch, num_q_heads, max_seqlen) or, with cu_seqlens,
  // (num_q_heads, tokens); contiguous, float32 (float64 for float64). Null: not wanted. Every
  // implementation writes it, decoding included.
  void* lse;
  const bool* tile_mask;      // (tokens, tiles), or null
  const int32_t* tile_table;  // (batch, tiles) contiguous, or null
  const int32_t* cu_seqlens;  // (batch + 1,), or null: max_seqlen rows each
  void* workspace;            // cross_attention_workspace() bytes
  int64_t tokens, batch, max_seqlen;
  int64_t tiles, num_slots, tile_tokens;
  int64_t num_q_heads, num_kv_heads, head_dim;
  int64_t q_batch_stride, q_token_stride, q_head_stride;
  int64_t k_slot_stride, k_token_stride, k_head_stride;
  int64_t v_slot_stride, v_token_stride, v_head_stride;
  int64_t tile_mask_row_stride;
  double eps, softmax_scale;
  DType dtype;
};

void cross_attention_cpu(const CrossAttentionParams& p);
int cross_attention_cuda(const CrossAttentionParams& p, CUstream_st* stream);
// Bytes of device scratch the CUDA launch needs: a function of shapes alone, never of lengths.
int64_t cross_attention_workspace(const CrossAttentionParams& p);

// The call whose gradients are wanted: out and lse are what it gave and are read, workspace has
// cross_attention_backward_workspace() bytes. A slot named several times sums its parts in the
// order of tile_table. Every element of the gradients is written: zeros for slots and tiles that no
// row sees and for rows that see nothing, whatever these hold.
struct CrossAttentionBackwardParams : CrossAttentionParams {
  const void* grad_out;      // (tokens, num_q_heads, head_dim), last dimension contiguous
  void* grad_q;              // (tokens, num_q_heads, head_dim), contiguous; before the norm
  void* grad_k;              // (num_slots, tile_tokens, num_kv_heads, head_dim), contiguous
  void* grad_v;              // like grad_k
  void* grad_q_norm_weight;  // (head_dim,); null without q_norm_weight
  int64_t grad_out_batch_stride, grad_out_token_stride, grad_out_head_stride;
};

void cross_attention_backward_cpu(const CrossAttentionBackwardParams& p);
int cross_attention_backward_cuda(const CrossAttentionBackwardParams& p, CUstream_st* stream);
int64_t cross_attention_backward_workspace(const CrossAttentionBackwardParams& p);

}  // namespace mllama
