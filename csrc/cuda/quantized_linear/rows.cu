// quantized_rows: decodes rows of a weight, those of an embedding or a slab for the library's
// product.
//
// Tiling     A thread per 16 columns of a row, as layout.h gives them to a lane. Of a slab a warp
//            takes 8 rows x 64 columns, which are together in memory; of gathered rows one row x
//            512 columns.
// Precision  float32, as ../../quantized_linear.h says, rounded once to the dtype.
// Traffic    Each code once, in whole sectors (of gathered rows too, but for q6_k's high bits);
//            results in whole sectors. Scales of a part are eight rows', of which a gathered row
//            uses an eighth.
//            Floor of a 64 MB slab in bfloat16 from q4_k: 19 us.

#include "../common/dispatch.cuh"
#include "../common/launch.h"
#include "../common/vec_math.cuh"
#include "decode.cuh"

namespace mllama {
namespace {

constexpr int kThreads = 256;

// Four elements by one instruction where they stand together, which the compiler would take apart,
// for it sees the stores of the other way.
template <typename T>
__device__ __forceinline__ void store_quarter(T* out, const float* value, int64_t columns) {
  if (columns >= 4 && reinterpret_cast<uintptr_t>(out) % (4 * sizeof(T)) == 0) {
    if constexpr (std::is_same_v<T, float>) {
      __stwb(reinterpret_cast<float4*>(out), make_float4(value[0], value[1], value[2], value[3]));
    } else {
      __stwb(reinterpret_cast<uint2*>(out),
             make_uint2(pack_pair<T>(value[0], value[1]), pack_pair<T>(value[2], value[3])));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < columns) out[i] = from_f32<T>(value[i]);
  }
}

// Work is counted [eight][part][row][lane of the row], where ids are given [row][part][lane].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantized_rows_kernel(const QuantizedRowsParams p, const int64_t parts, const int64_t items) {
  __shared__ float table[kTableSize];
  load_table(p.w, table);
  __syncthreads();
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= items) return;
  const int j = static_cast<int>(index % 4);
  int64_t part, out_row, row;
  if (p.ids != nullptr) {
    part = index / 4 % parts;
    out_row = index / 4 / parts;
    row = p.ids[out_row];
  } else {
    part = index / 32 % parts;
    row = p.begin / kEight * kEight + index / 32 / parts * kEight + index / 4 % kEight;
    out_row = row - p.begin;
    if (out_row < 0 || out_row >= p.rows) return;
  }
  float value[kLaneColumns];
  if (row >= 0 && row < p.w.n) {
    decode_lane(p.w, table, row, part, j, value);
  } else {
#pragma unroll
    for (float& v : value) v = __uint_as_float(0x7fffffff);
  }
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    const int64_t column = part * kPartColumns + quarter_column(quarter, j);
    if (column >= p.w.k) return;
    store_quarter(static_cast<T*>(p.out) + out_row * p.w.k + column, value + quarter * 4,
                  p.w.k - column);
  }
}

}  // namespace

int quantized_rows_cuda(const QuantizedRowsParams& p, CUstream_st* stream) {
  if (p.rows == 0 || p.w.k == 0) return cudaSuccess;
  const int64_t parts = ceil_div<int64_t>(p.w.k, kPartColumns);
  const int64_t first = p.begin / kEight, end = ceil_div<int64_t>(p.begin + p.rows, kEight);
  const int64_t items = (p.ids != nullptr ? p.rows : (end - first) * kEight) * parts * 4;
  return dispatch_dtype(p.dtype, [&](auto element) {
    return launch(quantized_rows_kernel<decltype(element)>, ceil_div<int64_t>(items, kThreads),
                  kThreads, 0, stream, {}, p, parts, items);
  });
}

}  // namespace mllama
