// Back through the RMSNorm of query rows (rms.cuh: normalize_row), for the gradients
// of cross_attention: with n = q * rstd and y = n * weight,
//   dq = rstd * (g - n * mean(g * n)),  g = dy * weight,   dweight = sum of dy * n over all rows.
#pragma once

#include "../common/reduce.cuh"
#include "../common/rms.cuh"
#include "../common/vec.cuh"
#include "backward_sm80.cuh"

namespace mllama {

// Turns the sums of dy / scale in a thread's registers into dq. Rows that see nothing (their
// log-sum-exp is infinite) count for nothing, whatever they hold. The block's part of dweight goes
// to `part`; `shared` is kWarps * kHeadDim floats. All threads that compute call it.
template <typename Config>
__device__ __forceinline__ void unnormalize(typename Config::Sums& sums, float scale,
                                            const BackwardRows<typename Config::T>& rows,
                                            const QueryRows<typename Config::T>& given,
                                            const typename Config::T* weight, double eps,
                                            float* shared, float* part) {
  using T = typename Config::T;
  const int column = Config::first_column(), lane = threadIdx.x % kWarpSize;
  const T* q[Config::kSlots];
  bool counts[Config::kSlots];
  float rstd[Config::kSlots], mean[Config::kSlots];
#pragma unroll
  for (int slot = 0; slot < Config::kSlots; ++slot) {
    const int row = Config::row_of_slot(slot);
    counts[slot] = rows.valid(row) && rows.statistics[rows.first + row].x != INFINITY;
    q[slot] = (rows.valid(row) ? given.q_row(row) : given.q) + column;
    Statistic<T> squares = 0;
#pragma unroll
    for (int n = 0; n < Config::kDimTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Statistic<T> value = to_f32(q[slot][n * 8 + i]);
        squares = fma(value, value, squares);
      }
    }
    rstd[slot] = inverse_rms<T>(warp_sum<4>(squares), Config::kHeadDim, eps);
  }

  Statistic<T> products[Config::kSlots] = {};
#pragma unroll
  for (int n = 0; n < Config::kDimTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float w = to_f32(weight[n * 8 + column + i]);
      float grad_weight = 0.0f;
#pragma unroll
      for (int slot = 0; slot < Config::kSlots; ++slot) {
        float& sum = sums[0][n][slot * 2 + i];
        const float normalized = to_f32(q[slot][n * 8 + i]) * rstd[slot], grad = sum * scale;
        grad_weight += counts[slot] ? grad * normalized : 0.0f;
        sum = grad * w;
        products[slot] += static_cast<Statistic<T>>(sum) * normalized;
      }
#pragma unroll
      for (int offset = 4; offset < kWarpSize; offset *= 2) {  // lanes of the same column
        grad_weight += __shfl_xor_sync(0xffffffffu, grad_weight, offset);
      }
      if (lane < 4) {
        shared[threadIdx.x / kWarpSize * Config::kHeadDim + n * 8 + column + i] = grad_weight;
      }
    }
  }
#pragma unroll
  for (int slot = 0; slot < Config::kSlots; ++slot) {
    mean[slot] = static_cast<float>(warp_sum<4>(products[slot]) / Config::kHeadDim);
#pragma unroll
    for (int n = 0; n < Config::kDimTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& sum = sums[0][n][slot * 2 + i];
        const float normalized = to_f32(q[slot][n * 8 + i]) * rstd[slot];
        sum = counts[slot] ? rstd[slot] * fmaf(-normalized, mean[slot], sum) : 0.0f;
      }
    }
  }
  Config::sync();
  for (int i = threadIdx.x; i < Config::kHeadDim; i += Config::kWarps * kWarpSize) {
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Config::kWarps; ++warp) total += shared[warp * Config::kHeadDim + i];
    part[i] = total;
  }
}

// Sums `count` parts of `dim` floats: a block per kPartColumns columns, every kPartRows-th part to
// a thread, then the threads of a column in their order.
constexpr int kPartColumns = 16, kPartThreads = 1024, kPartRows = kPartThreads / kPartColumns;

template <typename T>
__global__ void __launch_bounds__(kPartThreads)
    sum_parts_kernel(const float* parts, int64_t count, int64_t dim, T* sums) {
  __shared__ Statistic<T> partial[kPartRows][kPartColumns];
  const int column = threadIdx.x % kPartColumns, row = threadIdx.x / kPartColumns;
  const float* const source = parts + static_cast<int64_t>(blockIdx.x) * kPartColumns + column;
  Statistic<T> sum = 0;
#pragma unroll 4
  for (int64_t i = row; i < count; i += kPartRows) sum += source[i * dim];
  partial[row][column] = sum;
  __syncthreads();
  if (row != 0) return;
  for (int i = 1; i < kPartRows; ++i) sum += partial[i][column];
  sums[static_cast<int64_t>(blockIdx.x) * kPartColumns + column] =
      from_f32<T>(static_cast<float>(sum));
}

}  // namespace mllama
