// The sums over positions that the gradient of patch_embed ends in, in a fixed order.
#pragma once

#include "../../patch_embed.h"
#include "../common/reduce.cuh"
#include "../common/row_tiles.cuh"
#include "../common/sm90.cuh"
#include "../common/vec.cuh"

namespace mllama {

// Sums over a block of whole warps; every thread gets them. A buffer may be used again when another
// one has been used in between.
template <int kCount, typename S>
__device__ __forceinline__ void block_sums(S (&values)[kCount], S (*buffer)[kWarpSize][kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = warp_sum(values[i]);
    if (threadIdx.x % kWarpSize == 0) (*buffer)[threadIdx.x / kWarpSize][i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const unsigned lane = threadIdx.x % kWarpSize;
    values[i] = warp_sum(lane < blockDim.x / kWarpSize ? (*buffer)[lane][i] : 0);
  }
}

constexpr int kPatchSumThreads = 256;
constexpr int kPatchSumLanes = 4;  // on a row, a vector each; the other threads on other rows
constexpr int kPatchSumRows = kPatchSumThreads / kPatchSumLanes;
constexpr int kPatchSumLoads = 4;  // rows of a thread that are loaded together

// Columns of one block of patch_sums_kernel.
template <typename R>
constexpr int kPatchSumColumns = kPatchSumLanes * Vec<R>::kSize;

// Which blocks of patch_sums_kernel do what.
struct PatchSums {
  int64_t norm_blocks, pre_tile_blocks, gate_blocks;
  int64_t rows;   // of partial sums
  int64_t parts;  // blocks of a row of pre_tile_embedding

  template <typename T>
  static PatchSums of(const PatchEmbedBackwardParams& p) {
    const bool norm = p.grad_norm_weight != nullptr || p.grad_norm_bias != nullptr;
    const bool gates = p.grad_position_gate != nullptr || p.grad_pre_tile_gate != nullptr;
    const int64_t parts = ceil_div<int64_t>(p.dim, kPatchSumColumns<T>);
    return {norm ? ceil_div<int64_t>(2 * p.dim, kPatchSumColumns<float>) : 0,
            p.grad_pre_tile_embedding != nullptr ? p.ratios * p.tiles * parts : 0, gates ? 1 : 0,
            p.blocks(), parts};
  }
  int64_t blocks() const { return norm_blocks + pre_tile_blocks + gate_blocks; }
};

// A block's sums over rows of R, of kPatchSumColumns<R> columns from `first` on.
template <typename R, bool kVectorized>
class ColumnSums {
  static constexpr int kSize = Vec<R>::kSize;
  using S = Statistic<R>;
  using Buffer = S[kPatchSumThreads / kWarpSize][kPatchSumColumns<R>];

 public:
  // Rows are `dim` elements, one behind the other.
  __device__ __forceinline__ void add(const R* rows, int64_t count, int64_t dim, int64_t first) {
    const int64_t column = first + threadIdx.x % kPatchSumLanes * kSize;
    for (int64_t row = threadIdx.x / kPatchSumLanes; row < count;
         row += kPatchSumRows * kPatchSumLoads) {
      Vec<R> loaded[kPatchSumLoads];
#pragma unroll
      for (int i = 0; i < kPatchSumLoads; ++i) {
        const int64_t other = row + i * kPatchSumRows;
        loaded[i] = load_tile<kVectorized>(rows + other * dim, column, other < count ? dim : 0);
      }
#pragma unroll
      for (int i = 0; i < kPatchSumLoads; ++i) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) sums_[j] += to_f32(loaded[i].data[j]);
      }
    }
  }

  // store(column, sum) of the block's columns, each by one thread.
  template <typename F>
  __device__ __forceinline__ void finish(Buffer& buffer, int64_t first, const F& store) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
#pragma unroll
      for (int offset = kWarpSize / 2; offset >= kPatchSumLanes; offset /= 2) {
        sums_[j] += __shfl_xor_sync(0xffffffffu, sums_[j], offset);
      }
    }
    const int lane = threadIdx.x % kWarpSize;
    if (lane < kPatchSumLanes) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        buffer[threadIdx.x / kWarpSize][lane * kSize + j] = sums_[j];
      }
    }
    __syncthreads();
    if (threadIdx.x >= kPatchSumColumns<R>) return;
    S sum = 0;
