// Tensor copies of slabs of a weight, for the ring of few_rows/ring_sm90.cuh.
#pragma once

#include "../common/tensor_map.h"
#include "../few_rows/ring_sm90.cuh"
#include "weights.cuh"

namespace mllama {

// A half per instruction: weight (rows, k) seen as (k / 64, rows, 64), in boxes of 8 x 8 x 64. Bulk
// copies of single rows need no tensor map, but 16 instructions per slab, about as long as the slab
// takes to arrive.
struct TensorCopier {
  const SkinnyShare& share;
  const CUtensorMap& weight;

  __device__ __forceinline__ void prepare() const { prefetch_tensor_map(&weight); }
  __device__ __forceinline__ void request(char* slab, const SlabCursor<1>& cursor, uint64_t* full,
                                          uint64_t policy) const {
    const int halves = share.halves(cursor.tile);
    mbarrier_arrive_expect(full, halves * kHalfBytes);
    const auto copy = [&](int half) {
      tensor_copy_with_policy(slab + half * kHalfBytes, &weight, full, 0,
                              share.row(cursor.tile, half),
                              cursor.chunk * (kSlabDepth / kWarpDepth), policy);
    };
    copy(0);
    if (halves == 2) copy(1);
  }
};

using TensorRingShared = CopyRingShared<6, kSlabBytes, 1024>;
template <NextKernel kNext>
using TensorRing = CopyRing<1, kNext, SkinnyShare, TensorRingShared, TensorCopier>;

}  // namespace mllama
