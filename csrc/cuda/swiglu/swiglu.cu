// SwiGLU on the fused projection [gate, up]: out = round(silu(gate)) * up.
// Shazeer 2020 (arXiv 2002.05202)
//
// Tiling     Elementwise over 16-byte vectors (row_tiles.cuh).
// Precision  silu in float32 (silu.cuh), rounded to the dtype, then the product with up, rounded.
// Traffic    3 * rows * dim elements. 2048 x 14336 bf16: 176 MB, 41 us at 4.3 TB/s.
// Launch     On Hopper before the previous kernel has ended (sm90.cuh: the rule).
// Aliasing   out may not overlap gate_up. Rows of gate_up may be strided and of any alignment.

#include "../../swiglu.h"
#include "../common/alignment.h"
#include "../common/device.h"
#include "../common/dispatch.cuh"
#include "../common/launch.h"
#include "../common/row_tiles.cuh"
#include "../common/silu.cuh"
#include "../common/sm90.cuh"
#include "../common/vec_math.cuh"

namespace mllama {
namespace {

template <typename T, bool kVectorized>
__global__ void __launch_bounds__(RowTiles::kThreads) swiglu_kernel(const SwigluParams p) {
  constexpr int kVecs = RowTiles::kVecsPerThread;
  wait_for_previous_kernel();
  start_next_kernel();
  const int64_t row = tile_row();
  if (row >= p.rows) return;
  const T* gate_row = static_cast<const T*>(p.gate_up) + row * p.gate_up_row_stride;
  Vec<T> gate[kVecs], up[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    gate[i] = load_tile<kVectorized>(gate_row, tile_element<T>(i), p.dim);
    up[i] = load_tile<kVectorized>(gate_row + p.dim, tile_element<T>(i), p.dim);
  }
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const Vec<T> activated = map_f32(gate[i], [](float x) { return silu<T>(x); });
    store_tile<kVectorized>(static_cast<T*>(p.out) + row * p.dim, tile_element<T>(i), p.dim,
                            multiply(activated, up[i]));
  }
}

}  // namespace

int swiglu_cuda(const SwigluParams& p, CUstream_st* stream) {
  if (p.rows == 0 || p.dim == 0) return cudaSuccess;
  return dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t vecs = ceil_div<int64_t>(p.dim, Vec<T>::kSize);
    if (!RowTiles::fits(p.rows, vecs)) return cudaErrorInvalidValue;
    const bool vectorized = p.dim % Vec<T>::kSize == 0 && is_aligned16(p.out, 0, p.dtype) &&
                            is_aligned16(p.gate_up, p.rows > 1 ? p.gate_up_row_stride : 0, p.dtype);
    const RowTiles tiles(p.rows, vecs);
    return launch(vectorized ? swiglu_kernel<T, true> : swiglu_kernel<T, false>, tiles.grid,
                  tiles.block, 0, stream, {.overlap = runs_sm90a()}, p);
  });
}

}  // namespace mllama
