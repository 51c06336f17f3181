// The convolution of patch_embed as a product of unfolded patches and weights, out (rows, dim) = A
// (rows, K) W^T (dim, K), where A is never built: a block gathers its part from the images.
//
// 16 bits    128 x 128 per block of 8 warps (64 x 32 each), mma.sync m16n8k16, K in slices of 32
//            through a three-stage cp.async ring; K = 588 ends after 37 steps of 16. Rows of 64
//            bytes, swizzled. Runs of 14 pixels start on 4 bytes only, so pixels are copied in
//            pairs and weights in fours; where even that alignment is missing, element by element.
// float32    64 x 64 per block, FFMA, each slice of 16 summed from zero: shorter chains, less
//            rounding.
#pragma once

#include "../common/ptx.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "geometry.cuh"

namespace mllama {

template <typename Element>
struct TensorCorePatchGemm {
  using T = Element;
  static constexpr int kBlockM = 128, kBlockN = 128, kBlockK = 32, kStages = 3;
  static constexpr int kThreads = 256;
  static constexpr int kTileBytes = 128 * kBlockK * 2;  // of A or W
  static constexpr int kOutStride = kBlockN * 2 + 16;   // bytes
  static constexpr int kSharedBytes = 2 * kStages * kTileBytes;
  static_assert(kBlockM * kOutStride <= kSharedBytes, "the result takes the stages' place");

  // Byte of element `k` of row `row`: 16-byte chunks swizzled so that 8 rows fill all banks once.
  __device__ static __forceinline__ int offset(int row, int k) {
    return row * kBlockK * 2 + (k / 8 ^ row / 2 % 4) * 16 + k % 8 * 2;
  }

  // `row_offsets`: the patches of the block's rows, -1 behind the last.
  __device__ static __forceinline__ void copy(char* stage, const PatchGeometry& g,
                                              PatchAlignment alignment, const T* pixels,
                                              const int64_t* row_offsets, const T* weight,
                                              int first_column, int dim, int first_k) {
    const uint32_t a = shared_address(stage), w = a + kTileBytes;
    {
      const int k = threadIdx.x % 16 * 2;
      const bool inside = first_k + k < g.depth;
      const int pixel = inside ? g.pixel_offset(first_k + k) : 0;
      const bool second = first_k + k + 1 < g.depth;
      const int next_pixel = second ? g.pixel_offset(first_k + k + 1) : 0;
#pragma unroll 4
      for (int row = threadIdx.x / 16; row < kBlockM; row += kThreads / 16) {
        const int64_t patch = row_offsets[row];
        const T* source = pixels + (patch < 0 ? 0 : patch);
        if (alignment.pixel_pairs) {
          cp_async_small<4>(a + offset(row, k), source + pixel, inside && patch >= 0);
        } else {
          T* target = reinterpret_cast<T*>(stage + offset(row, k));
          target[0] = inside && patch >= 0 ? source[pixel] : from_f32<T>(0.0f);
          target[1] = second && patch >= 0 ? source[next_pixel] : from_f32<T>(0.0f);
        }
      }
    }
    const int k = threadIdx.x % 8 * 4;
#pragma unroll
    for (int row = threadIdx.x / 8; row < kBlockN; row += kThreads / 8) {
      const bool inside = first_column + row < dim;
      const T* source =
          weight + (inside ? first_column + row : 0) * static_cast<int64_t>(g.depth) + first_k + k;
      if (alignment.weight_fours) {
        cp_async_small<8>(w + offset(row, k), source, inside && first_k + k < g.depth);
      } else {
        T* target = reinterpret_cast<T*>(stage + kTileBytes + offset(row, k));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          target[i] = inside && first_k + k + i < g.depth ? source[i] : from_f32<T>(0.0f);
        }
      }
    }
  }

