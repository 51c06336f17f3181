// What the cross-attention kernels share: the rows of a thread block, how their queries are read,
// and which tiles they visit.
#pragma once

#include "../../cross_attention.h"
#include "../attention/sequence_queries.cuh"
#include "kernels.h"

namespace mllama {

// The rows of this thread block. Neighbouring blocks have the same kv head: they share K and V in
// L2.
struct CrossBlock {
  SequenceRows sequence;
  int64_t b, kv_head;
  int first, group;

  // Block `index` of cross_blocks().
  __device__ __forceinline__ CrossBlock(const CrossAttentionParams& p, int block_rows,
                                        unsigned index)
      : group(static_cast<int>(p.num_q_heads / p.num_kv_heads)) {
    const unsigned row_blocks =
        (static_cast<unsigned>(p.max_seqlen) * group + block_rows - 1) / block_rows;
    const unsigned kv_heads = static_cast<unsigned>(p.num_kv_heads);
    first = static_cast<int>(index % row_blocks) * block_rows;
    kv_head = index / row_blocks % kv_heads;
    b = index / row_blocks / kv_heads;
    sequence = sequence_rows(p.cu_seqlens, b, p.max_seqlen, p.tokens);
  }

  __device__ __forceinline__ bool empty() const { return first >= sequence.count * group; }

  template <typename T>
  __device__ __forceinline__ void fill(QueryRows<T>& rows, const CrossAttentionParams& p,
                                       int head_dim) const {
    locate_rows(rows, p, sequence, b, kv_head, group, head_dim);
    rows.first = first;
    rows.count = static_cast<int>(sequence.count) * group;
  }
};

constexpr int64_t cross_blocks(const CrossAttentionParams& p, int64_t block_rows) {
  return ceil_div(p.max_seqlen * (p.num_q_heads / p.num_kv_heads), block_rows) * p.num_kv_heads *
         p.batch;
}

// q as it is, or normalised.
template <typename T>
struct CrossQuery {
  NormedQuery<T> normed;

  template <typename Config>
  __device__ __forceinline__ void load(char* tile, const QueryRows<T>& rows) const {
    if (normed.weight == nullptr) {
      PlainQuery{}.load<Config>(tile, rows);
    } else {
      normed.template load<Config>(tile, rows);
    }
  }
};

// The keys of an image tile that some row of the block sees.
struct Segment {
  int tile;
  int slot;  // of the pool
  int all_see;
};

// The mask policy of core_sm80.cuh, or of attend_sm90 by segments.
template <typename Config, bool kSegmented>
class TileMask {
 public:
  static constexpr bool kHidesRows = true;
  using T = typename Config::T;

  // Called by all threads of the block. `segments` has room for all tiles; `first_token` counts
  // over all sequences, `rows` are those of the block.
  __device__ __forceinline__ TileMask(const CrossAttentionParams& p, const QueryRows<T>& rows,
                                      int64_t b, int64_t first_token, Segment* segments)
      : p_(p), rows_(rows), first_token_(first_token), segments_(segments) {
    const int tiles = static_cast<int>(p.tiles);
    blocks_per_tile_ = (static_cast<int>(p.tile_tokens) + Config::kBlockN - 1) / Config::kBlockN;
    sub_ = blocks_per_tile_ - 1;
    // First what the block's rows see of every tile, at its own place; then the unseen are squeezed
    // out.
    constexpr int kWarps = Config::kThreads / kWarpSize;
    for (int tile = warp_uniform(threadIdx.x / kWarpSize); tile < tiles; tile += kWarps) {
      const Segment segment = look_at(tile, b);
      if (threadIdx.x % kWarpSize == 0) segments[tile] = segment;
    }
    __syncthreads();
    for (int first = 0; first < tiles; first += kWarpSize) {
      const int lane = threadIdx.x % kWarpSize;
      Segment segment{0, -1, 0};
      if (first + lane < tiles) segment = segments[first + lane];
      __syncthreads();  // all have read these before one of them is overwritten
      const unsigned seen = __ballot_sync(0xffffffffu, segment.slot >= 0);
      if (threadIdx.x < kWarpSize && segment.slot >= 0) {
        segments[count_ + __popc(seen & ((1u << lane) - 1))] = segment;
      }
      count_ += __popc(seen);
    }
    __syncthreads();
  }

  // Leaves only the segment of this number, if there are so many.
  __device__ __forceinline__ void keep_segment(int segment) {
    segment_ = segment - 1;
    count_ = min(count_, segment + 1);
  }

  __device__ __forceinline__ int next() {
    const bool last = sub_ + 1 == blocks_per_tile_;
    segment_ += last;
    sub_ = last ? 0 : sub_ + 1;
    return segment_ < count_ ? segment_ << kSubBits | sub_ : kNoBlock;
  }

  __device__ __forceinline__ bool enter(int block) {
    const int segment = block >> kSubBits, sub = block & ((1 << kSubBits) - 1);
    if (sub == 0) sees_ = segments_[segment].all_see ? ~0u : rows_that_see(segments_[segment].tile);
    const int keys = static_cast<int>(p_.tile_tokens) - sub * Config::kBlockN;
    keys_ = keys - Config::first_column();
    return (!kSegmented && !segments_[segment].all_see) || keys < Config::kBlockN;
  }

  __device__ __forceinline__ bool visible(int slot, int offset) const {
    return (kSegmented || sees(slot)) && offset < keys_;
  }
  __device__ __forceinline__ bool sees(int slot) const { return sees_ >> slot & 1; }
  __device__ __forceinline__ bool begins_segment(int block) const
    requires kSegmented
  {
    return (block & ((1 << kSubBits) - 1)) == 0;
  }

 private:
  __device__ __forceinline__ bool flag(int64_t token, int tile) const {
    return p_.tile_mask == nullptr ||
           p_.tile_mask[(first_token_ + token) * p_.tile_mask_row_stride + tile];
  }

  // Whether any and all tokens of the block see the tile; slot -1 if none does. Uniform in the
  // warp.
  __device__ __forceinline__ Segment look_at(int tile, int64_t b) const {
    const int64_t slot =
        p_.tile_table == nullptr ? b * p_.tiles + tile : p_.tile_table[b * p_.tiles + tile];
    bool any = false, all = true;
    const int last = rows_.last_token(Config::kBlockM);
    for (int first = rows_.token(0); first <= last; first += kWarpSize) {
      const int token = first + threadIdx.x % kWarpSize;
      const bool sees = flag(min(token, last), tile);
      any |= sees;
      all &= sees;
    }
    any = __any_sync(0xffffffffu, any);
    all = __all_sync(0xffffffffu, all);
    const bool present = slot >= 0 && slot < p_.num_slots;  // the table is unchecked
    return {tile, any && present ? static_cast<int>(slot) : -1, all};
  }

  // Bit s: the query row of slot s sees the tile.
  __device__ __forceinline__ unsigned rows_that_see(int tile) const {
    unsigned bits = 0;
#pragma unroll
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      const int row = Config::row_of_slot(slot);
      if (rows_.valid(row) && flag(rows_.token(row), tile)) bits |= 1u << slot;
    }
    return bits;
  }

  const CrossAttentionParams& p_;
  const QueryRows<T>& rows_;
  int64_t first_token_;
  Segment* segments_;
  int count_ = 0;  // of them
  int segment_ = -1, sub_, blocks_per_tile_;
  unsigned sees_ = 0;  // of the entered tile, a bit per slot
  int keys_ = 0;       // keys of the entered block from the thread's first column on
};

}  // namespace mllama
