// x as QuantizedLinearParams::int8_activations rounds it, decoded and rounded to the dtype, for the
// library's product of many rows.
//
// Tiling     Four lanes per 32 columns of a row, eight each, as the product's kernels have them.
// Precision  float32, rounded once to the dtype: in bfloat16 by a tenth of what integers leave.
// Traffic    x once, and as much out.

#include "../common/alignment.h"
#include "../common/dispatch.cuh"
#include "../common/launch.h"
#include "int8.cuh"

namespace mllama {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 4, kColumns = 32;

// kAligned: rows of x and of out start and end on 16 bytes.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    quantized_round_kernel(const QuantizedRoundParams p, const int64_t blocks) {
  constexpr int kSize = Vec<T>::kSize, kVecs = kColumns / kLanes / kSize;
  const int64_t block = blockIdx.x * static_cast<int64_t>(kThreads / kLanes) + threadIdx.x / kLanes;
  const int64_t row = block / blocks;
  const int64_t first = (block % blocks * kLanes + threadIdx.x % kLanes) * (kVecs * kSize);
  const int64_t count = row < p.rows ? p.k - first : 0;
  const T* const x = static_cast<const T*>(p.x) + row * p.x_row_stride + first;
  float4 values[2];
  float* const value = &values[0].x;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int at = v * kSize;
    const Vec<T> own =
        kAligned ? load_vec_if(at < count, x + at) : load_elements(x + at, count - at);
#pragma unroll
    for (int i = 0; i < kSize; ++i) value[at + i] = to_f32(own.data[i]);
  }
  round_to_int8(values);
  T* const out = static_cast<T*>(p.out) + row * p.k + first;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int at = v * kSize;
    Vec<T> own;
#pragma unroll
    for (int i = 0; i < kSize; ++i) own.data[i] = from_f32<T>(value[at + i]);
    if constexpr (kAligned) {
      store_vec_if(at < count, out + at, own);
    } else {
      store_elements(out + at, own, count - at);
    }
  }
}

}  // namespace

int quantized_round_cuda(const QuantizedRoundParams& p, CUstream_st* stream) {
  if (p.rows == 0 || p.k == 0) return cudaSuccess;
  const int64_t blocks = ceil_div<int64_t>(p.k, kColumns);
  const bool aligned =
      is_aligned16(p.x, p.x_row_stride, p.dtype) && is_aligned16(p.out, p.k, p.dtype);
  return dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    return launch(aligned ? quantized_round_kernel<T, true> : quantized_round_kernel<T, false>,
                  ceil_div<int64_t>(p.rows * blocks * kLanes, kThreads), kThreads, 0, stream, {}, p,
                  blocks);
  });
}

}  // namespace mllama