  // Leaves the block's results, rounded to T, in shared memory: row r at r * kOutStride.
  __device__ static __forceinline__ void run(const PatchGeometry& g, PatchAlignment alignment,
                                             const T* pixels, const int64_t* row_offsets,
                                             const T* weight, int first_column, int dim,
                                             char* shared) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 32;
    const int slices = (g.depth + kBlockK - 1) / kBlockK;
    const auto copy_slice = [&](int slice) {
      if (slice < slices) {
        copy(shared + slice % kStages * 2 * kTileBytes, g, alignment, pixels, row_offsets, weight,
             first_column, dim, slice * kBlockK);
      }
      cp_async_commit();  // one group per slice, empty behind the last, so that the waits count
                          // alike
    };
    float sum[4][4][4] = {};
#pragma unroll
    for (int slice = 0; slice < kStages - 1; ++slice) copy_slice(slice);
    for (int slice = 0; slice < slices; ++slice) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // the slice has landed for all; all are done with the one before
      copy_slice(slice + kStages - 1);
      const uint32_t a_tile = shared_address(shared + slice % kStages * 2 * kTileBytes),
                     w_tile = a_tile + kTileBytes;
#pragma unroll
      for (int k = 0; k < kBlockK; k += 16) {
        if (slice * kBlockK + k >= g.depth) break;
        uint32_t a[4][4], w[2][4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          ldmatrix_x4(a[m], a_tile + offset(warp_row + m * 16 + lane % 16, k + lane / 16 * 8));
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          ldmatrix_x4(w[n], w_tile + offset(warp_column + n * 16 + lane / 16 * 8 + lane % 8,
                                            k + lane / 8 % 2 * 8));
        }
#pragma unroll
        for (int m = 0; m < 4; ++m) {
#pragma unroll
          for (int n = 0; n < 4; ++n)
            mma_m16n8k16<T>(sum[m][n], a[m], w[n / 2][n % 2 * 2], w[n / 2][n % 2 * 2 + 1]);
        }
      }
    }
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_row + m * 16 + half * 8 + lane / 4,
                    column = warp_column + n * 8 + lane % 4 * 2;
          *reinterpret_cast<uint32_t*>(shared + row * kOutStride + column * 2) =
              pack_pair<T>(sum[m][n][2 * half], sum[m][n][2 * half + 1]);
        }
      }
    }
    __syncthreads();
  }
};

struct SimtPatchGemm {
  using T = float;
  static constexpr int kBlockM = 64, kBlockN = 64, kBlockK = 16;
  static constexpr int kThreads = 256;
  static constexpr int kStride = 64 + 4;               // floats from k to k
  static constexpr int kOutStride = kBlockN * 4 + 16;  // bytes
  static constexpr int kSharedBytes = kBlockM * kOutStride;
  static_assert(2 * kBlockK * kStride * 4 <= kSharedBytes);

  __device__ static __forceinline__ void run(const PatchGeometry& g, PatchAlignment,
                                             const float* pixels, const int64_t* row_offsets,
                                             const float* weight, int first_column, int dim,
                                             char* shared) {
    float* const a_tile = reinterpret_cast<float*>(shared);  // (k, row)
    float* const w_tile = a_tile + kBlockK * kStride;        // (k, column)
    const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
    float sum[4][4] = {};
    for (int first_k = 0; first_k < g.depth; first_k += kBlockK) {
      __syncthreads();  // all are done with the previous slice
      const int k = threadIdx.x % kBlockK;
      const bool inside = first_k + k < g.depth;
      const int pixel = inside ? g.pixel_offset(first_k + k) : 0;
#pragma unroll
      for (int r = threadIdx.x / kBlockK; r < kBlockM; r += kThreads / kBlockK) {
        const int64_t patch = row_offsets[r];
        const int64_t w_row = first_column + r;
        a_tile[k * kStride + r] = inside && patch >= 0 ? pixels[patch + pixel] : 0.0f;
        w_tile[k * kStride + r] =
            inside && w_row < dim ? weight[w_row * g.depth + first_k + k] : 0.0f;
      }
      __syncthreads();
      float part[4][4] = {};
#pragma unroll
      for (int i = 0; i < kBlockK; ++i) {
        const float4 a = *reinterpret_cast<const float4*>(a_tile + i * kStride + row);
        const float4 w = *reinterpret_cast<const float4*>(w_tile + i * kStride + column);
        const float a_values[4] = {a.x, a.y, a.z, a.w}, w_values[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int m = 0; m < 4; ++m) {
#pragma unroll
          for (int n = 0; n < 4; ++n) part[m][n] = fmaf(a_values[m], w_values[n], part[m][n]);
        }
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) sum[m][n] += part[m][n];
      }
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      *reinterpret_cast<float4*>(shared + (row + m) * kOutStride + column * 4) =
          make_float4(sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
    }
    __syncthreads();
  }
};

}  // namespace mllama
