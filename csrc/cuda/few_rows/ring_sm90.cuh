// Keeps slabs of a weight coming through a ring of buffers in shared memory by copies that a
// barrier counts (sm_90a).
#pragma once

#include "../common/reduce.cuh"
#include "../common/sm90.cuh"
#include "share.cuh"

namespace mllama {

// When a block lets the next kernel start, whose own ring then fills in competition with this one.
// At the start: the next ring is full long before this kernel ends, and memory rests from its last
// slab to the next kernel's first refill. Behind the last request: what this kernel still has under
// way takes about as long as the next one's launch, whose copies then follow without a gap.
enum class NextKernel { kAtStart, kBehindLastRequest };

template <int kSlots, int kSlabBytes, int kAlignment>
struct CopyRingShared {
  static constexpr int kStages = kSlots;
  alignas(kAlignment) char slabs[kStages][kSlabBytes];
  uint64_t full[kStages], empty[kStages];
};

// One thread requests. It belongs to the first warp, which refills a buffer as soon as the slowest
// warp has done with it: a warp of its own for that would leave the others 96 registers instead of
// 128 where two blocks are on a multiprocessor.
// Copier: prepare(), and request(slab, cursor, barrier) of the slab that a cursor is at.
template <int kSlabTiles, NextKernel kNext, typename Share, typename Shared, typename Copier>
class CopyRing {
  static constexpr int kStages = Shared::kStages;

 public:
  // All threads of the block. Reads the weight behind wait_for_previous_kernel() only, unless that
  // is constant.
  __device__ __forceinline__ CopyRing(const Share& share, const Copier& copier, Shared& shared)
      : share_(share), copier_(copier), shared_(shared) {
    if (threadIdx.x == 0) {
      copier_.prepare();
#pragma unroll
      for (int i = 0; i < kStages; ++i) {
        mbarrier_init(&shared_.full[i], 1);
        mbarrier_init(&shared_.empty[i], kSlabWarps);
      }
      fence_mbarrier_init();
    }
    __syncthreads();
    if (!share_.p.weight_is_constant) wait_for_previous_kernel();
    if (copies_) {
#pragma unroll 1
      for (int i = 0; i < kStages && !cursor_.done(share_); ++i) copy_next(i);
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
    if (elect_one()) copier_.request(shared_.slabs[stage], cursor_, &shared_.full[stage], policy_);
    __syncwarp();
    cursor_.advance(share_);
  }

  const Share& share_;
  const Copier& copier_;
  Shared& shared_;
  const bool copies_ = warp_uniform(threadIdx.x / kWarpSize) == 0;
  const uint64_t policy_ = l2_evict_first();
  SlabCursor<kSlabTiles> cursor_;
  RingPosition<kStages> position_;
};

}  // namespace mllama
