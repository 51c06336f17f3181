// Where the key and value rows of a key block come from. A source gives the run of consecutive rows
// that starts at row `first` (a multiple of the run length, at most 16) of key block `block`:
//
//   RowRun<T> k_run(int block, int first);   RowRun<T> v_run(int block, int first);
//
// The main loop asks for k_run(b), v_run(b) in this order for one b after the other.
#pragma once

#include "attention_tile.cuh"

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
    return {base + (key < length ? key : 0) * stride, stride, length - key};
  }
};

// A sequence in pages of (num_kv_heads, page_size, head_dim); page_size is a multiple of 16, so a
// run never leaves its page.
template <typename T, int kBlockN>
struct PagedKeys {
  const T* k;  // cache, at the head
  const T* v;
  const int32_t* page_table;  // of the sequence
  int64_t page_stride;        // elements from page to page
  int page_size, row_stride;  // row_stride: elements from key to key, the head dim
  int length;
  int64_t offset = 0;  // of the run last asked for

  __device__ __forceinline__ RowRun<T> k_run(int block, int first) {
    const int key = block * kBlockN + first;
    offset = 0;
    if (key < length) {
      const int page = key / page_size;
      offset = page_table[page] * page_stride + (key - page * page_size) * row_stride;
    }
    return {k + offset, row_stride, length - key};
  }
  // The keys' page is the values' page: no second look-up.
  __device__ __forceinline__ RowRun<T> v_run(int block, int first) const {
    return {v + offset, row_stride, length - (block * kBlockN + first)};
  }
};

}  // namespace mllama
