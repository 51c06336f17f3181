// Which keys a row of a causal sequence sees.
#pragma once

#include "../common/reduce.cuh"
#include "../common/softmax.cuh"
#include "tile_size.h"

namespace mllama {

template <typename Config>
class CausalMask {
 public:
  static constexpr bool kHidesRows = false;

  // Row r of the sequence (`group` per token) sees keys 0 .. past + r / group.
  __device__ __forceinline__ CausalMask(int first_row, int rows, int group, int past) {
    const int last_row = min(first_row + Config::kBlockM, rows) - 1;
    const int warp_row = static_cast<int>(threadIdx.x) / kWarpSize * Config::kRowsPerWarp;
    blocks_ = (past + last_row / group) / Config::kBlockN + 1;
    unmasked_ = (past + (first_row + warp_row) / group + 1) / Config::kBlockN;
#pragma unroll
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      last_[slot] = past + (first_row + Config::row_of_slot(slot)) / group - Config::first_column();
    }
  }

  __device__ __forceinline__ int next() { return next_ < blocks_ ? next_++ : kNoBlock; }

  __device__ __forceinline__ bool enter(int block) {
    first_key_ = block * Config::kBlockN;
    return block >= unmasked_;
  }

  __device__ __forceinline__ bool visible(int slot, int offset) const {
    return offset <= last_[slot] - first_key_;
  }
  __device__ __forceinline__ bool sees(int) const { return true; }

 private:
  int next_ = 0, blocks_;
  int unmasked_;              // blocks that every row of the warp sees whole
  int last_[Config::kSlots];  // the key each row sees last, counted from the first column
  int first_key_ = 0;         // of the entered block
};

}  // namespace mllama
