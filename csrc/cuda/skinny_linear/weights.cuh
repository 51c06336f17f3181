// Slabs of a weight as it is in memory, and the products with them.
#pragma once

#include "../few_rows/product.cuh"
#include "kernels.h"

namespace mllama {

using SkinnyShare = WeightShare<SkinnyLinearParams>;

// A slab in shared memory, of one tile: two halves of eight rows each; in a half, for each warp,
// its 64 elements of the eight rows, 128 bytes per row, the 16-byte chunks of row r exchanged by r
// (128-byte swizzle).
constexpr int kWarpBytes = kHalfRows * kWarpDepth * 2;
constexpr int kHalfBytes = kSlabWarps * kWarpBytes;
constexpr int kSlabBytes = 2 * kHalfBytes;

// Byte of 16-byte chunk `chunk` of row `row` among a warp's in a half.
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * (kWarpDepth * 2) + (chunk ^ row) * 16;
}

// What FewRowsProduct asks of a weight.
template <typename T, int kBlocksOfRows>
class DenseWeight {
 public:
  using Element = T;
  static constexpr int kRowBlocks = kBlocksOfRows, kSlabTiles = 1;
  static constexpr bool kSplit = false, kTargetAhead = true;
  using Words = typename Activations<T, kRowBlocks, kSplit>::Words;
  struct Terms {
    Terms() = default;
    __device__ __forceinline__ Terms(const DenseWeight&, int) {}
  };

  __device__ __forceinline__ explicit DenseWeight(const SkinnyShare& share) : share_(share) {}

  __device__ __forceinline__ void begin_chunk(const Words&, int) {}
  __device__ __forceinline__ void begin_slab(const char*, int, int) {}
  __device__ __forceinline__ void finish(const Terms&, int64_t, float&, float&) const {}

  // Row i of the product's operand is row weight_row(i) of a half: of two neighbours, the chunks of
  // one are in the first 64 bytes then, and those of the other in the second, so that eight lanes
  // reading 16 bytes each meet all banks once.
  __device__ __forceinline__ static int weight_row(int i) { return i / 2 + i % 2 * 4; }

  __device__ __forceinline__ void multiply(float (&sum)[kRowBlocks][4], const Words& x,
                                           const char* slab, int, int tile) const {
    const int lane = threadIdx.x % kWarpSize;
    const char* const own = slab + threadIdx.x / kWarpSize * kWarpBytes;
    // A half that is not there is replaced by the first.
    const char* const high_half = own + (share_.halves(tile) - 1) * kHalfBytes;
#pragma unroll
    for (int v = 0; v < Activations<T, kRowBlocks, kSplit>::kVecs; ++v) {
      const int offset = chunk_offset(weight_row(lane / 4), v * 4 + lane % 4);
      const uint4 low = *reinterpret_cast<const uint4*>(own + offset);
      const uint4 high = *reinterpret_cast<const uint4*>(high_half + offset);
#pragma unroll
      for (int b = 0; b < kRowBlocks; ++b) {
        const uint4 operand = x.x[b][v];
        mma_m16n8k16<T>(sum[b], {low.x, high.x, low.y, high.y}, operand.x, operand.y);
        mma_m16n8k16<T>(sum[b], {low.z, high.z, low.w, high.w}, operand.z, operand.w);
      }
    }
  }

 private:
  const SkinnyShare& share_;
};

}  // namespace mllama
