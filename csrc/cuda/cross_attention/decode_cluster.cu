// Decode cross-attention in one launch: the image tiles that the row sees as the source of keys for
// decode_cluster.cuh. Their chunks are numbered through, tile after tile, so that the strands are
// even whatever is hidden, and hiding a tile equals deleting it bit for bit. A tile's last chunk is
// short (1601 tokens: 100 chunks of 16 and one of 1); none straddles two tiles.
//
// Aliasing   Reads q, k and v, writes out; none of these may overlap.

#include "../attention/decode_cluster.cuh"
#include "../common/dispatch.cuh"
#include "decode_queries.cuh"
#include "kernels.h"

namespace mllama {
namespace {

template <typename Element>
struct TileChunks {
  using T = Element;

  CrossAttentionParams p;
  int chunks_per_tile;

  int64_t shared_ints() const { return p.tiles + 1; }

  struct Keys {
    int64_t token;     // the sequence's row, or -1
    const int* slots;  // of the tiles that the row sees, in order
    int chunks;
    static constexpr int appended = -1;
  };

  // The first int of `shared` is the number of tiles, the slots follow.
  __device__ __forceinline__ Keys open(int64_t b, int* shared) const {
    if (b >= p.batch) return {-1, nullptr, 0};
    const SequenceRows rows = sequence_rows(p.cu_seqlens, b, 1, p.tokens);
    if (rows.count == 0) return {-1, nullptr, 0};
    if (threadIdx.x < kWarpSize) {
      const int lane = threadIdx.x, tiles = static_cast<int>(p.tiles);
      int count = 0;
      for (int first = 0; first < tiles; first += kWarpSize) {
        const int tile = first + lane;
        int64_t slot = -1;
        if (tile < tiles) {
          const bool sees =
              p.tile_mask == nullptr || p.tile_mask[rows.begin * p.tile_mask_row_stride + tile];
          slot = p.tile_table == nullptr ? b * p.tiles + tile : p.tile_table[b * p.tiles + tile];
          if (!sees || slot >= p.num_slots) slot = -1;  // the table is unchecked
        }
        const unsigned seen = __ballot_sync(0xffffffffu, slot >= 0);
        if (slot >= 0) {
          shared[1 + count + __popc(seen & ((1u << lane) - 1))] = static_cast<int>(slot);
        }
        count += __popc(seen);
      }
      if (lane == 0) shared[0] = count;
    }
    __syncthreads();
    return {rows.begin, shared + 1, shared[0] * chunks_per_tile};
  }

  class Reader {
   public:
    __device__ __forceinline__ Reader(const TileChunks& source, int64_t, int kv_head, int, int)
        : source_(source), kv_head_(kv_head) {}

    __device__ __forceinline__ KeyRun<T> run(const Keys& keys, int chunk) const {
      const CrossAttentionParams& p = source_.p;
      const int segment = chunk / source_.chunks_per_tile;
      const int first = (chunk - segment * source_.chunks_per_tile) * kChunkKeys;
      const int64_t slot = keys.slots[segment];
      return {static_cast<const T*>(p.k) + slot * p.k_slot_stride + first * p.k_token_stride +
                  kv_head_ * p.k_head_stride,
              static_cast<const T*>(p.v) + slot * p.v_slot_stride + first * p.v_token_stride +
                  kv_head_ * p.v_head_stride,
              p.k_token_stride, p.v_token_stride, static_cast<int>(p.tile_tokens) - first};
    }

   private:
    const TileChunks& source_;
    int kv_head_;
  };

  template <typename Row>
  __device__ __forceinline__ void append(const Keys&, int64_t, int, Row&) const {}

  __device__ __forceinline__ void load_query(const Keys& keys, int64_t b, int kv_head, T* query,
                                             int row_elements) const {
    load_normed_query(p, keys.token, b, kv_head, query, row_elements);
  }
};

template <typename Element>
TileChunks<Element> tile_chunks(const CrossAttentionParams& p) {
  return {p, static_cast<int>(ceil_div<int64_t>(p.tile_tokens, kChunkKeys))};
}

}  // namespace

int64_t cross_cluster_blocks(const CrossAttentionParams& p) {
  int64_t blocks = 0;
  dispatch_half(p.dtype, [&](auto element) {
    return dispatch_head_dim(p.head_dim, [&](auto head_dim) {
      blocks = held_cluster_blocks<head_dim()>(tile_chunks<decltype(element)>(p), p);
      return cudaSuccess;
    });
  });
  return blocks;
}

cudaError_t cross_decode_cluster(const CrossAttentionParams& p, int64_t blocks,
                                 CUstream_st* stream) {
  if (p.tiles * ceil_div<int64_t>(p.tile_tokens, kChunkKeys) > INT32_MAX - kStrands) {
    return cudaErrorInvalidValue;
  }
  return dispatch_half(p.dtype, [&](auto element) {
    return dispatch_head_dim(p.head_dim, [&](auto head_dim) {
      return launch_split_kv_cluster<head_dim()>(tile_chunks<decltype(element)>(p), p, blocks,
                                                 stream);
    });
  });
}

}  // namespace mllama
