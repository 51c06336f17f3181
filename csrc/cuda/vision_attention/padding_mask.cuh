// The mask of vision attention: only (padding query, padding key) pairs are hidden.
#pragma once

#include "../../vision_attention.h"
#include "../attention/tile_sm80.cuh"

namespace mllama {

// Per key block, in shared memory: 8 bytes of padding flags and its place in the list of visited
// blocks.
constexpr int64_t padding_mask_bytes(const VisionAttentionParams& p, int64_t block_keys) {
  return p.padding == nullptr
             ? 0
             : ceil_div(p.seqlen, block_keys) * int64_t{sizeof(uint64_t) + sizeof(int32_t)};
}

// The mask policy of core_sm80.cuh: rows and keys are tokens of one sequence, and a pair is hidden
// if both are padding. It is the same with keys as rows and queries as columns.
template <typename Config>
class PaddingMask {
 public:
  static constexpr bool kHidesRows = false;

  // Called by all threads of the block. `padding`: the sequence's flags, or null; `shared`:
  // padding_mask_bytes() bytes.
  __device__ __forceinline__ PaddingMask(const bool* padding, int first_row, int seqlen,
                                         char* shared)
      : shared_(shared),
        seqlen_(seqlen),
        visits_((seqlen + Config::kBlockN - 1) / Config::kBlockN) {
    if (padding == nullptr) return;
    const int row = first_row + threadIdx.x;
    const bool valid = threadIdx.x < Config::kBlockM && row < seqlen;
    const bool padded = valid && padding[row];
    if (!__syncthreads_or(padded)) return;
    flags_ = kSomePadded | (__syncthreads_and(padded || !valid) ? kAllPadded : 0);
#pragma unroll
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      const int slot_row = first_row + Config::row_of_slot(slot);
      if (slot_row < seqlen && padding[slot_row]) flags_ |= 1u << slot;
    }
    const int blocks = visits_;
    for (int block = warp_uniform(threadIdx.x / kWarpSize); block < blocks;
         block += Config::kThreads / kWarpSize) {
      const uint64_t bits = padding_bits(padding, block);
      if (threadIdx.x % kWarpSize == 0) block_padding()[block] = bits;
    }
    __syncthreads();
    if (flags_ & kAllPadded) visits_ = list_visited(blocks);
  }

  __device__ __forceinline__ int next() {
    const int visit = visit_++;
    if (visit >= visits_) return kNoBlock;
    return flags_ & kAllPadded ? visited_blocks()[visit] : visit;
  }

  __device__ __forceinline__ bool enter(int block) {
    tail_ = tail_bits(block);
    hidden_ = flags_ & kSomePadded ? block_padding()[block] : 0;
    const bool masked = (tail_ | hidden_) != 0;
    tail_ >>= Config::first_column();
    hidden_ >>= Config::first_column();
    return masked;
  }

  __device__ __forceinline__ bool visible(int slot, int offset) const {
    const uint64_t hidden = tail_ | ((flags_ >> slot & 1) ? hidden_ : 0);
    return (hidden >> offset & 1) == 0;
  }

  __device__ __forceinline__ bool sees(int) const { return true; }

 private:
  static_assert(Config::kBlockN <= 64, "a block's keys are bits of one word");
  // Among the query rows of the block: blocks of padding keys are skipped if all are padding.
  static constexpr unsigned kSomePadded = 1u << 30, kAllPadded = 1u << 31;
  static constexpr uint64_t kAllKeys = ~uint64_t{0} >> (64 - Config::kBlockN);

  // Keys of the block behind the sequence's end.
  __device__ __forceinline__ uint64_t tail_bits(int block) const {
    const int keys = seqlen_ - block * Config::kBlockN;
    return keys >= Config::kBlockN ? 0 : kAllKeys & (kAllKeys << keys);
  }

  // Padding keys of the block; the same in all lanes.
  __device__ __forceinline__ uint64_t padding_bits(const bool* padding, int block) const {
    uint64_t bits = 0;
#pragma unroll
    for (int i = 0; i < Config::kBlockN; i += kWarpSize) {
      const int offset = i + threadIdx.x % kWarpSize, key = block * Config::kBlockN + offset;
      const bool padded = offset < Config::kBlockN && key < seqlen_ && padding[key];
      bits |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, padded)) << i;
    }
    return bits;
  }

  // Lists the blocks that hold any key for a padding query; every warp writes the same.
  __device__ __forceinline__ int list_visited(int blocks) const {
    const int lane = threadIdx.x % kWarpSize;
    int count = 0;
    for (int first = 0; first < blocks; first += kWarpSize) {
      const int block = first + lane;
      const bool visited =
          block < blocks && (block_padding()[block] | tail_bits(block)) != kAllKeys;
      const unsigned ballot = __ballot_sync(0xffffffffu, visited);
      if (threadIdx.x < kWarpSize && visited)
        visited_blocks()[count + __popc(ballot & ((1u << lane) - 1))] = block;
      count += __popc(ballot);
    }
    __syncthreads();
    return count;
  }

  __device__ __forceinline__ uint64_t* block_padding() const {
    return reinterpret_cast<uint64_t*>(shared_);
  }
  __device__ __forceinline__ int32_t* visited_blocks() const {
    return reinterpret_cast<int32_t*>(block_padding() +
                                      (seqlen_ + Config::kBlockN - 1) / Config::kBlockN);
  }

  char* shared_;
  int seqlen_;
  int visits_, visit_ = 0;
  unsigned flags_ = 0;              // bit s: query row of slot s is padding; and those above
  uint64_t tail_ = 0, hidden_ = 0;  // of the entered block, from this thread's first column
};

