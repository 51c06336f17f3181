// How skinny_linear walks over the weight: the share of a block, cut into slabs of 16 rows x 512
// elements. Copies and products count through the slabs in the same order, each on its own.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace mllama {

// A slab in shared memory: two halves of eight rows each; in a half, for each warp, its 64 elements
// of the eight rows, 128 bytes per row, the 16-byte chunks of row r exchanged by r (128-byte
// swizzle).
constexpr int kHalfRows = kSlabRows / 2;  // a slab's are of one m16n8k16 product
constexpr int kSlabWarps = 8;
constexpr int kSlabThreads = kSlabWarps * 32;
static_assert(kSlabDepth == kSlabWarps * kWarpDepth);
constexpr int kWarpBytes = kHalfRows * kWarpDepth * 2;
constexpr int kHalfBytes = kSlabWarps * kWarpBytes;
constexpr int kSlabBytes = 2 * kHalfBytes;

// Byte of 16-byte chunk `chunk` of row `row` among a warp's in a half.
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * (kWarpDepth * 2) + (chunk ^ row) * 16;
}

// Blocks share the columns of out in eights.
constexpr int64_t slab_blocks(const SkinnyLinearParams& p, int multiprocessors) {
  return std::min<int64_t>(ceil_div<int64_t>(p.n, kHalfRows), multiprocessors);
}

// The columns of out that a block makes. A tile is the rows of the weight for 16 columns or, with
// swiglu, the gate rows for 8 columns and their up rows: one half each. The tiles of a pass over k
// share what is read of x.
struct WeightShare {
  const SkinnyLinearParams& p;
  int first_column, columns, tiles, pass_tiles;

  __device__ __forceinline__ WeightShare(const SkinnyLinearParams& params, int max_pass_tiles)
      : p(params) {
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

// Which slab comes next.
struct SlabCursor {
  int first_tile = 0;  // of the pass
  int chunk = 0, tile = 0;

  __device__ __forceinline__ bool done(const WeightShare& share) const {
    return first_tile >= share.tiles;
  }
  __device__ __forceinline__ void advance(const WeightShare& share) {
    if (++tile < min(first_tile + share.pass_tiles, share.tiles)) return;
    if (++chunk == share.chunks()) {
      chunk = 0;
      first_tile += share.pass_tiles;
    }
    tile = first_tile;
  }
};

}  // namespace mllama
