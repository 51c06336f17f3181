// Keeps slabs of the weight coming through a ring of buffers in shared memory by asynchronous
// copies (sm_80).
#pragma once

#include "../common/ptx.cuh"
#include "../common/reduce.cuh"
#include "weights.cuh"

namespace mllama {

// Each warp copies the elements it will use itself, so that no warp ever waits for another.
class AsyncRing {
 public:
  static constexpr int kStages = 5;  // with the rest below the 99 KB of sm_86 and sm_89

  __device__ __forceinline__ AsyncRing(const SkinnyShare& share, char* slabs)
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
      constexpr int kRowChunks = kWarpDepth / 8;
      const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
      const int chunk = lane % kRowChunks, k = cursor_.chunk * kSlabDepth + warp * kWarpDepth;
      const bool inside = k + chunk * 8 < share_.depth();
      const uint32_t target = shared_address(slabs_ + filled_ * kSlabBytes + warp * kWarpBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool present = inside && half < share_.halves(cursor_.tile);
        const int64_t first_row = share_.row(cursor_.tile, half);
        const int columns = share_.columns_from(cursor_.tile) - (share_.p.swiglu ? 0 : half * 8);
#pragma unroll
        for (int i = 0; i < kHalfRows; i += kWarpSize / kRowChunks) {
          const int row = i + lane / kRowChunks;
          const bool valid = present && row < columns;
          const char* source = static_cast<const char*>(share_.p.weight);
          if (valid) source += ((first_row + row) * share_.p.weight_row_stride + k + chunk * 8) * 2;
          cp_async_16(target + half * kHalfBytes + chunk_offset(row, chunk), source, valid);
        }
      }
      cursor_.advance(share_);
      filled_ = filled_ + 1 == kStages ? 0 : filled_ + 1;
    }
    cp_async_commit();
  }

  const SkinnyShare& share_;
  char* slabs_;
  SlabCursor<1> cursor_;
  int filled_ = 0, used_ = 0;
};

}  // namespace mllama
