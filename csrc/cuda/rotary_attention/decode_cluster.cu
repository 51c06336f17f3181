// Decode attention over a paged cache in one launch (decode_cluster.cuh), the append included:
// the warp that has the new token's key rotates it, writes it and its value to the cache, and takes
// both from shared memory when it comes to their chunk. Nobody reads them from global memory in the
// same launch, so nothing orders the two.
//
// Pages      A page holds a multiple of 16 keys, so a chunk never leaves its page. A warp looks its
//            next 32 chunks of a strand up at once, a lane each, and the 32 after them before it
//            needs them; the first lookup does not wait for the length.
// Aliasing   Reads q, k and v, reads and writes the caches, writes out; none of these may overlap.

#include "../attention/decode_cluster.cuh"
#include "../common/dispatch.cuh"
#include "../common/rope.cuh"
#include "decode_queries.cuh"
#include "kernels.h"

namespace mllama {
namespace {

template <typename Element>
struct PagedChunks {
  using T = Element;

  RotaryAttentionParams p;

  int64_t shared_ints() const { return 0; }

  struct Keys {
    int64_t token;  // the sequence's row, or -1
    int length;     // with the new key
    int chunks;
    int appended;
  };

  __device__ __forceinline__ Keys open(int64_t b, int*) const {
    if (b >= p.batch) return {-1, 0, 0, -1};
    const int64_t past = p.cache_lens[b];
    const SequenceRows rows = sequence_rows(p.cu_seqlens, b, 1, p.tokens);
    if (rows.count == 0) return {-1, 0, 0, -1};
    const int64_t capacity = p.max_pages * p.page_size;
    if (past < 0) return {rows.begin, 0, 0, -1};  // unchecked, like the page table
    const int length = static_cast<int>(min(past + 1, capacity));
    return {rows.begin, length, (length + kChunkKeys - 1) / kChunkKeys,
            past < capacity ? static_cast<int>(past) / kChunkKeys : -1};
  }

  class Reader {
   public:
    __device__ __forceinline__ Reader(const PagedChunks& source, int64_t b, int kv_head, int first,
                                      int next_strand)
        : p_(source.p), b_(b), kv_head_(kv_head), next_strand_(next_strand) {
      now_ = next_ = look_up(first);
    }

    __device__ __forceinline__ KeyRun<T> run(const Keys& keys, int chunk) {
      const int ahead = chunk - now_.first;
      if (ahead < 0 || ahead % kStrands != 0 || ahead >= kWarpSize * kStrands) now_ = next_;
      if (next_.first == now_.first) next_ = look_up(behind(now_.first, keys.chunks));
      const int lane = (chunk - now_.first) / kStrands;
      const int64_t page = __shfl_sync(0xffffffffu, now_.page, lane);
      const int row = __shfl_sync(0xffffffffu, now_.row, lane);
      const T* k = static_cast<const T*>(p_.k_cache);
      const T* v = static_cast<const T*>(p_.v_cache);
      // The table is unchecked: a page outside the cache has no visible key.
      if (page < 0 || page >= p_.num_pages) return {k, v, 0, 0, 0};
      const int64_t offset =
          ((page * p_.num_kv_heads + kv_head_) * p_.page_size + row) * p_.head_dim;
      return {k + offset, v + offset, p_.head_dim, p_.head_dim, keys.length - chunk * kChunkKeys};
    }

   private:
    // Lane l: the page of chunk first + l * kStrands, and the row in it where the chunk starts.
    struct Window {
      int first, page, row;
    };

    // 32 bits: the launch has checked that the capacity is below 2^31.
    __device__ __forceinline__ Window look_up(int first) const {
      const unsigned page_size = static_cast<unsigned>(p_.page_size);
      const unsigned key = (first + threadIdx.x % kWarpSize * kStrands) * kChunkKeys;
      const unsigned slot = key / page_size;
      const bool valid = b_ < p_.batch && slot < p_.max_pages;
      return {first, valid ? p_.page_table[b_ * p_.max_pages + slot] : -1,
              static_cast<int>(key - slot * page_size)};
    }

