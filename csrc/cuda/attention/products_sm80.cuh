// The two matrix products of attention, scores = Q K^T and out = factor * out + weights V, on tiles
// in shared memory. Both element paths hold scores and output in the accumulator layout of m16n8
// products, so softmax, masks and stores are written once.
//
// 16 bits    mma.sync m16n8k16 on ldmatrix fragments; weights go from accumulators to operands in
//            registers.
// float32    ordinary FFMA (TF32 would lose 13 bits); weights pass through shared memory.
// Hidden     Where a row may be blind to a key block whose values it must not touch (a NaN there
//            would survive a weight of zero), the product with V is summed from zero and added to
//            the scaled output in one FFMA, which such a row skips. Elsewhere the output is scaled
//            and accumulated in place: that takes fewer registers.
#pragma once

#include <type_traits>

#include "tile_sm80.cuh"

namespace mllama {

// out = factor * out + product in the accumulator layout of row tile `row_tile`, for the rows that
// take part.
template <typename Config>
__device__ __forceinline__ void blend(float (&out)[4], const float (&product)[4],
                                      const float (&factor)[Config::kSlots],
                                      const bool (&sees)[Config::kSlots], int row_tile) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int slot = 2 * row_tile + i / 2;
    const float sum = fmaf(out[i], factor[slot], product[i]);
    out[i] = !Config::kHidesRows || sees[slot] ? sum : out[i];
  }
}

// 16-bit elements.
template <typename Config>
struct TensorCoreProducts {
  using T = typename Config::T;
  using Layout = TileLayout<T, Config::kHeadDim>;

  __device__ static __forceinline__ void scores(float (&s)[Config::kRowTiles][Config::kKeyTiles][4],
                                                const char* q_tile, const char* k_tile) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const uint32_t q = shared_address(q_tile), k = shared_address(k_tile);
#pragma unroll
    for (int t = 0; t < Config::kRowTiles; ++t) {
#pragma unroll
      for (int n = 0; n < Config::kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[t][n][i] = 0.0f;
      }
    }
#pragma unroll
    for (int step = 0; step < Config::kHeadDim / 16; ++step) {
      uint32_t a[Config::kRowTiles][4];
#pragma unroll
      for (int t = 0; t < Config::kRowTiles; ++t) {
        const int row = warp * Config::kRowsPerWarp + t * 16 + lane % 16;
        ldmatrix_x4(a[t], q + Layout::offset(row, 2 * step + lane / 16));
      }
#pragma unroll
      for (int n = 0; n < Config::kKeyTiles; n += 2) {
        uint32_t b[4];  // keys 0-7 and 8-15 of the 16, two 8-wide halves of the step each
        ldmatrix_x4(b,
                    k + Layout::offset(n * 8 + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
#pragma unroll
        for (int t = 0; t < Config::kRowTiles; ++t) {
          mma_m16n8k16<T>(s[t][n], a[t], b[0], b[1]);
          mma_m16n8k16<T>(s[t][n + 1], a[t], b[2], b[3]);
        }
      }
    }
  }

  __device__ static __forceinline__ void output(
      float (&out)[Config::kRowTiles][Config::kDimTiles][4],
      const float (&weights)[Config::kRowTiles][Config::kKeyTiles][4],
      const float (&factor)[Config::kSlots], const bool (&sees)[Config::kSlots], const char* v_tile,
      char* /*weight_tile*/) {
    constexpr int kSteps = Config::kBlockN / 16;
    const int lane = threadIdx.x % kWarpSize;
    const uint32_t v = shared_address(v_tile);
    uint32_t p[Config::kRowTiles][kSteps]
              [4];  // two neighbouring n8 tiles of weights are one k16 operand
#pragma unroll
    for (int t = 0; t < Config::kRowTiles; ++t) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float (&w)[4] = weights[t][2 * step + i / 2];
          p[t][step][i] = pack_pair<T>(w[i % 2 * 2], w[i % 2 * 2 + 1]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < Config::kDimTiles; n += 2) {
      float product[Config::kRowTiles][2][4];
#pragma unroll
      for (int t = 0; t < Config::kRowTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          product[t][i / 4][i % 4] =
              Config::kHidesRows ? 0.0f : out[t][n + i / 4][i % 4] * factor[2 * t + i % 4 / 2];
        }
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, v + Layout::offset(step * 16 + lane % 16, n + lane / 16));
#pragma unroll
        for (int t = 0; t < Config::kRowTiles; ++t) {
          mma_m16n8k16<T>(product[t][0], p[t][step], b[0], b[1]);
          mma_m16n8k16<T>(product[t][1], p[t][step], b[2], b[3]);
        }
      }
#pragma unroll
      for (int t = 0; t < Config::kRowTiles; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if constexpr (Config::kHidesRows) {
            blend<Config>(out[t][n + half], product[t][half], factor, sees, t);
          } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) out[t][n + half][i] = product[t][half][i];
          }
        }
      }
    }
  }
};

