// Decode attention over a paged cache: the keys' source for decode_split.cuh.
// The new token's key and value are in the cache already, written by the launch before on the same
// stream.
//
// Aliasing   Reads q and the cache, writes out and workspace; none of these may overlap.

#include "../attention/decode_split.cuh"
#include "../common/dispatch.cuh"
#include "decode_queries.cuh"
#include "kernels.h"

namespace mllama {
namespace {

template <typename Element>
struct PagedSource {
  using T = Element;
  // Pages of the largest split at the smallest page size.
  static constexpr int kSharedInts = 2048 / 16;

  struct Keys {
    const T* k;  // page 0 of the cache, at the head
    const T* v;
    int start;  // where the split starts in its first page
    int length;
  };

  RotaryAttentionParams p;
  int split_size;

  __device__ __forceinline__ Keys open(int64_t b, int kv_head, int split, int* pages) const {
    const SequenceRows rows = sequence_rows(p.cu_seqlens, b, 1, p.tokens);
    const int64_t past = p.cache_lens[b];
    const int64_t first = static_cast<int64_t>(split) * split_size;
    const int64_t length =
        min(min(past + 1, p.max_pages * p.page_size) - first, static_cast<int64_t>(split_size));
    if (rows.count == 0 || past < 0 || length <= 0) return {};
    const int page_size = static_cast<int>(p.page_size);
    const int first_page = static_cast<int>(first / page_size);
    const int start = static_cast<int>(first - static_cast<int64_t>(first_page) * page_size);
    const int count = (start + static_cast<int>(length) - 1) / page_size + 1;
    const int32_t* table = p.page_table + b * p.max_pages + first_page;
    for (int i = threadIdx.x; i < count; i += blockDim.x) pages[i] = table[i];
    __syncthreads();
    const int64_t head = static_cast<int64_t>(kv_head) * page_size * p.head_dim;
    return {static_cast<const T*>(p.k_cache) + head, static_cast<const T*>(p.v_cache) + head, start,
            static_cast<int>(length)};
  }

  // page_size is a multiple of 16, so a tile never leaves its page. The table is unchecked: a page
  // outside the cache has no visible key.
  __device__ __forceinline__ KeyRun<T> run(const Keys& keys, int first, const int* pages) const {
    const int page_size = static_cast<int>(p.page_size);
    const int index = (keys.start + first) / page_size;
    const int row = keys.start + first - index * page_size;
    const int page = pages[index];
    if (page < 0 || page >= p.num_pages) return {keys.k, keys.v, 0, 0, 0};
    const int64_t offset = (page * p.num_kv_heads * page_size + row) * p.head_dim;
    return {keys.k + offset, keys.v + offset, p.head_dim, p.head_dim, keys.length - first};
  }

  __device__ __forceinline__ void load_query(int64_t b, int kv_head, T* query,
                                             int row_elements) const {
    load_rotated_query(p, sequence_rows(p.cu_seqlens, b, 1, p.tokens).begin, b, kv_head, query,
                       row_elements);
  }
};

SplitGeometry geometry(const RotaryAttentionParams& p) {
  return paged_splits(p.max_pages * p.page_size);
}

}  // namespace

int64_t rotary_decode_workspace(const RotaryAttentionParams& p) {
  return split_kv_workspace(p.batch, p.num_q_heads, geometry(p).splits, p.head_dim);
}

cudaError_t rotary_decode_split(const RotaryAttentionParams& p, CUstream_st* stream) {
  const SplitGeometry splits = geometry(p);
  return dispatch_dtype(p.dtype, [&](auto element) {
    return dispatch_head_dim(p.head_dim, [&](auto head_dim) {
      const PagedSource<decltype(element)> source{p, static_cast<int>(splits.split_size)};
      return launch_split_kv<head_dim()>(source, split_kv_params(p, splits.splits), stream);
    });
  });
}

}  // namespace mllama