#pragma unroll
    for (int warp = 0; warp < kPatchSumThreads / kWarpSize; ++warp) {
      sum += buffer[warp][threadIdx.x];
    }
    store(first + threadIdx.x, static_cast<float>(sum));
  }

 private:
  S sums_[kSize] = {};
};

template <bool kVectorized, typename T>
__device__ __forceinline__ void sum_norm(const PatchEmbedBackwardParams& p, int64_t rows,
                                         int64_t block) {
  __shared__ double buffer[kPatchSumThreads / kWarpSize][kPatchSumColumns<float>];
  const int64_t first = block * kPatchSumColumns<float>;
  ColumnSums<float, kVectorized> sums;
  sums.add(static_cast<const float*>(p.norm_sums), rows, 2 * p.dim, first);
  sums.finish(buffer, first, [&](int64_t column, float sum) {
    const bool is_bias = column >= p.dim;
    const auto out = static_cast<T*>(is_bias ? p.grad_norm_bias : p.grad_norm_weight);
    if (out != nullptr && column < 2 * p.dim)
      out[column - (is_bias ? p.dim : 0)] = from_f32<T>(sum);
  });
}

template <bool kVectorized, typename T>
__device__ __forceinline__ void sum_pre_tile(const PatchEmbedBackwardParams& p, int64_t parts,
                                             int64_t block) {
  __shared__ Statistic<T> buffer[kPatchSumThreads / kWarpSize][kPatchSumColumns<T>];
  const int64_t row = block / parts, first = (block - row * parts) * kPatchSumColumns<T>;
  const int64_t ratio = row / p.tiles, tile = row - ratio * p.tiles, patches = p.positions - 1;
  ColumnSums<T, kVectorized> sums;
  for (int64_t image = 0; image < p.images; ++image) {
    if (p.aspect_ratio_ids[image] != ratio) continue;
    sums.add(static_cast<const T*>(p.grad_patches) + (image * p.tiles + tile) * patches * p.dim,
             patches, p.dim, first);
  }
  sums.finish(buffer, first, [&](int64_t column, float sum) {
    if (column >= p.dim) return;
    static_cast<T*>(p.grad_pre_tile_embedding)[row * p.dim + column] =
        from_f32<T>(sum * unrounded_tanh_gate<T>(p.pre_tile_gate));
  });
}

template <typename T>
__device__ __forceinline__ void sum_gates(const PatchEmbedBackwardParams& p, int64_t rows) {
  __shared__ double buffer[kWarpSize][2];
  double sums[2] = {};
  for (int64_t block = threadIdx.x; block < rows; block += kPatchSumThreads) {
    sums[0] += p.gate_sums[block * 2];
    sums[1] += p.gate_sums[block * 2 + 1];
  }
  block_sums(sums, &buffer);
  if (threadIdx.x > 0) return;
  const auto store = [](void* out, const void* gate, double sum) {
    if (out == nullptr) return;
    const double y = tanh(static_cast<double>(to_f32(*static_cast<const T*>(gate))));
    *static_cast<T*>(out) = from_f32<T>(static_cast<float>(sum * (1 - y * y)));
  };
  store(p.grad_position_gate, p.position_gate, sums[0]);
  store(p.grad_pre_tile_gate, p.pre_tile_gate, sums[1]);
}

template <typename T, bool kVectorized>
__global__ void __launch_bounds__(kPatchSumThreads)
    patch_sums_kernel(const __grid_constant__ PatchEmbedBackwardParams p, const PatchSums sums) {
  wait_for_previous_kernel();
  start_next_kernel();
  int64_t block = blockIdx.x;
  if (block < sums.norm_blocks) return sum_norm<kVectorized, T>(p, sums.rows, block);
  block -= sums.norm_blocks;
  if (block < sums.pre_tile_blocks) return sum_pre_tile<kVectorized, T>(p, sums.parts, block);
  sum_gates<T>(p, sums.rows);
}

}  // namespace mllama
