// cross_attention: grouped-query attention from text rows to image tiles, with a mask per tile.
#pragma once

#include "common.h"

namespace mllama {

// Sequence b has rows [cu_seqlens[b], cu_seqlens[b + 1]) or, with cu_seqlens null, its own
// max_seqlen rows, the first at q + b * q_batch_stride. Its tile t is slot tile_table[b * tiles +
// t] of k and v, or slot b * tiles + t with tile_table null; a slot below 0 is absent. Row r
// (counted over all tokens) sees the tile if tile_mask[r * tile_mask_row_stride + t]; tile_mask
// null shows every present tile.
struct CrossAttentionParams {
  const void* q;  // (tokens, num_q_heads, head_dim), last dimension contiguous
  const void* k;  // (num_slots, tile_tokens, num_kv_heads, head_dim), last dim contiguous
  const void* v;  // like k
  const void* q_norm_weight;  // (head_dim,), or null: q is used as it is
  void* out;                  // (tokens, num_q_heads, head_dim), contiguous
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

}  // namespace mllama
