// The prefill of cross_attention for sm_90a.
#pragma once

#include "../cross_attention.h"

namespace mllama {

// Tiles of a sequence that fit into shared memory beside the operands.
constexpr int64_t kMaxSm90Tiles = 128;

// Whether it takes a call on a device for which runs_sm90a() holds. It needs 16-bit elements, and
// tiles that tensor maps can describe: some, and no two at the same place.
constexpr bool uses_cross_sm90(const CrossAttentionParams& p) {
  const auto mappable = [](int64_t size, int64_t stride) {
    return size == 1 || (stride > 0 && stride < int64_t{1} << 39);
  };
  return element_size(p.dtype) == 2 && p.tiles <= kMaxSm90Tiles && p.num_slots > 0 &&
         p.tile_tokens > 0 && mappable(p.num_slots, p.k_slot_stride) &&
         mappable(p.num_slots, p.v_slot_stride) && mappable(p.tile_tokens, p.k_token_stride) &&
         mappable(p.tile_tokens, p.v_token_stride) && mappable(p.num_kv_heads, p.k_head_stride) &&
         mappable(p.num_kv_heads, p.v_head_stride);
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
