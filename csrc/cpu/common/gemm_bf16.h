// Matrix products of bfloat16: C (rows, n) float32 = A (rows, depth) * B (depth, n), B packed in
// pairs of rows, as the instructions take them: AMX tiles (gemm_amx.h) and AVX-512 dot products
// (gemm_dot.h).
//
// A tile of B holds 16 columns of 32 rows in pairs: [row / 2][column][row % 2], 1 KB. Packed B is a
// row of panels of two tiles' width, each [depth / 32][tile].
#pragma once

#include "simd.h"
#include "transpose.h"

#ifdef __AVX512BF16__

namespace mllama::MLLAMA_ISA {

struct Bf16Panels {
  using Element = BF16;
  using Accumulator = float;
  static constexpr int kPanel = 32;

  // B in packed form; multiply() may take its first rows and columns alone.
  struct Packed {
    const BF16* data;
    int64_t depth, columns;  // as packed
  };

  static int64_t padded_depth(int64_t depth) { return (depth + 31) / 32 * 32; }
  static int64_t padded_columns(int64_t n) { return (n + 15) / 16 * 16; }
  static int64_t packed_elements(int64_t depth, int64_t n) { return depth * padded_columns(n); }

  // The weights go to bfloat16: 3e-6 is plenty. Arguments are at most 0, or NaN; -inf gives 0.
  static FVec exp2(FVec x) {
    const FVec r = (FVec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    FVec p = splat(kExp2[4]);
#pragma GCC unroll 4
    for (int i = 3; i >= 0; --i) p = p * r + kExp2[i];
    return scale_by_power(p, x);  // by 2^floor(x)
  }

  static void store_weights(BF16* p, FVec low, FVec high) {
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    memcpy(p, &both, sizeof(both));
  }

  template <typename T>
  static void load_row(const BF16* x, int64_t depth, float sign, BF16* out) {
    for_vectors(depth,
                [&](int64_t d, auto part) { store(out + d, load(x + d, part) * sign, part); });
    memset(out + depth, 0, (padded_depth(depth) - depth) * sizeof(BF16));
  }

  template <typename T, typename Row>
  static void pack_transposed(const Row& row, int64_t n, int64_t depth, BF16* out) {
    const int64_t padded = padded_depth(depth);
    for (int64_t panel = 0; panel < n; panel += kPanel) {
      const int64_t tiles = min<int64_t>(2, (n - panel + 15) / 16);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = panel + t * 16, count = min<int64_t>(16, n - first);
        const char* columns[16];
        for (int64_t j = 0; j < count; ++j) columns[j] = row(first + j);
        for (int64_t d = 0; d < padded; d += 32) {
          const int64_t left = depth - d;
          const __mmask32 mask = left >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << left) - 1;
          __m512i rows[16];
#pragma GCC unroll 16
          for (int64_t j = 0; j < 16; ++j) {
            rows[j] = j < count ? _mm512_maskz_loadu_epi16(mask, columns[j] + d * 2)
                                : _mm512_setzero_si512();
          }
          transpose(rows);
          char* tile = reinterpret_cast<char*>(out) + (d / 32 * tiles + t) * 1024;
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + i * 64, rows[i]);
        }
      }
      out += tiles * 16 * padded;
    }
  }

  // Rows of B past depth, up to padded_depth(depth), are zero.
  template <typename T, typename Row>
  static void pack(const Row& row, int64_t depth, int64_t n, BF16* out) {
    const int64_t padded = padded_depth(depth);
    for (int64_t k = 0; k < padded; k += 2) {
      const BF16* even = k < depth ? reinterpret_cast<const BF16*>(row(k)) : nullptr;
      const BF16* odd = k + 1 < depth ? reinterpret_cast<const BF16*>(row(k + 1)) : nullptr;
      for (int64_t c = 0; c < n; c += 16) {
        const int64_t tiles = min<int64_t>(2, (n - c / 32 * 32 + 15) / 16);
        const __mmask16 mask = n - c >= 16 ? (__mmask16)0xffff : (__mmask16)((1 << (n - c)) - 1);
        const __m512i low =
            even ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even + c)) : __m512i{};
        const __m512i high =
            odd ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, odd + c)) : __m512i{};
        char* tile = reinterpret_cast<char*>(out) + c / 32 * 32 * padded * 2 +
                     (k / 32 * tiles + c / 16 % 2) * 1024;
        _mm512_store_si512(tile + k % 32 / 2 * 64,
                           _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
  }

 private:
  // 2^r on [0, 1), relative error 3e-6.
  static constexpr float kExp2[5] = {1.0f, 6.93044845e-1f, 2.41280207e-1f, 5.22424694e-2f,
                                     1.34266872e-2f};
};

}  // namespace mllama::MLLAMA_ISA

#endif  // __AVX512BF16__
