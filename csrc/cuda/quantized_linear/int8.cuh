// x in 8-bit integers with a scale per 32 columns (QuantizedLinearParams::int8_activations), and
// what codes of a weight they are multiplied with.
//
// Four neighbouring lanes share 32 columns of a row, eight each. The integers are those of the CPU:
// x * (127 / largest), to the nearest, halves to even; the scale is largest / 127. What is not
// finite makes the scale NaN, and so its row of out. Columns that are all smaller than 2^-112 are
// rounded as if the largest were that, so that the scale and its reciprocal are numbers.
#pragma once

#include "../few_rows/activations.cuh"
#include "codes.cuh"

namespace mllama {

struct Int8Scale {
  float scale, inverse;

  // `bits`: of the largest magnitude of a lane's columns, where NaN is above infinity.
  __device__ __forceinline__ explicit Int8Scale(uint32_t bits) {
    constexpr uint32_t kLeast = std::bit_cast<uint32_t>(0x1p-112f);
    bits = max(bits, __shfl_xor_sync(~0u, bits, 1));
    bits = max(bits, __shfl_xor_sync(~0u, bits, 2));
    const float largest = __uint_as_float(max(bits, kLeast));
    scale = fmaf(largest, 0.0f, largest / 127.0f);
    inverse = 127.0f / largest;
  }
};

__device__ __forceinline__ uint32_t magnitude_bits(float x) {
  return __float_as_uint(x) & 0x7fffffffu;
}

// The integer in the lowest bits, of which a byte is as many as it has. In two steps as on a CPU:
// one rounding would be another.
constexpr float kInt8Ones = 0x1.8p23f;  // the last place of a sum with it is 1
__device__ __forceinline__ float int8_bits(float x, float inverse) {
  return __fadd_rn(__fmul_rn(x, inverse), kInt8Ones);
}

// A lane's eight of 32 columns, to what the integers stand for.
__device__ __forceinline__ void round_to_int8(float4 (&x)[2]) {
  const auto both = [&](const auto& f) {
#pragma unroll
    for (float4& four : x) f(four.x), f(four.y), f(four.z), f(four.w);
  };
  uint32_t bits = 0;
  both([&](float value) { bits = max(bits, magnitude_bits(value)); });
  const Int8Scale of(bits);
  both([&](float& value) {
    value = __fmul_rn(__fsub_rn(int8_bits(value, of.inverse), kInt8Ones), of.scale);
  });
}

// By how much signed_codes() are above the integers of the weight: they fill the upper bits.
constexpr float signed_unit(Family family) {
  switch (family) {
    case Family::kQ6_K:
      return 4.0f;
    case Family::kInt4:
      return 16.0f;
    default:
      return 1.0f;
  }
}
// What 4-bit codes lose on the way.
constexpr float kSignedInt4Zero = 8.0f;

// Word i of the A operand of m16n8k32 for 32 columns g: signed bytes, times signed_unit().
template <typename T, Family kFamily>
__device__ __forceinline__ uint32_t signed_codes(const Codes<T, kFamily>& codes, int g, int i) {
  if constexpr (Codes<T, kFamily>::kBytes) {
    return codes.word[2 * g + i];
  } else {
    const uint32_t low = codes.word[g];
    if constexpr (kFamily == Family::kInt4) {
      return and_xor(i == 0 ? low << 4 : low, 0xf0f0f0f0u, 0x80808080u);
    }
    // Two bits from 2 g + 4 i of each byte on go to the top of it.
    const uint32_t high = codes.high << (6 - 2 * g - 4 * i);
    return and_or(i == 0 ? low << 2 : low >> 2, 0x3c3c3c3cu,
                  and_xor(high, 0xc0c0c0c0u, 0x80808080u));
  }
}

// What a warp needs of a chunk of x: its integers as B operands, in the order of signed_codes(),
// and of each accumulator's two rows the scales.
template <typename T, Family kFamily, int kRowBlocks>
class Int8Rows {
  static constexpr bool kHalves = kFamily == Family::kQ6_K;  // a scale of the weight has 16 columns
  static constexpr int kProducts = kHalves ? 2 : 1;
  static constexpr int kVecs = kWarpDepth / 32;
  using Words = typename Activations<T, kRowBlocks, true>::Words;

 public:
  // Of int8, whose scales of rows come last, with a margin for large x.
  static constexpr float kMargin = kFamily == Family::kInt8 ? 0x1p14f : 1.0f;