    __device__ __forceinline__ int behind(int first, int chunks) const {
      const int next = first + kWarpSize * kStrands;
      return next < chunks ? next : first % kStrands + next_strand_;
    }

    const RotaryAttentionParams& p_;
    int64_t b_;
    int kv_head_, next_strand_;
    Window now_, next_;  // with the same `first`: the next one has not been looked up yet
  };

  template <int kHeadDim>
  __device__ __forceinline__ void append(const Keys& keys, int64_t b, int kv_head,
                                         AppendedRow<T, kHeadDim>& row) const {
    constexpr int kSize = Vec<T>::kSize, kRopeChunks = kHeadDim / 2 / kSize;
    static_assert(3 * kRopeChunks <= kWarpSize, "lanes for a key row and a value row");
    const unsigned page_size = static_cast<unsigned>(p.page_size);
    const unsigned position = keys.length - 1, slot = position / page_size;
    const int64_t page = p.page_table[b * p.max_pages + slot];
    if (page < 0 || page >= p.num_pages) return;

    const int lane = threadIdx.x % kWarpSize;
    if (lane < kRopeChunks) {
      const RopeChunk<T> at(lane, kHeadDim, p.interleaved);
      const T* k =
          new_row(p.k, p.k_batch_stride, p.k_token_stride, p.k_head_stride, keys, b, kv_head);
      const int64_t angles = keys.token % p.cos_rows;
      Vec<T> first = load_vec(k + at.first), second = load_vec(k + at.second);
      rotate_chunk(
          first, second,
          load_vec(static_cast<const T*>(p.cos) + angles * p.cos_row_stride + lane * kSize),
          load_vec(static_cast<const T*>(p.sin) + angles * p.sin_row_stride + lane * kSize),
          p.interleaved);
      store_vec(row.k + at.first, first);
      store_vec(row.k + at.second, second);
    } else if (lane < 3 * kRopeChunks) {
      const int column = (lane - kRopeChunks) * kSize;
      const T* v =
          new_row(p.v, p.v_batch_stride, p.v_token_stride, p.v_head_stride, keys, b, kv_head);
      store_vec(row.v + column, load_vec(v + column));
    }
    __syncwarp();
    const int64_t target =
        ((page * p.num_kv_heads + kv_head) * p.page_size + (position - slot * page_size)) *
        kHeadDim;
    const int column = lane % 16 * kSize;
    if (column < kHeadDim) {
      store_vec(static_cast<T*>(lane < 16 ? p.k_cache : p.v_cache) + target + column,
                load_vec((lane < 16 ? row.k : row.v) + column));
    }
  }

  __device__ __forceinline__ void load_query(const Keys& keys, int64_t b, int kv_head, T* query,
                                             int row_elements) const {
    load_rotated_query(p, keys.token, b, kv_head, query, row_elements);
  }

  // The sequence's row of k or v.
  __device__ __forceinline__ const T* new_row(const void* base, int64_t batch_stride,
                                              int64_t token_stride, int64_t head_stride,
                                              const Keys& keys, int64_t b, int kv_head) const {
    return static_cast<const T*>(base) +
           (p.cu_seqlens == nullptr ? b * batch_stride : keys.token * token_stride) +
           kv_head * head_stride;
  }
};

}  // namespace

int64_t rotary_cluster_blocks(const RotaryAttentionParams& p) {
  int64_t blocks = 0;
  dispatch_half(p.dtype, [&](auto element) {
    return dispatch_head_dim(p.head_dim, [&](auto head_dim) {
      blocks = held_cluster_blocks<head_dim()>(PagedChunks<decltype(element)>{p}, p);
      return cudaSuccess;
    });
  });
  return blocks;
}

cudaError_t rotary_decode_cluster(const RotaryAttentionParams& p, int64_t blocks,
                                  CUstream_st* stream) {
  return dispatch_half(p.dtype, [&](auto element) {
    return dispatch_head_dim(p.head_dim, [&](auto head_dim) {
      const PagedChunks<decltype(element)> source{p};
      return launch_split_kv_cluster<head_dim()>(source, p, blocks, stream);
    });
  });
}

}  // namespace mllama
