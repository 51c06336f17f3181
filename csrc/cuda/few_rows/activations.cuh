// Rows of x as the B operands of the products with them, and the factors of the norm before.
#pragma once

#include "../common/reduce.cuh"
#include "../common/rms.cuh"
#include "share.cuh"

namespace mllama {

// Eight bytes of global memory, or zeros, in one predicated instruction as load_words_if.
__device__ __forceinline__ uint2 load_two_words_if(bool wanted, const void* address) {
  uint2 words;
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.u32 wanted, %3, 0;\n"
      "mov.u32 %0, 0;\n"
      "mov.u32 %1, 0;\n"
      "@wanted ld.global.v2.u32 {%0, %1}, [%2];\n"
      "}\n"
      : "=&r"(words.x), "=&r"(words.y)
      : "l"(address), "r"(static_cast<uint32_t>(wanted)));
  return words;
}

// kRowBlocks: eights of rows of x. Lane l has, of row l / 4 of each eight and of each 32 elements,
// four times two neighbours that the instruction calls elements 2 (l % 4) and 8 + 2 (l % 4) of 16,
// twice: elements l % 4 * 8 to + 7 where one vector of 16 bytes is to bring them, and so the 16 of
// a product are spread over the 32; with kSplit elements l % 4 * 4 to + 3 of each half of the 32,
// so that a product has 16 neighbours. The weight is read in the same order.
template <typename T, int kRowBlocks, bool kSplit>
class Activations {
 public:
  // Words, which nothing takes apart before their chunk's turn: as vectors of elements the compiler
  // would wait for them where they are loaded.
  static constexpr int kVecs = kWarpDepth / 32;
  struct Words {
    uint4 x[kRowBlocks][kVecs];
    uint4 norm_weight[kVecs];
  };

  // What this warp needs of a chunk.
  template <typename Params>
  __device__ __forceinline__ static Words load(const Params& p, int chunk) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const auto part = [&](bool wanted, const void* row, int k) {
      const T* const address = static_cast<const T*>(row) + k;
      if constexpr (!kSplit) return load_words_if(wanted && k < static_cast<int>(p.k), address);
      const uint2 low = load_two_words_if(wanted && k < static_cast<int>(p.k), address);
      const uint2 high = load_two_words_if(wanted && k + 16 < static_cast<int>(p.k), address + 16);
      return make_uint4(low.x, low.y, high.x, high.y);
    };
    Words words;
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const int k = chunk * kSlabDepth + warp * kWarpDepth + v * 32 + lane % 4 * (kSplit ? 4 : 8);
#pragma unroll
      for (int b = 0; b < kRowBlocks; ++b) {
        const int row = b * 8 + lane / 4;
        words.x[b][v] = part(row < p.rows, static_cast<const T*>(p.x) + row * p.x_row_stride, k);
      }
      words.norm_weight[v] = part(p.norm_weight != nullptr, p.norm_weight, k);
    }
    return words;
  }

  __device__ __forceinline__ Words normalized(Words words) const {
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const Vec<T>& weight = *reinterpret_cast<const Vec<T>*>(&words.norm_weight[v]);
#pragma unroll
      for (int b = 0; b < kRowBlocks; ++b) {
        Vec<T>& x = *reinterpret_cast<Vec<T>*>(&words.x[b][v]);
        x = normalize(x, weight, rstd_[b]);
      }
    }
    return words;
  }

  // The factors of the norm. All warps share every row.
  template <typename Params>
  __device__ __forceinline__ void measure(const Params& p,
                                          double (&squares)[kFewRows][kSlabWarps]) {
    constexpr int kRows = 4, kAhead = 2;  // rows, and vectors of each, under way
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int vecs = static_cast<int>(p.k) / Vec<T>::kSize;
    const T* const x = static_cast<const T*>(p.x);
#pragma unroll 1
    for (int first_row = 0; first_row < p.rows; first_row += kRows) {
      double sum[kRows] = {};
#pragma unroll 1
      for (int first = threadIdx.x; first < vecs; first += kAhead * kSlabThreads) {
        Vec<T> part[kAhead][kRows];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int v = first + i * kSlabThreads;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            part[i][r] = load_vec_if(v < vecs && first_row + r < p.rows,
                                     x + (first_row + r) * p.x_row_stride + v * Vec<T>::kSize);
          }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (first_row + r >= p.rows) break;
#pragma unroll
          for (int i = 0; i < kAhead; ++i) sum[r] += sum_of_squares(part[i][r]);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (first_row + r >= p.rows) break;
        const double total = warp_sum(sum[r]);
        if (lane == 0) squares[first_row + r][warp] = total;
      }
    }
    __syncthreads();
#pragma unroll
    for (int b = 0; b < kRowBlocks; ++b) {
      const int row = min(b * 8 + lane / 4, static_cast<int>(p.rows) - 1);
      double total = 0;
#pragma unroll
      for (int w = 0; w < kSlabWarps; ++w) total += squares[row][w];
      rstd_[b] = inverse_rms<T>(total, p.k, p.eps);
    }
  }

 private:
  float rstd_[kRowBlocks] = {};
};

}  // namespace mllama
