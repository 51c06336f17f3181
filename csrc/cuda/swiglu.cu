// SwiGLU on the fused projection [gate, up]: out = round(silu(gate)) * up.
// Shazeer 2020 (arXiv 2002.05202)
//
// Tiling     Elementwise over 16-byte vectors (row_tiles.cuh).
// Precision  silu(x) = x / (1 + exp(-x)) in float32 with the full-precision exponential and
//            division (the op stays memory-bound), rounded to the dtype, then the product with up,
//            rounded.
// Traffic    3 * rows * dim elements. 2048 x 14336 bf16: 176 MB, 41 us at 4.3 TB/s.
// Aliasing   out may not overlap gate_up. Rows of gate_up may be strided and of any alignment.

#include "../swiglu.h"
#include "row_tiles.cuh"

namespace mllama {
namespace {

template <typename T>
__global__ void __launch_bounds__(RowTiles::kThreads)
    swiglu_kernel(const SwigluParams p, const bool vectorized) {
  constexpr int kVecs = RowTiles::kVecsPerThread;
  const int64_t row = tile_row();
  if (row >= p.rows) return;
  const T* gate_row = static_cast<const T*>(p.gate_up) + row * p.gate_up_row_stride;
  Vec<T> gate[kVecs], up[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    gate[i] = load_tile(gate_row, tile_element<T>(i), p.dim, vectorized);
    up[i] = load_tile(gate_row + p.dim, tile_element<T>(i), p.dim, vectorized);
  }
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
#pragma unroll
    for (int j = 0; j < Vec<T>::kSize; ++j) {
      const float x = to_f32(gate[i].data[j]);
      const float silu = round_to<T>(x / (1.0f + expf(-x)));
      gate[i].data[j] = from_f32<T>(silu * to_f32(up[i].data[j]));
    }
    store_tile(static_cast<T*>(p.out) + row * p.dim, tile_element<T>(i), p.dim, vectorized,
               gate[i]);
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
    swiglu_kernel<T><<<tiles.grid, tiles.block, 0, stream>>>(p, vectorized);
    return cudaGetLastError();
  });
}

}  // namespace mllama