  // All lanes of a warp. What is behind the eight with the last of the rows stays as it is.
  __device__ __forceinline__ void take(const Words& x, int64_t rows) {
    constexpr float kShrink = 1.0f / (signed_unit(kFamily) * kMargin);
#pragma unroll
    for (int b = 0; b < kRowBlocks; ++b) {
      if (rows <= 8 * b) break;
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
        const uint4& own = x.x[b][v];
        const float2 pair[4] = {unpack_pair<T>(own.x), unpack_pair<T>(own.y), unpack_pair<T>(own.z),
                                unpack_pair<T>(own.w)};
        uint32_t bits = 0;
#pragma unroll
        for (const float2& two : pair) {
          bits = max(bits, max(magnitude_bits(two.x), magnitude_bits(two.y)));
        }
        const Int8Scale of(bits);
        // Of half h, column i.
        const auto integer = [&](int h, int i) {
          const float2& two = pair[2 * h + i / 2];
          return __float_as_uint(int8_bits(i % 2 == 0 ? two.x : two.y, of.inverse));
        };
        const auto word = [&](int w) {
          if constexpr (Codes<T, kFamily>::kBytes) {
            return bytes(integer(w, 0), integer(w, 2), integer(w, 1), integer(w, 3));
          }
          return bytes(integer(0, 2 * w), integer(1, 2 * w), integer(0, 2 * w + 1),
                       integer(1, 2 * w + 1));
        };
        const uint2 both = make_uint2(word(0), word(1));
        if constexpr (kHalves) {
          words_[b][v][0] = make_uint2(both.x & 0x00ff00ffu, both.y & 0x00ff00ffu);
          words_[b][v][1] = make_uint2(both.x & 0xff00ff00u, both.y & 0xff00ff00u);
        } else {
          words_[b][v][0] = both;
        }
        scale_[b][v] = of_accumulators(of.scale * kShrink);
        if constexpr (kFamily == Family::kInt4) {
          constexpr int kOnes = 0x01010101;
          const int own_sum =
              __dp4a(static_cast<int>(both.y), kOnes, __dp4a(static_cast<int>(both.x), kOnes, 0));
          sum_[b][v] = of_accumulators(static_cast<float>(warp_sum<4>(own_sum)));
        }
      }
    }
  }

  // Adds the products with 32 columns g of two halves of weight rows. low, high: of each half's row
  // the scale, then the offset or the scale of the other 16 columns; of scales of rows nothing.
  template <typename Scales>
  __device__ __forceinline__ void multiply(float (&sum)[kRowBlocks][4], const uint32_t (&a)[4],
                                           int g, int64_t rows, const Scales& low,
                                           const Scales& high) const {
#pragma unroll
    for (int b = 0; b < kRowBlocks; ++b) {
      if (rows <= 8 * b) break;
      const auto add = [&](int product, float (&value)[4], float low_scale, float high_scale) {
        int integer[4];
        mma_m16n8k32_s8(integer, a, words_[b][g][product].x, words_[b][g][product].y);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          value[i] = fmaf(static_cast<float>(integer[i]), i < 2 ? low_scale : high_scale, value[i]);
        }
      };
      float value[4] = {};
      if constexpr (kFamily == Family::kInt8) {
        add(0, value, 1.0f, 1.0f);
      } else {
        add(0, value, low.x, high.x);
      }
      if constexpr (kHalves) add(1, value, low.y, high.y);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto of_row = [&](const float2& two) { return i % 2 == 0 ? two.x : two.y; };
        if constexpr (kFamily == Family::kInt4) {
          value[i] = fmaf(of_row(sum_[b][g]), i < 2 ? low.y : high.y, value[i]);
        }
        sum[b][i] = fmaf(value[i], of_row(scale_[b][g]), sum[b][i]);
      }
    }
  }

 private:
  // The lowest byte of each.
  __device__ __forceinline__ static uint32_t bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
  }
  // From the lanes of a row, l / 4, to those with its sums: 2 (l % 4) and the next.
  __device__ __forceinline__ static float2 of_accumulators(float of_row) {
    const int from = threadIdx.x % 4 * 8;
    return make_float2(__shfl_sync(~0u, of_row, from), __shfl_sync(~0u, of_row, from + 4));
  }

  uint2 words_[kRowBlocks][kVecs][kProducts];
  float2 scale_[kRowBlocks][kVecs];
  float2 sum_[kRowBlocks][kVecs];  // of the integers; for offsets
};

}  // namespace mllama
