// The query rows that see one image tile, for the gradients of its keys
// (backward.cu): over all sequences that have the tile, in
// blocks of rows, those that no row sees left out.
#pragma once

#include "../../cross_attention.h"
#include "../attention/backward_sm80.cuh"
#include "../common/ragged.cuh"

namespace mllama {

// The keys, and the sequence whose rows are visited: in shared memory, for each
// warp by itself.
template <typename T>
struct TileRowsState {
  int64_t slot, kv_head, first_key;
  int64_t entry;  // of the tile table, or -1
  BackwardRows<T> rows;
  const bool* flags;  // of the sequence's first token for the tile; null: all see it
};

// Rows and mask policy of add_up_keys.
template <typename Config>
class TileRows {
 public:
  using T = typename Config::T;
  using Params = CrossAttentionBackwardParams;

  __device__ __forceinline__ TileRows(const Params& p, int slot, int kv_head, int first_key,
                                      const float2* statistics, const T* normed_q,
                                      TileRowsState<T>& state)
      : p_(p), statistics_(statistics), normed_q_(normed_q), state_(state) {
    if (threadIdx.x % kWarpSize == 0) {
      state.slot = slot;
      state.kv_head = kv_head;
      state.first_key = first_key;
      state.entry = -1;
    }
    __syncwarp();
  }

  // All warps of the block come to the same answers.
  __device__ __forceinline__ int next() {
    while (seen_ == 0) {
      if (first_block_ < blocks_) {
        look_at_blocks();
      } else if (!find_sequence_with_tile()) {
        return kNoBlock;
      }
    }
    const int bit = __ffs(seen_) - 1;
    seen_ &= seen_ - 1;
    all_see_ = all_ >> bit & 1;
    return first_block_ - kWarpSize + bit;
  }

  // Rows that do not see the tile are not found: no score needs a mask.
  __device__ __forceinline__ bool enter(int) const { return false; }
  __device__ __forceinline__ bool visible(int, int) const { return true; }

  __device__ __forceinline__ bool find(int block, int offset, const T*& q, const T*& grad_out,
                                       const float2*& statistics) const {
    const BackwardRows<T>& rows = state_.rows;
    const int row = block * Config::kBlockN + offset;
    if (!rows.valid(row) || !(all_see_ || sees(rows.token(row)))) return false;
    q = rows.q_row(row);
    grad_out = rows.grad_row(row);
    statistics = rows.statistics + row;
    return true;
  }

 private:
  __device__ __forceinline__ bool sees(int token) const {
    return state_.flags == nullptr || state_.flags[token * p_.tile_mask_row_stride];
  }

  // The next 32 blocks of rows, one to a lane.
  __device__ __forceinline__ void look_at_blocks() {
    const BackwardRows<T>& rows = state_.rows;
    const int block = first_block_ + static_cast<int>(threadIdx.x) % kWarpSize;
    bool any = false, all = true;
    if (block < blocks_) {
      const int first = block * Config::kBlockN;
      const int last = rows.token(min(first + Config::kBlockN, rows.count) - 1);
      for (int token = rows.token(first); token <= last; ++token) {
        const bool seen = sees(token);
        any |= seen;
        all &= seen;
      }
    }
    seen_ = __ballot_sync(0xffffffffu, any);
    all_ = __ballot_sync(0xffffffffu, all);
    first_block_ += kWarpSize;
  }

  // Goes on to the next entry of the tile table that names the slot.
  __device__ __forceinline__ bool find_sequence_with_tile() {
    const int tiles = static_cast<int>(p_.tiles), entries = static_cast<int>(p_.batch) * tiles;
    const int slot = static_cast<int>(state_.slot), previous = static_cast<int>(state_.entry);
    int entry = kNoBlock;
    if (p_.tile_table == nullptr) {
      if (previous < 0) entry = slot;
    } else {
      for (int first = previous + 1; first < entries && entry == kNoBlock; first += kWarpSize) {
        const int mine = first + static_cast<int>(threadIdx.x) % kWarpSize;
        const unsigned found =
            __ballot_sync(0xffffffffu, mine < entries && p_.tile_table[mine] == slot);
        if (found != 0) entry = first + __ffs(found) - 1;
      }
    }
    if (entry == kNoBlock) return false;
    const int64_t b = entry / tiles;
    const SequenceRows sequence = sequence_rows(p_.cu_seqlens, b, p_.max_seqlen, p_.tokens);
    const int group = static_cast<int>(p_.num_q_heads / p_.num_kv_heads);
    const int count = static_cast<int>(sequence.count) * group;
    __syncwarp();  // all lanes are done with what is overwritten
    if (threadIdx.x % kWarpSize == 0) {
      const bool dense = p_.cu_seqlens == nullptr;
      const int64_t head = state_.kv_head * group;
      state_.entry = entry;
      BackwardRows<T>& rows = state_.rows;
      if (normed_q_ != nullptr) {
        rows.q = normed_q_ + (sequence.begin * p_.num_q_heads + head) * Config::kHeadDim;
        rows.q_token_stride = p_.num_q_heads * Config::kHeadDim;
        rows.q_head_stride = Config::kHeadDim;
      } else {
        rows.q = static_cast<const T*>(p_.q) + head * p_.q_head_stride +
                 (dense ? b * p_.q_batch_stride : sequence.begin * p_.q_token_stride);
        rows.q_token_stride = p_.q_token_stride;
        rows.q_head_stride = p_.q_head_stride;
      }
      rows.grad_out =
          static_cast<const T*>(p_.grad_out) + head * p_.grad_out_head_stride +
          (dense ? b * p_.grad_out_batch_stride : sequence.begin * p_.grad_out_token_stride);
      rows.grad_token_stride = p_.grad_out_token_stride;
      rows.grad_head_stride = p_.grad_out_head_stride;
      rows.statistics = statistics_ + (state_.kv_head * p_.tokens + sequence.begin) * group;
      rows.group = group;
      rows.first = 0;
      rows.count = count;
      state_.flags = p_.tile_mask == nullptr
                         ? nullptr
                         : p_.tile_mask + sequence.begin * p_.tile_mask_row_stride + entry % tiles;
    }
    __syncwarp();
    first_block_ = 0;
    blocks_ = (count + Config::kBlockN - 1) / Config::kBlockN;
    return true;
  }

  const Params& p_;
  const float2* statistics_;
  const T* normed_q_;
  TileRowsState<T>& state_;
  int first_block_ = 0,
      blocks_ = 0;  // of the sequence: the next to look at, and how many
  // Of the 32 blocks before that one: those left to visit, and those whose rows
  // all see the tile.
  unsigned seen_ = 0, all_ = 0;
  bool all_see_ = false;  // the block that next() gave
};

}  // namespace mllama
