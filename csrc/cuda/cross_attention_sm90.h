// The prefill of cross_attention for sm_90a.
#pragma once

#include "../cross_attention.h"
#include "tensor_map_dims.h"

namespace mllama {

// Tiles of a sequence that fit into shared memory beside the operands.
constexpr int64_t kMaxSm90Tiles = 128;

constexpr RowsTensor tile_keys(const CrossAttentionParams& p) {
  return {p.k,         p.tile_tokens,  p.k_token_stride, p.num_kv_heads, p.k_head_stride,
          p.num_slots, p.k_slot_stride};
}
constexpr RowsTensor tile_values(const CrossAttentionParams& p) {
  return {p.v,         p.tile_tokens,  p.v_token_stride, p.num_kv_heads, p.v_head_stride,
          p.num_slots, p.v_slot_stride};
}

// Whether it takes a call on a device for which runs_sm90a() holds: 16-bit elements, and tiles that
// tensor maps can describe.
constexpr bool uses_cross_sm90(const CrossAttentionParams& p) {
  return element_size(p.dtype) == 2 && p.tiles <= kMaxSm90Tiles &&
         tile_keys(p).mappable(p.head_dim, 2) && tile_values(p).mappable(p.head_dim, 2);
}

// Blocks of a cluster that share the tiles of the same rows: one per tile, or 1. A block takes a
// multiprocessor for itself, so `blocks` run in rounds as long as their tiles, or as one tile and,
// for what the cluster does to share, at most one tile more.
constexpr int cross_sm90_cluster(int64_t blocks, int64_t tiles, int64_t multiprocessors) {
  if (tiles < 2 || tiles > 8) return 1;  // clusters of 8 run everywhere
  const int64_t together = ceil_div(blocks, multiprocessors) * tiles;
  return ceil_div(blocks * tiles, multiprocessors) < together ? static_cast<int>(tiles) : 1;
}

// Rows of no sequence are left alone. Returns a cudaError_t.
int cross_attention_sm90(const CrossAttentionParams& p, CUstream_st* stream);

}  // namespace mllama
