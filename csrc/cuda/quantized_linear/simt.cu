// quantized_linear without tensor cores: float32, and 16 bits of rows that do not start and end on
// 16 bytes or, with swiglu, of an odd number of columns.
//
// Tiling     A block of eight warps makes eight columns of out (with swiglu from eight gate and
// eight
//            up rows), which share k by 64: a lane decodes 16 weights of a row, and multiplies them
//            with all rows of x.
// Precision  float32 products and sums, in an order that depends on k alone: a lane has one 32nd of
// k,
//            so that sums stay short.
// Traffic    The weight once; x from L1 and L2, by every block.

#include "../common/dispatch.cuh"
#include "../common/launch.h"
#include "../common/rms.cuh"
#include "../few_rows/output.cuh"
#include "decode.cuh"
#include "int8.cuh"
#include "kernels.h"

namespace mllama {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;

template <typename T, int kMaxRows>
struct SimtShared {
  float sums[2][kWarps][kMaxRows][kEight];  // of gate or plain rows, of up rows
  float rstd[kMaxRows];
  float table[kTableSize];
};

// Four elements of a row from column k on; zeros behind its end.
template <typename T>
__device__ __forceinline__ float4 load_four(const T* row, int64_t k, int64_t columns,
                                            bool aligned) {
  if (aligned && std::is_same_v<T, float>) {
    if (k >= columns) return make_float4(0, 0, 0, 0);
    return *reinterpret_cast<const float4*>(row + k);
  }
  float value[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) value[i] = k + i < columns ? to_f32(row[k + i]) : 0.0f;
  return make_float4(value[0], value[1], value[2], value[3]);
}

// x as rms_norm rounds it.
template <typename T>
__device__ __forceinline__ float normalize_one(float x, float weight, float rstd) {
  return round_to<T>(__fmul_rn(round_to<T>(__fmul_rn(x, rstd)), weight));
}

template <typename T>
__device__ __forceinline__ float4 normalize_four(const float4& x, const float4& weight,
                                                 float rstd) {
  return make_float4(normalize_one<T>(x.x, weight.x, rstd), normalize_one<T>(x.y, weight.y, rstd),
                     normalize_one<T>(x.z, weight.z, rstd), normalize_one<T>(x.w, weight.w, rstd));
}

// Apart, so that it is compiled once and not for every row.
struct LaneOfX {
  float4 quarter[2];
};
__device__ __noinline__ LaneOfX in_int8(LaneOfX x) {
  round_to_int8(x.quarter);
  return x;
}

template <typename T, int kMaxRows>
__device__ __forceinline__ void multiply(const QuantizedCall& p, bool aligned,
                                         const float (&table)[kTableSize], int64_t row,
                                         const float (&rstd)[kMaxRows], float (&sum)[kMaxRows]) {
  const int warp = threadIdx.x / kWarpSize, j = threadIdx.x % 4;
  const int64_t own = min(row, p.w.n - 1);
  for (int64_t part = warp; part < p.parts; part += kWarps) {
    float weight[kLaneColumns];
    decode_lane(p.w, table, own, part, j, weight);
#pragma unroll
    for (int g = 0; g < 2; ++g) {  // 32 columns, eight of which are this lane's
      const auto column = [&](int h) { return part * kPartColumns + quarter_column(2 * g + h, j); };
      float4 norm[2] = {};
      if (p.norm_weight != nullptr) {
        const T* const own_norm = static_cast<const T*>(p.norm_weight);
        norm[0] = load_four(own_norm, column(0), p.k, aligned);
        norm[1] = load_four(own_norm, column(1), p.k, aligned);
      }
#pragma unroll
      for (int r = 0; r < kMaxRows; ++r) {
        if (r >= p.rows) break;
        const T* const row_of_x = static_cast<const T*>(p.x) + r * p.x_row_stride;
        LaneOfX x = {load_four(row_of_x, column(0), p.k, aligned),
                     load_four(row_of_x, column(1), p.k, aligned)};
        if (p.norm_weight != nullptr) {
          x.quarter[0] = normalize_four<T>(x.quarter[0], norm[0], rstd[r]);
          x.quarter[1] = normalize_four<T>(x.quarter[1], norm[1], rstd[r]);
        }
        if (p.int8_activations) x = in_int8(x);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float4& four = x.quarter[h];
          const float* const w = weight + (2 * g + h) * 4;
          // Four by themselves: the rounding of a long sum would be the largest error.
          sum[r] += fmaf(four.w, w[3], fmaf(four.z, w[2], fmaf(four.y, w[1], four.x * w[0])));
        }
      }
    }
  }
}

