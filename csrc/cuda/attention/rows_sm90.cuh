// Rows of a tensor as tensor copies bring them into panel tiles (core_sm90.cuh).
#pragma once

#include "../common/tensor_map.h"
#include "core_sm90.cuh"

namespace mllama {

// A map whose copies bring one panel of `box_rows` rows each.
template <typename Layout>
cudaError_t make_rows_map(CUtensorMap& map, DType dtype, const RowsTensor& t, int64_t box_rows) {
  constexpr int64_t kDim = Layout::kChunks * Layout::kChunkElements;
  return make_tensor_map(map, dtype, t.base,
                         {{kDim, 1, kDim / Layout::kPanels},
                          {t.rows, t.row_stride, box_rows},
                          {t.heads, t.head_stride, 1},
                          {t.outer, t.outer_stride, 1}},
                         Layout::kPanelBytes == 128 ? Swizzle::k128 : Swizzle::k32);
}

// Starts the copy of one panel of a box to row `tile_row` of the tile.
template <typename Layout>
__device__ __forceinline__ void copy_panel(char* tile, int tile_row, int panel,
                                           const CUtensorMap& map, uint64_t* barrier, int row,
                                           int head, int outer) {
  tensor_copy(tile + panel * Layout::kPanelPitch + tile_row * Layout::kPanelBytes, &map, barrier,
              panel * Layout::kPanelChunks * Layout::kChunkElements, row, head, outer);
}

// Starts the copies of a whole tile that is one box; a lane for each panel. Rows outside the tensor
// arrive as zeros.
template <typename Layout>
__device__ __forceinline__ void copy_tile(char* tile, const CUtensorMap& map, uint64_t* barrier,
                                          int row, int head, int outer) {
  const int panel = threadIdx.x % kWarpSize;
  if (panel < Layout::kPanels) {
    copy_panel<Layout>(tile, 0, panel, map, barrier, row, head, outer);
  }
}

}  // namespace mllama
