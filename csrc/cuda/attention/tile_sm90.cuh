// Tiles of the sm_90a attention core (core_sm90.cuh): where their elements lie in shared
// memory, and which of them a thread has.
#pragma once

#include <cuda_runtime.h>

#include "../common/reduce.cuh"
#include "tile_size.h"

namespace mllama {

// Where 16-byte chunk `chunk` of row `row` lies in a tile of kRows rows: in panels of kPanelBytes a
// row, swizzled like the tensor copies and products. Rows of ordinary accesses hit distinct bank
// groups.
template <typename T, int kHeadDim, int kRows>
struct PanelLayout {
  static constexpr int kChunkElements = 16 / sizeof(T);
  static constexpr int kChunks = kHeadDim / kChunkElements;
  static constexpr int kPanelBytes = attention_sm90_panel_bytes(kHeadDim);
  static constexpr int kPanelChunks = kPanelBytes / 16;
  static constexpr int kPanels = kChunks / kPanelChunks;
  // Lanes to a row in a copy, so that what 8 of them copy at a time lies in different banks.
  static constexpr int kRowLanes = kPanelChunks;
  static constexpr int kPanelPitch = kRows * kPanelBytes;
  static constexpr int kBytes = kPanels * kPanelPitch;
  static_assert(kPanelPitch % (8 * kPanelBytes) == 0, "panels must start where a pattern starts");

  __device__ static __forceinline__ int offset(int row, int chunk) {
    const int pattern = row * kPanelBytes / 128 % kPanelChunks;
    return chunk / kPanelChunks * kPanelPitch + row * kPanelBytes +
           ((chunk % kPanelChunks) ^ pattern) * 16;
  }
};

// Compile-time side of tile_size.h. The 8 computing warps come first: rows and slots
// are as in AttentionConfig, and so are the names that queries and masks use.
template <typename Element, int kHeadDimension, int kRows, int kKeys>
struct AttentionSm90Config {
  using T = Element;
  using QueryLayout = PanelLayout<T, kHeadDimension, kRows>;
  using KeyLayout = PanelLayout<T, kHeadDimension, kKeys>;
  static constexpr int kHeadDim = kHeadDimension;
  static constexpr int kBlockM = kRows;
  static constexpr int kBlockN = kKeys;
  static constexpr int kWarpgroups = 2;  // that compute
  static constexpr int kWarps = 4 * kWarpgroups;
  static constexpr int kThreads = (kWarps + 4) * kWarpSize;
  static constexpr int kRowsPerWarp = 16;
  static constexpr int kSlots = 2;               // query rows per thread
  static constexpr int kQueryRowsAhead = 4;      // all that a thread loads
  static constexpr int kKeyTiles = kBlockN / 8;  // n8 tiles of the scores
  static constexpr int kDimTiles = kHeadDim / 8;
  // 65536 registers for 128 threads that copy and 256 that compute.
  static constexpr int kCopyRegisters = 40, kComputeRegisters = 232;
  static_assert(kBlockM == kWarps * kRowsPerWarp && kBlockN % 16 == 0 && sizeof(T) == 2);

  __device__ static __forceinline__ int row_of_slot(int slot) {
    return static_cast<int>(threadIdx.x) / kWarpSize * kRowsPerWarp + slot * 8 +
           static_cast<int>(threadIdx.x) % kWarpSize / 4;
  }
  __device__ static __forceinline__ int first_column() { return threadIdx.x % 4 * 2; }
};

}  // namespace mllama