template <typename T, int kMaxRows>
__global__ void __launch_bounds__(kThreads, 1)  // without the 1 it may spill
    quantized_linear_simt_kernel(const QuantizedCall p, const bool aligned) {
  __shared__ SimtShared<T, kMaxRows> shared;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  load_table(p.w, shared.table);
  for (int row = warp; row < kMaxRows; row += kWarps) {
    double sum = 0;
    const int64_t squares = p.norm_weight != nullptr && row < p.rows ? p.k : 0;
    for (int64_t k = lane * Vec<T>::kSize; k < squares; k += kWarpSize * Vec<T>::kSize) {
      const T* const x = static_cast<const T*>(p.x) + row * p.x_row_stride + k;
      sum += sum_of_squares(load_elements(x, p.k - k));
    }
    sum = warp_sum(sum);
    if (lane == 0) shared.rstd[row] = inverse_rms<T>(sum, p.k, p.eps);
  }
  __syncthreads();
  float rstd[kMaxRows];
#pragma unroll
  for (int r = 0; r < kMaxRows; ++r) rstd[r] = shared.rstd[r];

  const float gate = linear_gate<T>(p);
  const int64_t eights = (p.n + kEight - 1) / kEight;
  for (int64_t eight = blockIdx.x; eight < eights; eight += gridDim.x) {
#pragma unroll 1
    for (int half = 0; half < (p.swiglu ? 2 : 1); ++half) {
      float sum[kMaxRows] = {};
      multiply<T>(p, aligned, shared.table, half * p.n + eight * kEight + lane / 4, rstd, sum);
#pragma unroll
      for (int r = 0; r < kMaxRows; ++r) {
        const float all = warp_sum<4>(sum[r]);
        if (lane % 4 == 0) shared.sums[half][warp][r][lane / 4] = all;
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kMaxRows * kEight; i += kThreads) {
      const int row = i / kEight;
      const int64_t column = eight * kEight + i % kEight;
      if (row >= p.rows || column >= p.n) continue;
      const auto total = [&](int half) {
        float sum = 0;
        for (int w = 0; w < kWarps; ++w) sum += shared.sums[half][w][row][i % kEight];
        if (p.bias != nullptr) sum += to_f32(static_cast<const T*>(p.bias)[half * p.n + column]);
        return sum;
      };
      const float up = p.swiglu ? total(1) : 0.0f;
      LinearOutput<T>(p, row, column).store(p, gate, total(0), up);
    }
    __syncthreads();
  }
}

template <typename T, int kMaxRows>
cudaError_t launch_rows(const QuantizedCall& p, bool aligned, int multiprocessors,
                        cudaStream_t stream) {
  const int64_t blocks = ceil_div<int64_t>(p.n, kEight);
  return launch(quantized_linear_simt_kernel<T, kMaxRows>,
                std::min<int64_t>(blocks, 2 * multiprocessors), kThreads, 0, stream, {}, p,
                aligned);
}

}  // namespace

cudaError_t quantized_linear_simt(const QuantizedCall& p, bool aligned, int multiprocessors,
                                  cudaStream_t stream) {
  return dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    return p.rows == 1 ? launch_rows<T, 1>(p, aligned, multiprocessors, stream)
                       : launch_rows<T, kFewRows>(p, aligned, multiprocessors, stream);
  });
}

}  // namespace mllama
