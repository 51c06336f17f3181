// Decode cross-attention: image tiles as the keys' source for decode_split.cuh. Splits do not cross
// tiles, and a split of a tile that the row does not see ends before it loads anything.
//
// Aliasing   Reads q, k and v, writes out and workspace; none of these may overlap.

#include "../attention/decode_split.cuh"
#include "../common/dispatch.cuh"
#include "decode_queries.cuh"
#include "kernels.h"

namespace mllama {
namespace {

template <typename Element>
struct TileSource {
  using T = Element;
  static constexpr int kSharedInts = 1;  // none needed

  struct Keys {
    const T* k;  // first key of the split
    const T* v;
    int length;
  };

  CrossAttentionParams p;
  int splits_per_tile, split_size;

  // p.tile_table is unchecked: a slot outside the pool is an absent tile.
  __device__ __forceinline__ Keys open(int64_t b, int kv_head, int split, int*) const {
    const SequenceRows rows = sequence_rows(p.cu_seqlens, b, 1, p.tokens);
    const int tile = split / splits_per_tile, first = split % splits_per_tile * split_size;
    const int64_t slot =
        p.tile_table == nullptr ? b * p.tiles + tile : p.tile_table[b * p.tiles + tile];
    if (rows.count == 0 || slot < 0 || slot >= p.num_slots) return {};
    if (p.tile_mask != nullptr && !p.tile_mask[rows.begin * p.tile_mask_row_stride + tile])
      return {};
    const T* k = static_cast<const T*>(p.k) + slot * p.k_slot_stride + first * p.k_token_stride;
    const T* v = static_cast<const T*>(p.v) + slot * p.v_slot_stride + first * p.v_token_stride;
    return {k + kv_head * p.k_head_stride, v + kv_head * p.v_head_stride,
            min(split_size, static_cast<int>(p.tile_tokens) - first)};
  }

  __device__ __forceinline__ KeyRun<T> run(const Keys& keys, int first, const int*) const {
    return {keys.k + first * p.k_token_stride, keys.v + first * p.v_token_stride, p.k_token_stride,
            p.v_token_stride, keys.length - first};
  }

  __device__ __forceinline__ void load_query(int64_t b, int kv_head, T* query,
                                             int row_elements) const {
    load_normed_query(p, sequence_rows(p.cu_seqlens, b, 1, p.tokens).begin, b, kv_head, query,
                      row_elements);
  }
};

}  // namespace

int64_t cross_decode_workspace(const CrossAttentionParams& p) {
  return split_kv_workspace(p.batch, p.num_q_heads, p.tiles * tile_splits(p.tile_tokens).splits,
                            p.head_dim);
}

cudaError_t cross_decode_split(const CrossAttentionParams& p, CUstream_st* stream) {
  const SplitGeometry splits = tile_splits(p.tile_tokens);
  return dispatch_dtype(p.dtype, [&](auto element) {
    return dispatch_head_dim(p.head_dim, [&](auto head_dim) {
      const TileSource<decltype(element)> source{p, static_cast<int>(splits.splits),
                                                 static_cast<int>(splits.split_size)};
      return launch_split_kv<head_dim()>(source, split_kv_params(p, p.tiles * splits.splits),
                                         stream);
    });
  });
}

}  // namespace mllama
