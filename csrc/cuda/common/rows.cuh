// Rows of any length and alignment.
#pragma once

#include "vec.cuh"

namespace mllama {

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
