// Keeps slabs of the weight coming through a ring of buffers in shared memory by tensor copies
// (sm_90a).
#pragma once

#include "../common/reduce.cuh"
#include "../common/sm90.cuh"
#include "../common/tensor_map.h"
#include "weights.cuh"

namespace mllama {

// When a block lets the next kernel start, whose own ring then fills in competition with this one.
// At the start: the next ring is full long before this kernel ends, and memory rests from its last
// slab to the next kernel's first refill. Behind the last request: what this kernel still has under
// way takes about as long as the next one's launch, whose copies then follow without a gap.
enum class NextKernel { kAtStart, kBehindLastRequest };

struct TensorRingShared {
  static constexpr int kStages = 6;
  alignas(1024) char slabs[kStages][kSlabBytes];
  uint64_t full[kStages], empty[kStages];
};

// One thread requests a half per instruction: weight (rows, k) seen as (k / 64, rows, 64), in boxes
// of 8 x 8 x 64. It belongs to the first warp, which refills a buffer as soon as the slowest warp
// has done with it: a warp of its own for that would leave the others 96 registers instead of 128
// where two blocks are on a multiprocessor. Bulk copies of single rows need no tensor map, but 16
// instructions per slab, about as long as the slab takes to arrive.
template <NextKernel kNext>
class TensorRing {
 public:
  // All threads of the block. Reads the weight behind wait_for_previous_kernel() only, unless that
  // is constant.
  __device__ __forceinline__ TensorRing(const WeightShare& share, const CUtensorMap& weight,
                                        TensorRingShared& shared)
      : share_(share), weight_(weight), shared_(shared) {
    if (threadIdx.x == 0) {
      prefetch_tensor_map(&weight_);
#pragma unroll
      for (int i = 0; i < TensorRingShared::kStages; ++i) {
        mbarrier_init(&shared_.full[i], 1);
        mbarrier_init(&shared_.empty[i], kSlabWarps);
      }
      fence_mbarrier_init();
    }
    __syncthreads();
    if (!share_.p.weight_is_constant) wait_for_previous_kernel();
    if (copies_) {
#pragma unroll 1
      for (int i = 0; i < TensorRingShared::kStages && !cursor_.done(share_); ++i) copy_next(i);
    }
    wait_for_previous_kernel();
    if (kNext == NextKernel::kAtStart || requested_all()) start_next_kernel();
  }

  __device__ __forceinline__ const char* wait() {
    mbarrier_wait(&shared_.full[position_.stage], position_.parity);
    return shared_.slabs[position_.stage];
  }
  // The slab of the last wait() is no longer needed by this warp.
  __device__ __forceinline__ void release() {
    uint64_t* const empty = &shared_.empty[position_.stage];
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) mbarrier_arrive(empty);
    if (copies_ && !cursor_.done(share_)) {
      mbarrier_wait(empty, position_.parity);
      copy_next(position_.stage);
      if (kNext == NextKernel::kBehindLastRequest && requested_all()) start_next_kernel();
    }
    position_.advance();
  }

 private:
  // By the warp that copies; of a block, one thread that says so suffices.
  __device__ __forceinline__ bool requested_all() const { return copies_ && cursor_.done(share_); }

  __device__ __forceinline__ void copy_next(int stage) {
    if (elect_one()) {
      uint64_t* const full = &shared_.full[stage];
      const int halves = share_.halves(cursor_.tile);
      mbarrier_arrive_expect(full, halves * kHalfBytes);
      const auto copy = [&](int half) {
        tensor_copy_with_policy(shared_.slabs[stage] + half * kHalfBytes, &weight_, full, 0,
                                share_.row(cursor_.tile, half),
                                cursor_.chunk * (kSlabDepth / kWarpDepth), policy_);
      };
      copy(0);
      if (halves == 2) copy(1);
    }
    __syncwarp();
    cursor_.advance(share_);
  }

  const WeightShare& share_;
  const CUtensorMap& weight_;
  TensorRingShared& shared_;
  const bool copies_ = warp_uniform(threadIdx.x / kWarpSize) == 0;
  const uint64_t policy_ = l2_evict_first();
  SlabCursor cursor_;
  RingPosition<TensorRingShared::kStages> position_;
};

}  // namespace mllama