// float32 elements.
template <typename Config>
struct SimtProducts {
  using Layout = TileLayout<float, Config::kHeadDim>;
  static constexpr int kWeightStride = Config::kBlockN + 8;  // floats; rows on distinct bank groups
  static_assert(Config::kRowTiles == 1);

  __device__ static __forceinline__ const float4& chunk(const char* tile, int row, int c) {
    return *reinterpret_cast<const float4*>(tile + Layout::offset(row, c));
  }

  __device__ static __forceinline__ void scores(float (&s)[1][Config::kKeyTiles][4],
                                                const char* q_tile, const char* k_tile) {
    const int column = Config::first_column();
#pragma unroll
    for (int n = 0; n < Config::kKeyTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[0][n][i] = 0.0f;
    }
    float lost[Config::kKeyTiles][4] = {};
#pragma unroll 2
    for (int c = 0; c < Layout::kChunks; ++c) {
      const float4 q[2] = {chunk(q_tile, Config::row_of_slot(0), c),
                           chunk(q_tile, Config::row_of_slot(1), c)};
#pragma unroll
      for (int n = 0; n < Config::kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float4 k = chunk(k_tile, n * 8 + column + i, c);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            add_dot(s[0][n][2 * r + i], lost[n][2 * r + i], q[r], k);
          }
        }
      }
    }
  }

  __device__ static __forceinline__ void output(float (&out)[1][Config::kDimTiles][4],
                                                const float (&weights)[1][Config::kKeyTiles][4],
                                                const float (&factor)[2],
                                                const bool (&sees)[Config::kSlots],
                                                const char* v_tile, char* weight_tile) {
    const int column = Config::first_column();
    float* rows[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows[r] = reinterpret_cast<float*>(weight_tile) + Config::row_of_slot(r) * kWeightStride;
#pragma unroll
      for (int n = 0; n < Config::kKeyTiles; ++n) {
        *reinterpret_cast<float2*>(rows[r] + n * 8 + column) =
            make_float2(weights[0][n][2 * r], weights[0][n][2 * r + 1]);
      }
    }
    __syncwarp();  // a warp writes and reads its own rows only
    constexpr int kSlice = Config::kDimTiles % 4 == 0 ? 4 : 2;
#pragma unroll
    for (int first = 0; first < Config::kDimTiles; first += kSlice) {
      float product[kSlice][4] = {};
#pragma unroll 2
      for (int key = 0; key < Config::kBlockN; key += 4) {
        float p[2][4];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          *reinterpret_cast<float4*>(p[r]) = *reinterpret_cast<const float4*>(rows[r] + key);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* v_row =
              reinterpret_cast<const float*>(v_tile + Layout::offset(key + j, 0)) + column;
#pragma unroll
          for (int n = 0; n < kSlice; ++n) {
            const float2 v = *reinterpret_cast<const float2*>(v_row + (first + n) * 8);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              product[n][2 * r] = fmaf(p[r][j], v.x, product[n][2 * r]);
              product[n][2 * r + 1] = fmaf(p[r][j], v.y, product[n][2 * r + 1]);
            }
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kSlice; ++n)
        blend<Config>(out[0][first + n], product[n], factor, sees, 0);
    }
    __syncwarp();  // the next block overwrites the weights
  }
};

template <typename Config>
using AttentionProducts = std::conditional_t<sizeof(typename Config::T) == 2,
                                             TensorCoreProducts<Config>, SimtProducts<Config>>;

}  // namespace mllama
