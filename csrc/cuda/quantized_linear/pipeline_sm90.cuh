// Bulk copies of slabs of a packed weight, for the ring of few_rows/ring_sm90.cuh.
#pragma once

#include "../few_rows/ring_sm90.cuh"
#include "weight.cuh"

namespace mllama {

// A copy per half of a tile: its blocks stand one behind the other in memory.
template <Family kFamily>
class BulkCopier {
 public:
  __device__ __forceinline__ explicit BulkCopier(const WeightShare<QuantizedCall>& share)
      : share_(share),
        first_(share.p.w.packed + share.row(0, 0) / kEight * share.p.eight_bytes),
        high_bytes_((share.row(0, 1) - share.row(0, 0)) / kEight * share.p.eight_bytes),
        tile_bytes_(share.tile_columns() / kEight * share.p.eight_bytes) {}

  __device__ __forceinline__ void prepare() const {}
  __device__ __forceinline__ void request(char* slab, const SlabCursor<kQuantizedSlabTiles>& cursor,
                                          uint64_t* full, uint64_t policy) const {
    const QuantizedCall& p = share_.p;
    const int begin = cursor.chunk * p.half_bytes;
    const int bytes = min(p.row_bytes - begin, p.half_bytes);
    const int tiles = min(kQuantizedSlabTiles, cursor.pass_end(share_) - cursor.tile);
    const int last = share_.halves(cursor.tile + tiles - 1);  // of those before, two
    mbarrier_arrive_expect(full, ((tiles - 1) * 2 + last) * bytes);
    const uint8_t* source = first_ + cursor.tile * tile_bytes_ + begin;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      bulk_copy(slab, source, bytes, full, policy);
      if (tile + 1 < tiles || last == 2) {
        bulk_copy(slab + half_stride(kFamily), source + high_bytes_, bytes, full, policy);
      }
      slab += 2 * half_stride(kFamily);
      source += tile_bytes_;
    }
  }

 private:
  const WeightShare<QuantizedCall>& share_;
  const uint8_t* const first_;
  const int64_t high_bytes_, tile_bytes_;  // to the other half of a tile, to the next tile
};

}  // namespace mllama
