// Two ways to keep slabs of the weight coming through a ring of buffers in shared memory:
// asynchronous copies (sm_80) and bulk copies (sm_90a).
#pragma once

#include "hopper.cuh"
#include "reduce.cuh"
#include "skinny_linear_slabs.cuh"

namespace mllama {

// Each warp copies the elements it will use itself, so that no warp ever waits for another.
class AsyncRing {
 public:
  static constexpr int kStages = 4;  // with the rest below the 99 KB of sm_86 and sm_89

  __device__ __forceinline__ AsyncRing(const WeightShare& share, char* slabs)
      : share_(share), slabs_(slabs) {
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) copy_next();
  }

  // The next slab, of which the warp may read its own elements until it calls wait() again.
  __device__ __forceinline__ const char* wait() {
    cp_async_wait<kStages - 2>();
    __syncwarp();  // landed for all lanes, and all are done with the slab before
    copy_next();
    const char* slab = slabs_ + used_ * kSlabBytes;
    used_ = used_ + 1 == kStages ? 0 : used_ + 1;
    return slab;
  }
  __device__ __forceinline__ void release() {}

 private:
  // One group per slab, empty behind the last, so that the waits count alike.
  __device__ __forceinline__ void copy_next() {
    if (!cursor_.done(share_)) {
      constexpr int kRowLanes = kWarpDepth * 2 / 16;
      const int lane = threadIdx.x % kWarpSize;
      const int byte = threadIdx.x / kWarpSize * (kWarpDepth * 2) + lane % kRowLanes * 16;
      const bool inside = byte < cursor_.row_bytes(share_);
      const uint32_t slab = shared_address(slabs_ + filled_ * kSlabBytes) + byte;
#pragma unroll
      for (int row = lane / kRowLanes; row < kSlabRows; row += kWarpSize / kRowLanes) {
        bool valid;
        const char* source = cursor_.row(share_, row, valid);
        valid &= inside;
        cp_async_16(slab + row * kSlabRowBytes, valid ? source + byte : share_.p.weight, valid);
      }
      cursor_.advance(share_);
      filled_ = filled_ + 1 == kStages ? 0 : filled_ + 1;
    }
    cp_async_commit();
  }

  const WeightShare& share_;
  char* slabs_;
  SlabCursor cursor_;
  int filled_ = 0, used_ = 0;
};

struct BulkRingShared {
  static constexpr int kStages = 6;
  alignas(128) char slabs[kStages][kSlabBytes];
  uint64_t full[kStages], empty[kStages];
};

// The first warp requests the slabs of all with bulk copies, one row per lane, and refills a buffer
// as soon as the slowest warp has done with it. A warp of its own for that would leave the others
// fewer registers: 96 instead of 128 with two blocks per multiprocessor.
class BulkRing {
 public:
  // All threads of the block. Reads the weight behind wait_for_previous_kernel() only, unless that
  // is constant.
  __device__ __forceinline__ BulkRing(const WeightShare& share, BulkRingShared& shared,
                                      bool weight_is_constant)
      : share_(share), shared_(shared) {
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < BulkRingShared::kStages; ++i) {
        mbarrier_init(&shared_.full[i], 1);
        mbarrier_init(&shared_.empty[i], kSlabWarps);
      }
      fence_mbarrier_init();
    }
    __syncthreads();
    if (!weight_is_constant) wait_for_previous_kernel();
    if (warp_uniform(threadIdx.x / kWarpSize) == 0) {
      for (int i = 0; i < BulkRingShared::kStages && !cursor_.done(share_); ++i) copy_next(i);
    }
    wait_for_previous_kernel();
    start_next_kernel();
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
    if (warp_uniform(threadIdx.x / kWarpSize) == 0 && !cursor_.done(share_)) {
      mbarrier_wait(empty, position_.parity);
      copy_next(position_.stage);
    }
    position_.advance();
  }

 private:
  __device__ __forceinline__ void copy_next(int stage) {
    const int lane = threadIdx.x % kWarpSize;
    const int bytes = cursor_.row_bytes(share_);
    uint64_t* const full = &shared_.full[stage];
    if (lane == 0) mbarrier_arrive_expect(full, cursor_.rows(share_) * bytes);
    __syncwarp();
    bool valid;
    const char* row = cursor_.row(share_, lane % kSlabRows, valid);
    if (lane < kSlabRows && valid) {
      bulk_copy(shared_.slabs[stage] + lane * kSlabRowBytes, row, bytes, full, policy_);
    }
    cursor_.advance(share_);
  }

  const WeightShare& share_;
  BulkRingShared& shared_;
  const uint64_t policy_ = l2_evict_first();
  SlabCursor cursor_;
  RingPosition<BulkRingShared::kStages> position_;
};

}  // namespace mllama
