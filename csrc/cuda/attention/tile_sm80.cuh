// Tiles of query, key and value rows in shared memory, and the copies that fill them.
#pragma once

#include "../common/ptx.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "tile_size.h"

namespace mllama {

// Where 16-byte chunk `chunk` of row `row` lies in a tile.
template <typename T, int kHeadDim>
struct TileLayout {
  static constexpr int kChunkElements = Vec<T>::kSize;
  static constexpr int kChunks = kHeadDim / kChunkElements;
  static constexpr int kRowLanes = 8;  // what they copy of a row at a time lies in different banks
  static constexpr int kStride = attention_tile_stride(kHeadDim, sizeof(T));
  static constexpr bool kSwizzled = attention_tile_swizzled(kHeadDim, sizeof(T));

  __device__ static __forceinline__ int offset(int row, int chunk) {
    if constexpr (kSwizzled) chunk ^= row & 7;
    return row * kStride + chunk * 16;
  }
};

// Compile-time side of tile_size.h for one element type and head dim.
template <typename Element, int kHeadDimension, bool kHides = false>
struct AttentionConfig {
  using T = Element;
  using QueryLayout = TileLayout<T, kHeadDimension>;
  static constexpr int kHeadDim = kHeadDimension;
  static constexpr bool kHidesRows = kHides;
  static constexpr AttentionTile kTile = attention_tile(kHeadDim, sizeof(T), kHides);
  static constexpr int kBlockM = kTile.rows;
  static constexpr int kBlockN = kTile.keys;
  static constexpr int kWarps = kTile.warps;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRowsPerWarp = kBlockM / kWarps;
  static constexpr int kRowTiles = kRowsPerWarp / 16;  // m16 tiles per warp
  static constexpr int kSlots = 2 * kRowTiles;         // query rows per thread
  static constexpr int kKeyTiles = kBlockN / 8;        // n8 tiles of the scores
  static constexpr int kDimTiles = kHeadDim / 8;       // n8 tiles of the output
  static constexpr int kKeyRun = kBlockN / kWarps;     // key rows that one warp copies
  static constexpr int64_t kSharedBytes = attention_shared_bytes(kHeadDim, sizeof(T), kHides);
  static constexpr int kQueryRowsAhead = 1;  // loaded before the first is worked on: registers
  // Blocks per multiprocessor: the registers of sm_80 (65536) and its shared memory (164 KB) allow
  // two.
  static constexpr int kMinBlocks = 2;
  static_assert(kHeadDim % 16 == 0 && kBlockM % (16 * kWarps) == 0 && 16 % kKeyRun == 0);

  // The thread's query row `slot` within the block: the accumulator layout of m16n8 products.
  __device__ static __forceinline__ int row_of_slot(int slot) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    return warp * kRowsPerWarp + slot / 2 * 16 + slot % 2 * 8 + lane / 4;
  }
  // Its columns in every n8 tile: first_column() and the next.
  __device__ static __forceinline__ int first_column() { return threadIdx.x % 4 * 2; }
};

// Consecutive rows in global memory: row i at base + i * stride (elements) for i < count. Rows from
// `count` on read as zero, and nothing is read from memory for them, wherever their addresses
// point.
template <typename T>
struct RowRun {
  const T* base;
  int64_t stride;
  int count;
};

// One warp copies kRun rows into rows first_row.. of a tile, eight lanes to a row, so that every
// quarter-warp fills 128 bytes without bank conflicts.
template <int kRun, typename T, int kHeadDim>
__device__ __forceinline__ void copy_run_async(uint32_t tile, int first_row, const RowRun<T>& run) {
  using Layout = TileLayout<T, kHeadDim>;
  const int lane = threadIdx.x % kWarpSize;
  const T* source = run.base + lane / 8 * run.stride + lane % 8 * Layout::kChunkElements;
#pragma unroll
  for (int i = 0; i < kRun; i += 4, source += 4 * run.stride) {
    const int row = i + lane / 8;
#pragma unroll
    for (int c = 0; c + 8 <= Layout::kChunks; c += 8) {
      cp_async_16(tile + Layout::offset(first_row + row, c + lane % 8),
                  source + c * Layout::kChunkElements, row < run.count);
    }
  }
  constexpr int kTail = Layout::kChunks % 8;  // head dim 80: 10 chunks of 16 bits, 20 of 32
  if constexpr (kTail != 0) {
    static_assert(kTail * kRun <= kWarpSize, "the rest of the rows must be a chunk per lane");
    // With rows of 176 bytes, rows of equal parity end on distinct bank groups.
    const int row = kTail == 2 ? lane / 16 * 8 + lane / 8 % 2 + lane / 2 % 4 * 2 : lane / kTail;
    const int chunk = Layout::kChunks - kTail + lane % kTail;
    if (row < kRun) {
      cp_async_16(tile + Layout::offset(first_row + row, chunk),
                  run.base + row * run.stride + chunk * Layout::kChunkElements, row < run.count);
    }
  }
}

}  // namespace mllama
