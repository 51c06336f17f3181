// The product of scores on sm_90a, forward and backward.
#pragma once

#include "../common/reduce.cuh"
#include "../common/wgmma.cuh"

namespace mllama {

// Issues scores = rows * columns, transposed, for the 64 rows of a warpgroup that start at shared
// address `rows`; the columns are the rows of the tile at `columns`. Both in panels (PanelLayout).
template <typename Config, typename RowLayout, typename ColumnLayout>
__device__ __forceinline__ void issue_scores(float (&scores)[Config::kBlockN / 8][4], uint32_t rows,
                                             uint32_t columns) {
  using Product = Wgmma<typename Config::T, Config::kBlockN>;
  constexpr int kSpan = RowLayout::kPanelBytes, kPanelSteps = kSpan / 32;  // of 16 elements
  const uint64_t row_tile = wgmma_descriptor_k<kSpan>(rows);
  const uint64_t column_tile = wgmma_descriptor_k<kSpan>(columns);
#pragma unroll
  for (int step = 0; step < Config::kHeadDim / 16; ++step) {
    const int panel = step / kPanelSteps, inside = step % kPanelSteps * 32;
    const uint64_t a = row_tile + wgmma_step(panel * RowLayout::kPanelPitch + inside);
    const uint64_t b = column_tile + wgmma_step(panel * ColumnLayout::kPanelPitch + inside);
    if (step == 0) {
      Product::template ss<WgmmaMajor::kK, false>(scores, a, b);
    } else {
      Product::template ss<WgmmaMajor::kK, true>(scores, a, b);
    }
  }
  wgmma_commit();
}

}  // namespace mllama
