// The product of forward_sm90.cu: its tile, its shared memory, the copies of weights and the
// computing warps' part.
#pragma once

#include "../common/reduce.cuh"
#include "../common/sm90.cuh"
#include "../common/tensor_map.h"
#include "../common/wgmma.cuh"
#include "geometry.cuh"
#include "kernels.h"

namespace mllama::patch_sm90 {

constexpr int kBlockM = 128, kBlockN = kPatchSm90Columns, kBlockK = 64, kStages = 4;
constexpr int kRowBlocks = 2;  // of a cluster
constexpr int kProductN = 160, kProducts = kBlockN / kProductN;
constexpr int kComputeWarps = 8, kWarps = kComputeWarps + 4, kThreads = kWarps * kWarpSize;
constexpr int kSpan = 128;                    // bytes of a row of a slice
constexpr int kBoxRows = kProductN / 2;       // even or odd rows of weights
constexpr int kSliceBytes = kBlockN * kSpan;  // of all columns
static_assert(kProducts == kRowBlocks, "each row block copies the weights of one product");
static_assert(kBlockN / 4 <= 3 * kWarpSize, "a thread loads scale and shift of four columns");
static_assert(kPatchSm90MaxDepth % kBlockK == 0);
static_assert(kBoxRows * kSpan % 1024 == 0 && kBlockK * 2 == kSpan);

// Of a row's columns in one block.
struct RowStatistics {
  float mean, squares;  // the latter about that mean
};

// Four neighbouring elements of a row, as pairs.
struct alignas(8) Four {
  uint32_t pairs[2];
};

struct PatchShared {
  alignas(1024) char weights[kStages][kSliceBytes];
  uint64_t full[kStages], empty[kStages];
  RowStatistics statistics[kBlockM];
  Four norm_weight[kBlockN / 4], norm_bias[kBlockN / 4];
  int pixel_offsets[kPatchSm90MaxDepth / 2];  // of pairs; -1 behind the last, up to whole slices
};

#ifdef MLLAMA_SM90A_DEVICE

// 65536 registers for 256 threads that compute and a warpgroup of which one thread copies.
constexpr int kCopyRegisters = 24, kComputeRegisters = 240;
constexpr int kRowsPerWarp = 16;
constexpr int kSlots = 2;                // rows per thread
constexpr int kSteps = kBlockK / 16;     // products along k per slice
constexpr int kGroups = kProductN / 16;  // of 16 columns, four of them a thread's

// Two pixels, or zeros; one predicated instruction, as load_vec_if() explains.
__device__ __forceinline__ uint32_t load_two_if(bool wanted, const void* address) {
  uint32_t pair;
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.u32 wanted, %2, 0;\n"
      "mov.u32 %0, 0;\n"
      "@wanted ld.global.nc.u32 %0, [%1];\n"
      "}\n"
      : "=&r"(pair)
      : "l"(address), "r"(static_cast<uint32_t>(wanted)));
  return pair;
}

// Accumulators of 16 rows, by warp.
struct PatchSums {
  float d[kProducts][2 * kGroups][4] = {};

  // Column `i` of a thread's four: even rows of weights come first in a product, then odd ones.
  __device__ __forceinline__ float& at(int slot, int product, int group, int i) {
    return d[product][group + i % 2 * kGroups][slot * 2 + i / 2];
  }
};

// Blocks of a cluster that share columns are neighbours.
__device__ __forceinline__ int first_column_of(uint32_t rank) {
  return static_cast<int>(rank / kRowBlocks) * kBlockN;
}
__device__ __forceinline__ int first_row_of(int cluster, uint32_t rank) {
  return (cluster * kRowBlocks + static_cast<int>(rank % kRowBlocks)) * kBlockM;
}
// The first of a thread's rows in the block; slots are 8 apart.
__device__ __forceinline__ int block_row() {
  return static_cast<int>(threadIdx.x) / kWarpSize * kRowsPerWarp +
         static_cast<int>(threadIdx.x) % kWarpSize / 4;
}

// A thread's four columns of a group start here, counted from those of the block's first group.
__device__ __forceinline__ constexpr int place_of(int product, int group) {
  return product * kProductN + group * 16;
}

