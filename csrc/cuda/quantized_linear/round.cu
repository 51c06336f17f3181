// x as QuantizedLinearParams::int8_activations rounds it, decoded and rounded to the dtype, for the
// library's product of many rows.
//
// Tiling     Four lanes per 32 columns of a row, eight each, as the product's kernels have them.
// Precision  float32, rounded once to the dtype: in bfloat16 by a tenth of what integers leave.
// Traffic    x once, and as much out.

#include "../common/dispatch.cuh"
#include "../common/launch.h"
#include "int8.cuh"

namespace mllama {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 4, kColumns = 32;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantized_round_kernel(const QuantizedRoundParams p, const int64_t blocks) {
  const int64_t block = blockIdx.x * static_cast<int64_t>(kThreads / kLanes) + threadIdx.x / kLanes;
  const int64_t row = block / blocks;
  const bool there = row < p.rows;
  // A lane's columns are kLanes apart, so that neighbours are read together.
  const int64_t first = block % blocks * kColumns + threadIdx.x % kLanes;
  const T* const x = static_cast<const T*>(p.x) + row * p.x_row_stride;
  const auto has = [&](int i) { return there && first + i * kLanes < p.k; };
  const auto load = [&](int i) { return has(i) ? to_f32(x[first + i * kLanes]) : 0.0f; };
  float4 value[2] = {make_float4(load(0), load(1), load(2), load(3)),
                     make_float4(load(4), load(5), load(6), load(7))};
  round_to_int8(value);
  T* const out = static_cast<T*>(p.out) + row * p.k;
  const auto store = [&](int i, float rounded) {
    if (has(i)) out[first + i * kLanes] = from_f32<T>(rounded);
  };
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    store(4 * h, value[h].x), store(4 * h + 1, value[h].y);
    store(4 * h + 2, value[h].z), store(4 * h + 3, value[h].w);
  }
}

}  // namespace

int quantized_round_cuda(const QuantizedRoundParams& p, CUstream_st* stream) {
  if (p.rows == 0 || p.k == 0) return cudaSuccess;
  const int64_t blocks = ceil_div<int64_t>(p.k, kColumns);
  return dispatch_dtype(p.dtype, [&](auto element) {
    return launch(quantized_round_kernel<decltype(element)>,
                  ceil_div<int64_t>(p.rows * blocks * kLanes, kThreads), kThreads, 0, stream, {}, p,
                  blocks);
  });
}

}  // namespace mllama
