// Where the key and value rows of a key block come from. A source gives the run of consecutive rows
// that starts at row `first` (a multiple of the run length, at most 16) of key block `block`:
//
//   RowRun<T> k_run(int block, int first);   RowRun<T> v_run(int block, int first);
//
// The main loop asks for k_run(b), v_run(b) in this order for one b after the other.
#pragma once

#include "tile_sm80.cuh"

namespace mllama {

// One sequence of `length` keys of one head, block b holding keys b * kBlockN onwards.
template <typename T, int kBlockN>
struct DenseKeys {
  const T* k;
  const T* v;
  int64_t k_stride, v_stride;  // elements from key to key
  int length;

  __device__ __forceinline__ RowRun<T> k_run(int block, int first) const {
    return run(k, k_stride, block, first);
  }
  __device__ __forceinline__ RowRun<T> v_run(int block, int first) const {
    return run(v, v_stride, block, first);
  }

 private:
  __device__ __forceinline__ RowRun<T> run(const T* base, int64_t stride, int block,
                                           int first) const {
    const int key = block * kBlockN + first;
    return {base + key * stride, stride, length - key};
  }
};

}  // namespace mllama