// Of each key block: a bit per padding key, and its place in the list of visited blocks.
template <int kBlockN>
struct BlockPadding {
  static constexpr int kWords = (kBlockN + 31) / 32;
  uint32_t words[kWords];
  int visit;
};

// The same for blocks of more than 64 keys (attend_sm90): bits in words of 32, and the end of the
// sequence as a number of keys. With 64 keys this takes more registers than the above: the
// gradients of keys spill at head dim 128.
template <typename Config>
class WidePaddingMask {
 public:
  static constexpr bool kHidesRows = false;
  using Padding = BlockPadding<Config::kBlockN>;

  // Called by all threads of the block. `padding`: the sequence's flags, or null; `blocks`: shared
  // memory for as many as the sequence has key blocks, unless it is null.
  __device__ __forceinline__ WidePaddingMask(const bool* padding, int first_row, int seqlen,
                                             Padding* blocks)
      : blocks_(blocks),
        seqlen_(seqlen),
        visits_((seqlen + Config::kBlockN - 1) / Config::kBlockN) {
    if (padding == nullptr) return;
    const int row = first_row + static_cast<int>(threadIdx.x);
    const bool valid = threadIdx.x < Config::kBlockM && row < seqlen;
    const bool padded = valid && padding[row];
    if (!__syncthreads_or(padded)) return;
    skips_ = __syncthreads_and(padded || !valid);
#pragma unroll
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      const int slot_row = first_row + Config::row_of_slot(slot);
      if (slot_row < min(first_row + Config::kBlockM, seqlen) && padding[slot_row]) {
        padded_rows_ |= 1u << slot;
      }
    }
    padded_warp_ = __any_sync(0xffffffffu, padded_rows_ != 0);
    read_padding(padding);
    __syncthreads();
    if (skips_) visits_ = list_visited();
  }

  __device__ __forceinline__ int next() {
    const int visit = visit_++;
    if (visit >= visits_) return kNoBlock;
    return skips_ ? blocks_[visit].visit : visit;
  }

  __device__ __forceinline__ bool enter(int block) {
    const int keys = seqlen_ - block * Config::kBlockN;
    keys_ = keys - Config::first_column();
    uint32_t any = 0;
#pragma unroll
    for (int word = 0; word < Padding::kWords; ++word) {
      const uint32_t bits = padded_warp_ ? blocks_[block].words[word] : 0;
      any |= bits;
      hidden_[word] = bits >> Config::first_column();
    }
    return any != 0 || keys < Config::kBlockN;
  }

  __device__ __forceinline__ bool visible(int slot, int offset) const {
    const uint32_t row = padded_rows_ >> slot & 1;
    return offset < keys_ && (hidden_[offset / 32] >> offset % 32 & row) == 0;
  }

 private:
  __device__ __forceinline__ void read_padding(const bool* padding) const {
    const int lane = threadIdx.x % kWarpSize;
    const int words = visits_ * Padding::kWords;
    for (int i = warp_uniform(threadIdx.x / kWarpSize); i < words;
         i += Config::kThreads / kWarpSize) {
      const int block = i / Padding::kWords, offset = i % Padding::kWords * 32 + lane;
      const int key = block * Config::kBlockN + offset;
      const bool padded = offset < Config::kBlockN && key < seqlen_ && padding[key];
      const uint32_t bits = __ballot_sync(0xffffffffu, padded);
      if (lane == 0) blocks_[block].words[i % Padding::kWords] = bits;
    }
  }

  // Lists the blocks that hold any key for a padding query.
  __device__ __forceinline__ int list_visited() const {
    const int lane = threadIdx.x % kWarpSize;
    int count = 0;
    for (int first = 0; first < visits_; first += kWarpSize) {
      const int block = first + lane;
      bool visited = false;
      if (block < visits_) {
        int keys = min(seqlen_ - block * Config::kBlockN, Config::kBlockN);
        for (const uint32_t bits : blocks_[block].words) keys -= __popc(bits);
        visited = keys > 0;
      }
      const unsigned ballot = __ballot_sync(0xffffffffu, visited);
      if (threadIdx.x < kWarpSize && visited) {
        blocks_[count + __popc(ballot & ((1u << lane) - 1))].visit = block;
      }
      count += __popc(ballot);
    }
    __syncthreads();
    return count;
  }

  Padding* blocks_;
  int seqlen_;
  int visits_, visit_ = 0;
  bool skips_ = false;                // the block's queries are all padding
  bool padded_warp_ = false;          // some of the warp's are
  unsigned padded_rows_ = 0;          // a bit per slot
  uint32_t hidden_[Padding::kWords];  // of the entered block, from the thread's first column
  int keys_ = 0;                      // likewise
};

}  // namespace mllama
