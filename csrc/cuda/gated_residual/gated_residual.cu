// out = residual + tanh(gate) * row_mask * x, the residual branch of Mllama's cross-attention
// layers.
//
// Tiling     Elementwise over 16-byte vectors (row_tiles.cuh). The gate is read from device memory
//            by every thread, so the launch needs no synchronisation.
// Precision  tanh, product and sum each rounded to the dtype, as a chain of PyTorch operators.
// Traffic    3 * rows * dim elements, 2 for hidden rows, whose x is not read. 2048 x 4096 bf16:
//            50 MB, 11.7 us at 4.3 TB/s.
// Launch     On Hopper before the previous kernel has ended (sm90.cuh: the rule).
// Aliasing   out may be x or residual. Input rows may be strided and of any alignment.

#include "../../gated_residual.h"
#include "../common/alignment.h"
#include "../common/device.h"
#include "../common/dispatch.cuh"
#include "../common/launch.h"
#include "../common/row_tiles.cuh"
#include "../common/sm90.cuh"
#include "../common/vec_math.cuh"

namespace mllama {
namespace {

template <typename T, bool kVectorized>
__global__ void __launch_bounds__(RowTiles::kThreads)
    gated_residual_kernel(const GatedResidualParams p) {
  constexpr int kVecs = RowTiles::kVecsPerThread;
  wait_for_previous_kernel();
  start_next_kernel();
  const int64_t row = tile_row();
  if (row >= p.rows) return;
  const bool visible = p.row_mask == nullptr || p.row_mask[row];
  const T* x_row = static_cast<const T*>(p.x) + row * p.x_row_stride;
  const T* residual_row = static_cast<const T*>(p.residual) + row * p.residual_row_stride;
  Vec<T> x[kVecs], residual[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    x[i] = load_tile<kVectorized>(x_row, tile_element<T>(i), visible ? p.dim : 0);
    residual[i] = load_tile<kVectorized>(residual_row, tile_element<T>(i), p.dim);
  }
  const Vec<T> gate = filled_vec<T>(tanh_gate<T>(p.gate));
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    store_tile<kVectorized>(static_cast<T*>(p.out) + row * p.dim, tile_element<T>(i), p.dim,
                            add(residual[i], multiply(gate, x[i])));
  }
}

}  // namespace

int gated_residual_cuda(const GatedResidualParams& p, CUstream_st* stream) {
  if (p.rows == 0 || p.dim == 0) return cudaSuccess;
  return dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t vecs = ceil_div<int64_t>(p.dim, Vec<T>::kSize);
    if (!RowTiles::fits(p.rows, vecs)) return cudaErrorInvalidValue;
    const bool vectorized =
        p.dim % Vec<T>::kSize == 0 && is_aligned16(p.x, p.rows > 1 ? p.x_row_stride : 0, p.dtype) &&
        is_aligned16(p.residual, p.rows > 1 ? p.residual_row_stride : 0, p.dtype) &&
        is_aligned16(p.out, 0, p.dtype);
    const RowTiles tiles(p.rows, vecs);
    return launch(vectorized ? gated_residual_kernel<T, true> : gated_residual_kernel<T, false>,
                  tiles.grid, tiles.block, 0, stream, {.overlap = runs_sm90a()}, p);
  });
}

}  // namespace mllama
