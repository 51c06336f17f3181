// Gradient of gated_residual: grad_x = tanh(gate) * row_mask * grad_out, and
//   grad_gate = (1 - tanh(gate)^2) * sum over visible rows of grad_out * x.
// That of the residual is grad_out.
//
// Tiling     Elementwise over 16-byte vectors (row_tiles.cuh). At most 512 blocks share the tiles,
//            so that few partial sums are left; a second kernel of one warp adds them up.
// Precision  The product with tanh(gate), rounded as in the forward, is rounded once. The sum is
//            kept in double but for the products of one vector of 16-bit elements.
// Order      of the sum: by the numbers of rows and columns alone; no atomics.
// Traffic    3 * rows * dim elements, and 4 KB of partial sums. 2048 x 4096 bf16: 50 MB, 11.7 us at
//            4.3 TB/s. The last kernel adds a launch, on Hopper without the wait for it.
// In flight  Four blocks per multiprocessor of an H200, 64 KB of reads where 17 KB are needed.
// Launch     On Hopper before the previous kernel has ended (sm90.cuh: the rule).
// Aliasing   grad_x may be grad_out or x. Rows of both inputs may be strided and of any alignment.
//            A row hidden by row_mask is read from neither.

#include "../../gated_residual.h"
#include "../common/alignment.h"
#include "../common/device.h"
#include "../common/dispatch.cuh"
#include "../common/gate_gradient.cuh"
#include "../common/launch.h"
#include "../common/row_tiles.cuh"
#include "../common/sm90.cuh"
#include "../common/vec_math.cuh"

namespace mllama {
namespace {

// Products of two vectors, summed: in double for float32, whose products float32 cannot hold.
template <typename T>
__device__ __forceinline__ double dot(const Vec<T>& a, const Vec<T>& b) {
  Statistic<T> sum = 0;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    float x[kPerWord<T>], y[kPerWord<T>];
    unpack_word(a, word, x);
    unpack_word(b, word, y);
#pragma unroll
    for (int i = 0; i < kPerWord<T>; ++i) {
      sum = fma(static_cast<Statistic<T>>(x[i]), static_cast<Statistic<T>>(y[i]), sum);
    }
  }
  return sum;
}

template <typename T, bool kVectorized>
__global__ void __launch_bounds__(RowTiles::kThreads, 4)
    gated_residual_backward_kernel(const GatedResidualBackwardParams p, const int64_t tiles,
                                   const int column_tiles) {
  constexpr int kVecs = RowTiles::kVecsPerThread;
  __shared__ double warp_sums[RowTiles::kThreads / kWarpSize];
  wait_for_previous_kernel();
  start_next_kernel();
  const Vec<T> gate = filled_vec<T>(tanh_gate<T>(p.gate));
  double sum = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t row = tile / column_tiles * blockDim.y + threadIdx.y;
    if (row >= p.rows) continue;
    const int64_t first = tile % column_tiles * blockDim.x * kVecs + threadIdx.x;
    const bool visible = p.row_mask == nullptr || p.row_mask[row];
    const T* grad_row = static_cast<const T*>(p.grad_out) + row * p.grad_out_row_stride;
    const T* x_row = static_cast<const T*>(p.x) + row * p.x_row_stride;
    T* result_row = static_cast<T*>(p.grad_x) + row * p.dim;
    Vec<T> grad[kVecs], x[kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int64_t element = (first + i * blockDim.x) * Vec<T>::kSize;
      grad[i] = load_tile<kVectorized>(grad_row, element, visible ? p.dim : 0);
      x[i] = load_tile<kVectorized>(x_row, element, visible ? p.dim : 0);
    }
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int64_t element = (first + i * blockDim.x) * Vec<T>::kSize;
      sum += dot(grad[i], x[i]);
      // Not the product in a hidden row, which a gate of NaN would reach.
      store_tile<kVectorized>(result_row, element, p.dim,
                              visible ? multiply(gate, grad[i]) : zero_vec<T>());
    }
  }
  sum = warp_sum(sum);
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  if (thread % kWarpSize == 0) warp_sums[thread / kWarpSize] = sum;
  __syncthreads();
  if (thread != 0) return;
  sum = 0;
  for (const double one : warp_sums) sum += one;
  p.gate_partials[blockIdx.x] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kWarpSize)
    gate_gradient_kernel(const GatedResidualBackwardParams p, const int partials) {
  wait_for_previous_kernel();
  start_next_kernel();
  store_gate_gradient<T>(p.gate_partials, partials, p.gate, p.grad_gate);
}

}  // namespace

int gated_residual_backward_cuda(const GatedResidualBackwardParams& p, CUstream_st* stream) {
  return dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    const LaunchOptions options{.overlap = runs_sm90a()};
    const int64_t vecs = ceil_div<int64_t>(p.dim, Vec<T>::kSize);
    int partials = 0;
    if (p.rows > 0 && vecs > 0) {
      if (!RowTiles::fits(p.rows, vecs)) return cudaErrorInvalidValue;
      const bool vectorized =
          p.dim % Vec<T>::kSize == 0 && is_aligned16(p.grad_x, 0, p.dtype) &&
          is_aligned16(p.grad_out, p.rows > 1 ? p.grad_out_row_stride : 0, p.dtype) &&
          is_aligned16(p.x, p.rows > 1 ? p.x_row_stride : 0, p.dtype);
      const RowTiles grid(p.rows, vecs);
      const int64_t tiles = static_cast<int64_t>(grid.grid.x) * grid.grid.y;
      partials = static_cast<int>(std::min<int64_t>(tiles, kGatePartials));
      const cudaError_t status = launch(vectorized ? gated_residual_backward_kernel<T, true>
                                                   : gated_residual_backward_kernel<T, false>,
                                        dim3(static_cast<unsigned>(partials)), grid.block, 0,
                                        stream, options, p, tiles, static_cast<int>(grid.grid.y));
      if (status != cudaSuccess) return status;
    }
    // With nothing to add up the gradient is zero, and has to be written all the same.
    return launch(gate_gradient_kernel<T>, 1, kWarpSize, 0, stream, options, p, partials);
  });
}

}  // namespace mllama
