// skinny_linear without tensor cores: float32, and 16 bits of any alignment.
//
// Tiling     A warp multiplies a group of weight rows with all rows of x; each lane takes 16 bytes
//            of every 512. Blocks stay and walk over the groups, so that the norm's factors are
//            made once per block.
// Precision  float32 products and sums, in an order that depends on k alone: the same bits for a
//            row in any batch and of any alignment.
// Traffic    The weight once; x from L1. Elements one by one where rows are not aligned.

#include <algorithm>

#include "../common/dispatch.cuh"
#include "../common/launch.h"
#include "../common/rms.cuh"
#include "../few_rows/output.cuh"
#include "kernels.h"

namespace mllama {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kBlocks = 2;  // per multiprocessor

// Weight rows of a group, for up to max_rows rows of x: sums and weights are to stay in registers.
__host__ __device__ constexpr int group_rows(int max_rows) { return max_rows <= 4 ? 4 : 2; }

template <typename T, int kMaxRows>
__global__ void __launch_bounds__(kThreads, kBlocks)
    skinny_linear_simt_kernel(const SkinnyLinearParams p, const bool aligned) {
  constexpr int kVec = Vec<T>::kSize, kGroupRows = group_rows(kMaxRows);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  // 16-bit rows come here for not being aligned.
  const bool vectorized = std::is_same_v<T, float> && aligned;
  const auto load = [&](const void* base, int64_t offset, int64_t k) {
    const T* address = static_cast<const T*>(base) + offset + k;
    return vectorized ? load_vec(address) : load_elements(address, p.k - k);
  };

  __shared__ float rstd[kMaxRows];
  for (int row = warp; row < kMaxRows; row += kWarps) {
    double sum = 0;
    const int64_t squares = p.norm_weight != nullptr && row < p.rows ? p.k : 0;
    for (int64_t k = lane * kVec; k < squares; k += kWarpSize * kVec) {
      sum += sum_of_squares(load(p.x, row * p.x_row_stride, k));
    }
    sum = warp_sum(sum);
    if (lane == 0) rstd[row] = inverse_rms<T>(sum, p.k, p.eps);
  }
  __syncthreads();

  const float gate = linear_gate<T>(p);
  const int64_t group_columns = p.swiglu ? kGroupRows / 2 : kGroupRows;
  const int64_t groups = (p.n + group_columns - 1) / group_columns;
  for (int64_t group = static_cast<int64_t>(blockIdx.x) * kWarps + warp; group < groups;
       group += static_cast<int64_t>(gridDim.x) * kWarps) {
    // Row r of the group belongs to column r; with swiglu to column r / 2, as its gate or up.
    const auto column_of = [&](int r) { return group * group_columns + (p.swiglu ? r / 2 : r); };
    int64_t weight_row[kGroupRows];
#pragma unroll
    for (int r = 0; r < kGroupRows; ++r) {
      const int64_t column = min(column_of(r), p.n - 1);
      weight_row[r] = (p.swiglu && r % 2 == 1 ? column + p.n : column) * p.weight_row_stride;
    }
    float sum[kGroupRows][kMaxRows] = {};
    for (int64_t k = lane * kVec; k < p.k; k += kWarpSize * kVec) {
      Vec<T> weight[kGroupRows];
#pragma unroll
      for (int r = 0; r < kGroupRows; ++r) weight[r] = load(p.weight, weight_row[r], k);
      const Vec<T> norm = p.norm_weight == nullptr ? zero_vec<T>() : load(p.norm_weight, 0, k);
#pragma unroll
      for (int row = 0; row < kMaxRows; ++row) {
        if (row >= p.rows) break;
        Vec<T> x = load(p.x, row * p.x_row_stride, k);
        if (p.norm_weight != nullptr) x = normalize(x, norm, rstd[row]);
#pragma unroll
        for (int r = 0; r < kGroupRows; ++r) {
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            sum[r][row] = fmaf(to_f32(weight[r].data[i]), to_f32(x.data[i]), sum[r][row]);
          }
        }
      }
    }
    float total[kGroupRows] = {};  // of row `lane`
#pragma unroll
    for (int row = 0; row < kMaxRows; ++row) {
      if (row >= p.rows) break;
#pragma unroll
      for (int r = 0; r < kGroupRows; ++r) {
        const float all = warp_sum(sum[r][row]);
        if (lane == row) total[r] = all;
      }
    }
    if (lane >= p.rows) continue;
#pragma unroll
    for (int r = 0; r < kGroupRows; ++r) {
      if (column_of(r) >= p.n || (p.swiglu && r % 2 == 1)) continue;
      LinearOutput<T>(p, lane, column_of(r)).store(p, gate, total[r], total[(r + 1) % kGroupRows]);
    }
  }
}

template <typename T, int kMaxRows>
cudaError_t launch_rows(const SkinnyLinearParams& p, bool aligned, int multiprocessors,
                        cudaStream_t stream) {
  const int64_t group_columns = group_rows(kMaxRows) / (p.swiglu ? 2 : 1);
  const int64_t blocks = ceil_div(ceil_div(p.n, group_columns), int64_t{kWarps});
  return launch(skinny_linear_simt_kernel<T, kMaxRows>,
                std::min<int64_t>(blocks, kBlocks * multiprocessors), kThreads, 0, stream, {}, p,
                aligned);
}

}  // namespace

cudaError_t skinny_linear_simt(const SkinnyLinearParams& p, bool aligned, int multiprocessors,
                               cudaStream_t stream) {
  return dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (p.rows == 1) return launch_rows<T, 1>(p, aligned, multiprocessors, stream);
    if (p.rows <= 4) return launch_rows<T, 4>(p, aligned, multiprocessors, stream);
    return launch_rows<T, kSkinnyLinearMaxRows>(p, aligned, multiprocessors, stream);
  });
}

}  // namespace mllama
