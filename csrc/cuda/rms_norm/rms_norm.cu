// RMSNorm, alone or behind a (gated) residual add: y = w * round(t / sqrt(mean(t^2) + eps)), where
// t is x, residual + x, or residual + tanh(gate) * row_mask * x.
// Zhang, Sennrich 2019 (arXiv 1910.07467)
//
// Tiling     A row lives in registers as 16-byte vectors and is read once; all loads, also of w,
//            are issued before the first use. 16 lanes per row up to 16 vectors (head dims:
//            millions of short rows), a warp up to 128, a block of up to 512 threads x 4 vectors up
//            to 2048 (16384 elements of 16 bits, 8192 of float32). Longer rows, and rows that do
//            not start and end on 16 bytes, take a block that passes over the row twice, element by
//            element where it must, in the same order.
// Precision  Statistics as rms.cuh: a vector's squares in float32 for 16-bit types, in float64 for
//            float32, whose result would otherwise show the order of additions (a GPU with few
//            float64 units then runs float32 rows below the memory's speed). A row's result depends
//            neither on the other rows nor on alignment. Roundings as in PyTorch: tanh(gate), the
//            gated product, t, the normalised value, its product with the weight.
// Traffic    rms_norm 2 * rows * dim elements, add_rms_norm 4 (w stays in L1). 4096 x 4096 bf16: 67
//            MB, 15.6 us at 4.3 TB/s; with residual 134 MB, 31.2 us.
// In flight  dim 4096, 16 bits: 8 rows per multiprocessor, 64 KB (residual: 128 KB), where 4.3 TB/s
//            at 0.75 us of latency need 25 KB, half of it reads. Rows leave as others arrive, so no
//            persistent grid: what is left is one latency at each end of the launch, 1 to 1.5 us,
//            91 to 94 % of bandwidth for 4096 rows, more for longer launches. Issue slots are the
//            other limit, see vec_math.cuh.
// Launch     On Hopper before the previous kernel has ended (sm90.cuh: the rule); everything is
//            read behind the wait.
// Aliasing   y may be x, residual_out may be residual or x (one thread reads, then writes an
//            element). Input rows may be strided. A row hidden by row_mask is not read from x.

#include "../../rms_norm.h"
#include "../common/alignment.h"
#include "../common/device.h"
#include "../common/dispatch.cuh"
#include "../common/launch.h"
#include "../common/reduce.cuh"
#include "../common/rms.cuh"
#include "../common/rows.cuh"
#include "../common/sm90.cuh"
#include "../common/vec_math.cuh"

namespace mllama {
namespace {

constexpr int kRowThreads = 128;   // block size where lanes or warps own rows
constexpr int kMaxThreads = 512;   // where a block owns a row
constexpr int kVecsPerThread = 4;  // 16-byte vectors of a row per thread
constexpr int kShortRowLanes = 16;
constexpr int kBlock = 0;  // kLanes of the variant in which a block owns a row

struct Row {
  int64_t x, residual, out;  // offsets in elements
  bool visible;
};

__device__ __forceinline__ Row locate_row(const RmsNormParams& p, int64_t row) {
  int64_t outer, inner;
  if (p.outer * p.inner <= UINT32_MAX) {  // a 32-bit division is several times cheaper
    outer = static_cast<uint32_t>(row) / static_cast<uint32_t>(p.inner);
    inner = static_cast<uint32_t>(row) % static_cast<uint32_t>(p.inner);
  } else {
    outer = row / p.inner;
    inner = row % p.inner;
  }
  return {outer * p.x_outer_stride + inner * p.x_inner_stride,
          outer * p.residual_outer_stride + inner * p.residual_inner_stride, row * p.dim,
          p.row_mask == nullptr || p.row_mask[row]};
}

template <typename T>
__device__ __forceinline__ Vec<T> row_gate(const RmsNormParams& p) {
  return filled_vec<T>(p.gate == nullptr ? 1.0f : tanh_gate<T>(p.gate));
}

// residual + gate * x with every operation rounded. Without a gate the factor is 1 and exact.
template <typename T>
__device__ __forceinline__ Vec<T> add_residual(const Vec<T>& x, const Vec<T>& residual,
                                               const Vec<T>& gate) {
  return add(residual, multiply(gate, x));
}

// Vector `index` of an aligned row of `vecs` vectors; behind the row it is zero.
template <typename T>
__device__ __forceinline__ Vec<T> load_row(const void* base, int64_t offset, int index, int vecs) {
  return load_vec_if(index < vecs, static_cast<const T*>(base) + offset + index * Vec<T>::kSize);
}

template <typename T>
__device__ __forceinline__ void store_row(void* base, int64_t offset, int index, int vecs,
                                          const Vec<T>& v) {
  store_vec_if(index < vecs, static_cast<T*>(base) + offset + index * Vec<T>::kSize, v);
}

// Rows that start and end on 16 bytes and fit into registers: kLanes lanes or a block per row.
template <typename T, bool kResidual, int kLanes, int kVecs>
__global__ void __launch_bounds__(kLanes == kBlock ? kMaxThreads : kRowThreads,
                                  kLanes == kBlock ? 2 : 1) rms_norm_kernel(const RmsNormParams p) {
  wait_for_previous_kernel();
  start_next_kernel();
  const int step = kLanes == kBlock ? static_cast<int>(blockDim.x) : kLanes;
  const int first = static_cast<int>(threadIdx.x) % step;
  const int64_t row_index =
      kLanes == kBlock ? static_cast<int64_t>(blockIdx.x)
                       : (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / step;
  const bool active = row_index < p.outer * p.inner;  // lanes without a row still join the shuffles
  const int vecs = active ? static_cast<int>(p.dim) / Vec<T>::kSize : 0;
  const Row row = locate_row(p, active ? row_index : 0);

  Vec<T> v[kVecs], weight[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    v[i] = load_row<T>(p.x, row.x, first + i * step, row.visible ? vecs : 0);
  }
  // Asked for before anything is used: behind the sum it would cost a single row a second trip to
  // memory.
  const auto load_weight = [&] {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) weight[i] = load_row<T>(p.weight, 0, first + i * step, vecs);
  };
  if constexpr (kResidual) {
    Vec<T> residual[kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      residual[i] = load_row<T>(p.residual, row.residual, first + i * step, vecs);
    }
    load_weight();
    // Or the compiler asks for the weight after the first sum, to save registers.
    if constexpr (kLanes == kWarpSize) __syncwarp();
    const Vec<T> gate = row_gate<T>(p);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      v[i] = add_residual(v[i], residual[i], gate);
      store_row(p.residual_out, row.out, first + i * step, vecs, v[i]);
    }
  } else {
    load_weight();
  }
  // Behind the row t is 0 and adds nothing (or NaN, if the gate and with it the whole row is NaN).
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) sum += sum_of_squares(v[i]);
  if constexpr (kLanes == kBlock) {
    sum = block_sum_once(sum);
  } else {
    sum = warp_sum<kLanes>(sum);
  }
  const float rstd = inverse_rms<T>(sum, p.dim, p.eps);
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    store_row(p.y, row.out, first + i * step, vecs, normalize(v[i], weight[i], rstd));
  }
}

