// The partial rows of a norm weight's gradient: their layout, and the kernel that adds them up.
#pragma once

#include "../../rms_norm.h"
#include "../common/gate_gradient.cuh"
#include "../common/sm90.cuh"
#include "../common/vec_math.cuh"

namespace mllama {

constexpr int kColumnThreads = 256, kColumnChunks = 8;  // of the second kernel

// A vector's share of the weight's gradient: two chunks of 16 bytes. A partial row has the first
// chunks of all vectors, then the second ones, so that neighbouring threads use neighbouring
// addresses.
template <typename T>
using Chunk = Vec<Statistic<T>>;
static_assert(Vec<float>::kSize == 2 * Chunk<float>::kSize);
static_assert(Vec<__half>::kSize == 2 * Chunk<__half>::kSize);

template <typename T>
struct WeightSums {
  Chunk<T> half[2];
  __device__ __forceinline__ Statistic<T>& operator[](int i) {
    return half[i / Chunk<T>::kSize].data[i % Chunk<T>::kSize];
  }
};

template <typename T>
__device__ __forceinline__ int64_t row_vecs(const RmsNormBackwardParams& p) {
  return (p.dim + Vec<T>::kSize - 1) / Vec<T>::kSize;
}

// Adds up the partial rows: kColumnChunks chunks per block, each by every 32nd thread, of which
// each takes every 32nd row. The first block's first warp also finishes the gate's gradient.
template <typename T>
__global__ void __launch_bounds__(kColumnThreads)
    norm_weight_gradient_kernel(const RmsNormBackwardParams p, const int blocks) {
  constexpr int kSlices = kColumnThreads / kColumnChunks;
  __shared__ Chunk<T> slices[kSlices][kColumnChunks];
  wait_for_previous_kernel();
  start_next_kernel();
  const int64_t vecs = row_vecs<T>(p);
  const int column = static_cast<int>(threadIdx.x) % kColumnChunks;
  const int slice = static_cast<int>(threadIdx.x) / kColumnChunks;
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kColumnChunks + column;
  const bool inside = chunk < 2 * vecs;
  const auto add = [](Chunk<T>& sum, const Chunk<T>& other) {
#pragma unroll
    for (int i = 0; i < Chunk<T>::kSize; ++i) sum.data[i] += other.data[i];
  };
  Chunk<T> sum{};
  const Statistic<T>* partials = static_cast<const Statistic<T>*>(p.weight_partials);
#pragma unroll 4
  for (int block = slice; block < blocks; block += kSlices) {
    add(sum, load_vec_if(inside, partials + (block * 2 * vecs + chunk) * Chunk<T>::kSize));
  }
  slices[slice][column] = sum;
  __syncthreads();
  if (slice == 0 && inside) {
    for (int other = 1; other < kSlices; ++other) add(sum, slices[other][column]);
    const int64_t first = chunk % vecs * Vec<T>::kSize + chunk / vecs * Chunk<T>::kSize;
#pragma unroll
    for (int i = 0; i < Chunk<T>::kSize; ++i) {
      if (first + i < p.dim) {
        static_cast<T*>(p.grad_weight)[first + i] = from_f32<T>(static_cast<float>(sum.data[i]));
      }
    }
  }
  if (p.gate != nullptr && blockIdx.x == 0 && threadIdx.x < kWarpSize) {
    __syncwarp();
    store_gate_gradient<T>(p.gate_partials, blocks, p.gate, p.grad_gate);
  }
}

}  // namespace mllama
