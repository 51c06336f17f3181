// Geometry of elementwise kernels over rows of 16-byte vectors: kVecsPerThread vectors per thread,
// a block on several short rows or on a stretch of a long one.
#pragma once

#include "vec.cuh"

namespace mllama {

struct RowTiles {
  static constexpr int kThreads = 256;
  // Two inputs x 2 vectors in flight per thread are 128 KB per SM at full occupancy (32 registers);
  // the latency of HBM needs 25 KB at 4.3 TB/s, so the bandwidth holds until the last blocks.
  static constexpr int kVecsPerThread = 2;

  dim3 grid, block;

  RowTiles(int64_t rows, int64_t vecs) {
    unsigned lanes = 8;
    while (lanes < kThreads && static_cast<int64_t>(lanes) * kVecsPerThread < vecs) lanes *= 2;
    block = dim3(lanes, kThreads / lanes);
    grid = dim3(static_cast<unsigned>(ceil_div<int64_t>(rows, block.y)),
                static_cast<unsigned>(ceil_div<int64_t>(vecs, lanes * kVecsPerThread)));
  }

  static bool fits(int64_t rows, int64_t vecs) {
    return rows <= INT32_MAX && vecs <= int64_t{65535} * kThreads * kVecsPerThread;
  }
};

// This thread's row, and the element its i-th vector starts at.
__device__ __forceinline__ int64_t tile_row() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}
template <typename T>
__device__ __forceinline__ int64_t tile_element(int i) {
  const int64_t first = static_cast<int64_t>(blockIdx.y) * blockDim.x * RowTiles::kVecsPerThread;
  return (first + i * static_cast<int64_t>(blockDim.x) + threadIdx.x) * Vec<T>::kSize;
}

// Up to one vector of a row that ends at `dim`; zeros behind it.
template <bool kVectorized, typename T>
__device__ __forceinline__ Vec<T> load_tile(const T* row, int64_t element, int64_t dim) {
  if constexpr (kVectorized) return load_vec_if(element < dim, row + element);
  if (element >= dim) return zero_vec<T>();
  return load_elements(row + element, dim - element);
}
template <bool kVectorized, typename T>
__device__ __forceinline__ void store_tile(T* row, int64_t element, int64_t dim, const Vec<T>& v) {
  if constexpr (kVectorized) {
    store_vec_if(element < dim, row + element, v);
  } else if (element < dim) {
    store_elements(row + element, v, dim - element);
  }
}

}  // namespace mllama