// Any row: x is read twice (or the sum, which this thread has just written).
template <typename T, bool kResidual>
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_two_pass_kernel(const RmsNormParams p, const bool vectorized) {
  wait_for_previous_kernel();
  start_next_kernel();
  const Row row = locate_row(p, blockIdx.x);
  const int64_t vecs = (p.dim + Vec<T>::kSize - 1) / Vec<T>::kSize;
  const Vec<T> gate = kResidual ? row_gate<T>(p) : zero_vec<T>();
  double sum = 0;
  for (int64_t i = threadIdx.x; i < vecs; i += blockDim.x) {
    Vec<T> v = row.visible ? load_any<T>(p.x, row.x, i, p.dim, vectorized) : zero_vec<T>();
    if constexpr (kResidual) {
      v = add_residual(v, load_any<T>(p.residual, row.residual, i, p.dim, vectorized), gate);
      store_any(p.residual_out, row.out, i, p.dim, vectorized, v);
    }
    sum += sum_of_squares(v);
  }
  const float rstd = inverse_rms<T>(block_sum_once(sum), p.dim, p.eps);
  for (int64_t i = threadIdx.x; i < vecs; i += blockDim.x) {
    const Vec<T> v = kResidual ? load_any<T>(p.residual_out, row.out, i, p.dim, vectorized)
                               : load_any<T>(p.x, row.x, i, p.dim, vectorized);
    const Vec<T> weight = load_any<T>(p.weight, 0, i, p.dim, vectorized);
    store_any(p.y, row.out, i, p.dim, vectorized, normalize(v, weight, rstd));
  }
}

template <typename T, bool kResidual>
cudaError_t launch_rms_norm(const RmsNormParams& p, cudaStream_t stream) {
  const auto aligned = [&](const void* address, int64_t outer_stride, int64_t inner_stride) {
    return rows_aligned16(address, outer_stride, inner_stride, p.outer, p.inner, p.dtype);
  };
  const bool vectorized =
      p.dim % Vec<T>::kSize == 0 && aligned(p.x, p.x_outer_stride, p.x_inner_stride) &&
      aligned(p.y, 0, 0) && aligned(p.weight, 0, 0) &&
      (!kResidual || (aligned(p.residual, p.residual_outer_stride, p.residual_inner_stride) &&
                      aligned(p.residual_out, 0, 0)));
  const int64_t rows = p.outer * p.inner;
  const int64_t vecs = ceil_div<int64_t>(p.dim, Vec<T>::kSize);
  if (rows > INT32_MAX) return cudaErrorInvalidValue;
  const auto blocks = [&](int lanes) { return ceil_div<int64_t>(rows * lanes, kRowThreads); };
  const int threads = static_cast<int>(std::min<int64_t>(
      kMaxThreads, round_up<int64_t>(ceil_div<int64_t>(vecs, kVecsPerThread), kWarpSize)));
  const LaunchOptions options{.overlap = runs_sm90a()};
  if (!vectorized || vecs > kMaxThreads * kVecsPerThread) {
    return launch(rms_norm_two_pass_kernel<T, kResidual>, rows, threads, 0, stream, options, p,
                  vectorized);
  }
  if (vecs <= kShortRowLanes) {
    return launch(rms_norm_kernel<T, kResidual, kShortRowLanes, 1>, blocks(kShortRowLanes),
                  kRowThreads, 0, stream, options, p);
  }
  if (vecs <= kWarpSize * kVecsPerThread) {
    return launch(rms_norm_kernel<T, kResidual, kWarpSize, kVecsPerThread>, blocks(kWarpSize),
                  kRowThreads, 0, stream, options, p);
  }
  return launch(rms_norm_kernel<T, kResidual, kBlock, kVecsPerThread>, rows, threads, 0, stream,
                options, p);
}

}  // namespace

int rms_norm_cuda(const RmsNormParams& p, CUstream_st* stream) {
  if (p.outer == 0 || p.inner == 0 || p.dim == 0) return cudaSuccess;
  return dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    return p.residual == nullptr ? launch_rms_norm<T, false>(p, stream)
                                 : launch_rms_norm<T, true>(p, stream);
  });
}

}  // namespace mllama
