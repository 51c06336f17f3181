// How a product with few rows of x walks over its weight: the share of a block, cut into slabs of
// one or more tiles of 16 rows x 512 columns. Copies and products count through the slabs in the
// same order, each on its own.
#pragma once

#include <cuda_runtime.h>

#include "slab.h"

namespace mllama {

// The columns of out that a block makes. A tile is the rows of the weight for 16 columns or, with
// swiglu, the gate rows for 8 columns and their up rows: one half each. The tiles of a pass over k
// share what is read of x. Params: those of an op, with n, k and swiglu.
template <typename Params>
struct WeightShare {
  const Params& p;
  int first_column, columns, tiles, pass_tiles;

  __device__ __forceinline__ WeightShare(const Params& params, int max_pass_tiles) : p(params) {
    const int64_t eights = (p.n + kHalfRows - 1) / kHalfRows;
    first_column = static_cast<int>(eights * blockIdx.x / gridDim.x) * kHalfRows;
    const int end = static_cast<int>(eights * (blockIdx.x + 1) / gridDim.x) * kHalfRows;
    columns = min(end, static_cast<int>(p.n)) - first_column;
    tiles = (columns + tile_columns() - 1) / tile_columns();
    const int passes = (tiles + max_pass_tiles - 1) / max_pass_tiles;
    pass_tiles = (tiles + passes - 1) / passes;
  }

  __device__ __forceinline__ int tile_columns() const { return p.swiglu ? kHalfRows : kSlabRows; }
  // Columns of a tile from its first to the last of the block.
  __device__ __forceinline__ int columns_from(int tile) const {
    return columns - tile * tile_columns();
  }
  __device__ __forceinline__ int halves(int tile) const {
    return p.swiglu || columns_from(tile) > kHalfRows ? 2 : 1;
  }
  // First row of a tile's half in the weight.
  __device__ __forceinline__ int row(int tile, int half) const {
    return first_column + tile * tile_columns() +
           half * (p.swiglu ? static_cast<int>(p.n) : kHalfRows);
  }

  __device__ __forceinline__ int depth() const { return static_cast<int>(p.k); }
  // k is taken in chunks of a slab's depth.
  __device__ __forceinline__ int chunks() const { return (depth() + kSlabDepth - 1) / kSlabDepth; }
};

// Which slab comes next; slabs have up to kSlabTiles tiles of a pass.
template <int kSlabTiles>
struct SlabCursor {
  int first_tile = 0;  // of the pass
  int chunk = 0, tile = 0;

  template <typename Share>
  __device__ __forceinline__ bool done(const Share& share) const {
    return first_tile >= share.tiles;
  }
  // Behind the last tile of the pass.
  template <typename Share>
  __device__ __forceinline__ int pass_end(const Share& share) const {
    return min(first_tile + share.pass_tiles, share.tiles);
  }
  template <typename Share>
  __device__ __forceinline__ void advance(const Share& share) {
    tile += kSlabTiles;
    if (tile < pass_end(share)) return;
    if (++chunk == share.chunks()) {
      chunk = 0;
      first_tile += share.pass_tiles;
    }
    tile = first_tile;
  }
};

}  // namespace mllama
