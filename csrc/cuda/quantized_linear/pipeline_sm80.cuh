// Keeps slabs of a packed weight coming through a ring of buffers in shared memory by asynchronous
// copies (sm_80).
#pragma once

#include "../common/ptx.cuh"
#include "weight.cuh"

namespace mllama {

// All threads copy, in the order of memory, and meet once per slab.
template <Family kFamily, int kStages>
class AsyncSlabRing {
 public:
  __device__ __forceinline__ AsyncSlabRing(const WeightShare<QuantizedCall>& share,
                                           char (&slabs)[kStages][slab_bytes(kFamily)])
      : share_(share), slabs_(slabs) {
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) copy_next();
  }

  // The next slab, which the block may read until it calls wait() again.
  __device__ __forceinline__ const char* wait() {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // landed for all threads, and all are done with the slab before
    copy_next();
    const char* const slab = slabs_[used_];
    used_ = used_ + 1 == kStages ? 0 : used_ + 1;
    return slab;
  }
  __device__ __forceinline__ void release() {}

 private:
  // One group per slab, empty behind the last, so that the waits count alike.
  __device__ __forceinline__ void copy_next() {
    if (!cursor_.done(share_)) {
      const QuantizedCall& p = share_.p;
      const int begin = cursor_.chunk * p.half_bytes;
      const int bytes = min(p.row_bytes - begin, p.half_bytes);
      const int end = cursor_.pass_end(share_);
      const uint32_t target = shared_address(slabs_[filled_]);
#pragma unroll
      for (int half = 0; half < kSlabHalves; ++half) {
        const int tile = cursor_.tile + half / 2;
        if (tile >= end || half % 2 >= share_.halves(tile)) continue;
        const uint8_t* const source =
            p.w.packed + share_.row(tile, half % 2) / kEight * p.eight_bytes + begin;
        for (int at = threadIdx.x * 16; at < bytes; at += kSlabThreads * 16) {
          cp_async_16(target + half * half_stride(kFamily) + at, source + at, true);
        }
      }
      cursor_.advance(share_);
      filled_ = filled_ + 1 == kStages ? 0 : filled_ + 1;
    }
    cp_async_commit();
  }

  const WeightShare<QuantizedCall>& share_;
  char (&slabs_)[kStages][slab_bytes(kFamily)];
  SlabCursor<kQuantizedSlabTiles> cursor_;
  int filled_ = 0, used_ = 0;
};

}  // namespace mllama
