// What cross_attention.cu can call. Every stream is that of the current device.
#pragma once

#include <cuda_runtime.h>

#include "../../cross_attention.h"
#include "../common/tensor_map_dims.h"

namespace mllama {

// Gives all rows what rows of no sequence get; the prefills leave those alone.
cudaError_t cross_fill_no_sequence(const CrossAttentionParams& p, CUstream_st* stream);

// Fewer tiles than kMaxTiles, of at most kMaxTileTokens tokens: blocks of keys are numbered segment
// << kSubBits | block of the tile.
constexpr int kSubBits = 16;
constexpr int64_t kMaxTiles = int64_t{1} << (31 - kSubBits);
constexpr int64_t kMaxTileTokens = int64_t{16} << kSubBits;  // at the smallest key block
cudaError_t cross_prefill_sm80(const CrossAttentionParams& p, CUstream_st* stream);

// 16 bits, on a device for which runs_sm90a() holds, tiles that tensor maps can describe and as
// many as fit into shared memory beside the operands.
constexpr int64_t kMaxSm90Tiles = 128;
cudaError_t cross_prefill_sm90(const CrossAttentionParams& p, CUstream_st* stream);

constexpr RowsTensor tile_keys(const CrossAttentionParams& p) {
  return {p.k,         p.tile_tokens,  p.k_token_stride, p.num_kv_heads, p.k_head_stride,
          p.num_slots, p.k_slot_stride};
}
constexpr RowsTensor tile_values(const CrossAttentionParams& p) {
  return {p.v,         p.tile_tokens,  p.v_token_stride, p.num_kv_heads, p.v_head_stride,
          p.num_slots, p.v_slot_stride};
}

// Blocks of a cluster that share the tiles of the same rows: one per tile, or 1. A block takes a
// multiprocessor for itself, so `blocks` run in rounds as long as their tiles, or as one tile and,
// for what the cluster does to share, at most one tile more.
constexpr int cross_sm90_cluster(int64_t blocks, int64_t tiles, int64_t multiprocessors) {
  if (tiles < 2 || tiles > 8) return 1;  // clusters of 8 run everywhere
  const int64_t together = ceil_div(blocks, multiprocessors) * tiles;
  return ceil_div(blocks * tiles, multiprocessors) < together ? static_cast<int>(tiles) : 1;
}

// One query row per sequence, at most kSplitKvMaxGroup query heads per key/value head, no lse. Rows
// that belong to no sequence get zeros.
cudaError_t cross_decode_split(const CrossAttentionParams& p, CUstream_st* stream);
int64_t cross_decode_workspace(const CrossAttentionParams& p);  // bytes

// Likewise, in 16 bits with at most kClusterMaxGroup heads and kClusterMaxTiles tiles, on a device
// for which runs_sm90a() holds, by clusters of `blocks`; without a workspace. How many blocks the
// device has for a call: 0 if it cannot hold the clusters.
int64_t cross_cluster_blocks(const CrossAttentionParams& p);
cudaError_t cross_decode_cluster(const CrossAttentionParams& p, int64_t blocks,
                                 CUstream_st* stream);

}  // namespace mllama
