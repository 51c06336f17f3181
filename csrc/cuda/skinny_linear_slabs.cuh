// How skinny_linear walks over the weight: the share of a block, cut into slabs of 16 rows x 512
// elements. Copies and products count through the slabs in the same order, each on its own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../skinny_linear.h"

namespace mllama {

constexpr int kSlabRows = 16;   // of one m16n8k16 product
constexpr int kSlabWarps = 8;   // share the elements of a slab
constexpr int kWarpDepth = 64;  // elements of each row that a warp takes
constexpr int kSlabDepth = kSlabWarps * kWarpDepth;
// In shared memory. 64 bytes more than a multiple of 128: eight lanes reading 16 bytes each, four
// from one row and four from the next, meet all banks once.
constexpr int kSlabRowBytes = kSlabDepth * 2 + 64;
constexpr int kSlabBytes = kSlabRows * kSlabRowBytes;
static_assert(kSlabRowBytes % 128 == 64);

// The columns of out that a block makes. A tile is the 16 rows of the weight for 16 columns, or,
// with swiglu, the gate rows for 8 columns followed by their up rows. Up to kMaxPassTiles tiles are
// one pass over k, so that x is read once for all of them.
struct WeightShare {
  const SkinnyLinearParams& p;
  int64_t first_column;
  int columns, tiles, pass_tiles;

  __device__ __forceinline__ WeightShare(const SkinnyLinearParams& params, int max_pass_tiles)
      : p(params) {
    // Contiguous, and equal to within one column.
    first_column = p.n * blockIdx.x / gridDim.x;
    columns = static_cast<int>(p.n * (blockIdx.x + 1) / gridDim.x - first_column);
    tiles = (columns + tile_columns() - 1) / tile_columns();
    const int passes = (tiles + max_pass_tiles - 1) / max_pass_tiles;
    pass_tiles = (tiles + passes - 1) / passes;
  }

  __device__ __forceinline__ int tile_columns() const {
    return p.swiglu ? kSlabRows / 2 : kSlabRows;
  }
  // Columns of a tile, fewer than tile_columns() in the last one.
  __device__ __forceinline__ int columns_of(int tile) const {
    return min(tile_columns(), columns - tile * tile_columns());
  }
  __device__ __forceinline__ int depth() const { return static_cast<int>(p.k); }
  // k is taken in chunks of a slab's depth.
  __device__ __forceinline__ int chunks() const { return (depth() + kSlabDepth - 1) / kSlabDepth; }
};

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

  // Row `row` (0 to 15) of the slab; `valid` is false behind the last column.
  __device__ __forceinline__ const char* row(const WeightShare& share, int row, bool& valid) const {
    const int tile_columns = share.tile_columns(), column = row & (tile_columns - 1);
    valid = column < share.columns_of(tile);
    const int64_t weight_row =
        share.first_column + tile * tile_columns + column + (row < tile_columns ? 0 : share.p.n);
    return static_cast<const char*>(share.p.weight) +
           (weight_row * share.p.weight_row_stride + chunk * kSlabDepth) * 2;
  }
  __device__ __forceinline__ int rows(const WeightShare& share) const {
    return share.columns_of(tile) * (kSlabRows / share.tile_columns());
  }
  // Bytes of each row of the slab.
  __device__ __forceinline__ int row_bytes(const WeightShare& share) const {
    return min(kSlabDepth, share.depth() - chunk * kSlabDepth) * 2;
  }
};

}  // namespace mllama