// The copying thread's part.
__device__ __forceinline__ void copy_weights(PatchShared& shared, const CUtensorMap& map, int depth,
                                             int first_column, uint32_t rank) {
  const int part = rank % kRowBlocks;
  const auto blocks = static_cast<uint16_t>(3u << (rank - part));
  RingPosition<kStages> ring;
  for (int k = 0; k < depth; k += kBlockK, ring.advance()) {
    mbarrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
    mbarrier_arrive_expect(&shared.full[ring.stage], kSliceBytes);
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      tensor_copy_multicast(
          shared.weights[ring.stage] + part * kProductN * kSpan + odd * kBoxRows * kSpan, &map,
          &shared.full[ring.stage], blocks, odd * depth + k, first_column / 2 + part * kBoxRows);
    }
  }
}

// The computing warps' part of the product.
template <typename T>
class PatchProduct {
 public:
  __device__ __forceinline__ PatchProduct(PatchShared& shared, const PatchGeometry& g,
                                          const T* pixels, int first_row, uint32_t rank)
      : shared_(shared), steps_((g.depth + 15) / 16) {
    const uint32_t lane = threadIdx.x % kWarpSize;
    if (lane < kRowBlocks) {
      empty_ = cluster_address(shared.empty, rank / kRowBlocks * kRowBlocks + lane);
    }
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int row = first_row + slot * 8;
      source_[slot] = pixels + (row < g.rows ? g.patch_offset(row) : 0);
    }
  }

  __device__ __forceinline__ void run(PatchSums& sums) {
    load<0>(0);
    wgmma_fence(sums.d[0], sums.d[1]);
    // Two slices per turn, each with its own operand registers; what is left is less than a slice.
    int step = 0;
    while (true) {
      if (step + kSteps > steps_) {
        multiply_rest<0>(sums, step);
        break;
      }
      multiply<0>(sums, step);
      step += kSteps;
      if (step + kSteps > steps_) {
        multiply_rest<1>(sums, step);
        break;
      }
      multiply<1>(sums, step);
      step += kSteps;
    }
    wgmma_wait<0>(sums.d[0], sums.d[1]);
  }

 private:
  // The pixels of a slice, laid out as the operand of its products.
  template <int kBuffer>
  __device__ __forceinline__ void load(int first_step) {
    const int* const offsets =
        shared_.pixel_offsets + first_step * 8 + static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int offset = offsets[step * 8 + half * 4];
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) {
          pixels_[kBuffer][step][half * 2 + slot] =
              load_two_if(offset >= 0, source_[slot] + offset);
        }
      }
    }
  }

  template <int kBuffer>
  __device__ __forceinline__ void issue(PatchSums& sums, int step) const {
    const uint64_t weights =
        wgmma_descriptor_k<kSpan>(shared_address(shared_.weights[ring_.stage]));
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
      Wgmma<T, kProductN>::template rs<WgmmaMajor::kK, true>(
          sums.d[product], pixels_[kBuffer][step],
          weights + wgmma_step(product * kProductN * kSpan + step * 32));
    }
  }

  // Issues the products of the slice that was loaded, and while they run loads the next one into
  // the registers of the one before.
  template <int kBuffer>
  __device__ __forceinline__ void multiply(PatchSums& sums, int first_step) {
    mbarrier_wait(&shared_.full[ring_.stage], ring_.parity);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) issue<kBuffer>(sums, step);
    wgmma_commit();
    wgmma_wait<1>();
    if (first_step > 0) release();
    if (first_step + kSteps < steps_) load<kBuffer ^ 1>(first_step + kSteps);
    ring_.advance();
  }

  template <int kBuffer>
  __device__ __forceinline__ void multiply_rest(PatchSums& sums, int first_step) {
    if (first_step >= steps_) return;
    mbarrier_wait(&shared_.full[ring_.stage], ring_.parity);
#pragma unroll
    for (int step = 0; step < kSteps - 1; ++step) {
      if (first_step + step >= steps_) break;
      wgmma_fence();
      issue<kBuffer>(sums, step);
      wgmma_commit();
    }
  }

  // Gives the slice before the current one back to both blocks that copy into it.
  __device__ __forceinline__ void release() const {
    const int stage = (ring_.stage + kStages - 1) % kStages;
    if (empty_ != 0) cluster_arrive(empty_ + stage * static_cast<int>(sizeof(uint64_t)));
  }

  PatchShared& shared_;
  const int steps_;
  uint32_t empty_ = 0;  // barriers of the block that this lane tells of a slice that is done with
  const T* source_[kSlots];
  uint32_t pixels_[2][kSteps][4];
  RingPosition<kStages> ring_;
};

#endif  // MLLAMA_SM90A_DEVICE

}  // namespace mllama::patch_sm90
