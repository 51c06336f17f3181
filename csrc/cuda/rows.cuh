// Rows of any length and alignment, and whether vectors suit those of an (outer, inner, dim)
// tensor.
#pragma once

#include "vec.cuh"

namespace mllama {

// Whether every row starts on a 16-byte boundary.
inline bool rows_aligned16(const void* address, int64_t outer_stride, int64_t inner_stride,
                           int64_t outer, int64_t inner, DType dtype) {
  return is_aligned16(address, outer > 1 ? outer_stride : 0, dtype) &&
         is_aligned16(address, inner > 1 ? inner_stride : 0, dtype);
}

// Vector `index` of a row of `dim` elements whose alignment and length need not suit vectors.
template <typename T>
__device__ __forceinline__ Vec<T> load_any(const void* base, int64_t offset, int64_t index,
                                           int64_t dim, bool vectorized) {
  const int64_t element = index * Vec<T>::kSize;
  const T* address = static_cast<const T*>(base) + offset + element;
  return vectorized ? load_vec(address) : load_elements(address, dim - element);
}

template <typename T>
__device__ __forceinline__ void store_any(void* base, int64_t offset, int64_t index, int64_t dim,
                                          bool vectorized, const Vec<T>& v) {
  const int64_t element = index * Vec<T>::kSize;
  T* address = static_cast<T*>(base) + offset + element;
  if (vectorized) {
    store_vec(address, v);
  } else {
    store_elements(address, v, dim - element);
  }
}

}  // namespace mllama
