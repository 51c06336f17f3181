// The values of a packed weight, as vectors: lanes are rows. Exactly the values that the header
// defines: what looks like two roundings (q4_k's product and difference) is one, since a product of
// fp16, 6 and 4 bits is exact in float32, fused or not.
#pragma once

#include "quantized_layout.h"

namespace mllama::MLLAMA_ISA {

// For members; MLLAMA_INLINE is static.
#define MLLAMA_METHOD inline __attribute__((always_inline))

typedef uint8_t CVec __attribute__((vector_size(kLanes)));

// Element `element` of a plane of 32-bit words, of the rows from `row` on.
MLLAMA_INLINE UVec load_words(const uint8_t* plane, int64_t element, int row) {
  return load_bits<UVec>(plane + (element * kTileRows + row) * sizeof(uint32_t));
}

MLLAMA_INLINE FVec to_float(UVec x) { return __builtin_convertvector((IVec)x, FVec); }

// Table entries of the codes in the lowest four bits of each lane; the others do not matter.
class Lookup16 {
 public:
#if defined(__AVX512F__)
  explicit Lookup16(const float* table) : table_(load(table)) {}
  MLLAMA_METHOD FVec operator()(UVec codes) const {
    return (FVec)_mm512_permutexvar_ps((__m512i)codes, (__m512)table_);
  }

 private:
  FVec table_;
#elif defined(__AVX2__)
  explicit Lookup16(const float* table) : low_(load(table)), high_(load(table + 8)) {}
  MLLAMA_METHOD FVec operator()(UVec codes) const {
    const __m256 low = _mm256_permutevar8x32_ps((__m256)low_, (__m256i)codes);
    const __m256 high = _mm256_permutevar8x32_ps((__m256)high_, (__m256i)codes);
    return (FVec)_mm256_blendv_ps(low, high, (__m256)(codes << 28));
  }

 private:
  FVec low_, high_;
#else
  explicit Lookup16(const float* table) { memcpy(table_, table, sizeof(table_)); }
  MLLAMA_METHOD FVec operator()(UVec codes) const {
    FVec values;
    for (int i = 0; i < kLanes; ++i) values[i] = table_[codes[i] & 15];
    return values;
  }

 private:
  float table_[16];
#endif
};

// Lanes' elements of a scale or zero plane.
MLLAMA_INLINE FVec load_elements(PlaneType type, const uint8_t* p) {
  switch (type) {
    case PlaneType::kFloat16:
      return load(reinterpret_cast<const F16*>(p));
    case PlaneType::kBFloat16:
      return load(reinterpret_cast<const BF16*>(p));
    case PlaneType::kUInt8:
      return to_float(__builtin_convertvector(load_bits<CVec>(p), UVec));
    default:
      return load(reinterpret_cast<const float*>(p));
  }
}

// The values of float8_e4m3fn in the low bytes of 16-bit lanes.
MLLAMA_INLINE FVec fp8_values(HVec bytes) {
  const HVec magnitude = bytes & 0x7f;
  // fp16 with the exponent 8 lower; all ones are NaN.
  HVec half = magnitude << 7;
  half = magnitude == 0x7f ? half | 0x7fff : half;
  return widen(half | (bytes & 0x80) << 8, (F16*)nullptr) * 256.0f;
}

// Steps that share a scale of nf4 or fp4.
constexpr int64_t kTableSteps = 64 / kStepColumns;

// What a vector of codes is scaled with.
struct GroupScale {
  FVec scale, offset;
};

template <Encoding kEncoding>
class Decoder {
 public:
  static constexpr bool kBytes =
      kEncoding == Encoding::kQ8_0 || kEncoding == Encoding::kInt8 || kEncoding == Encoding::kFp8;
  static constexpr bool kRowScale = kEncoding == Encoding::kInt8 || kEncoding == Encoding::kFp8;
  static constexpr bool kTabled = kEncoding == Encoding::kNf4 || kEncoding == Encoding::kFp4;

  Decoder(const QuantizedWeight& w, const PackedLayout& layout)
      : w_(w), layout_(layout), lookup_(kTabled ? w.table : kIntegers) {}

  // f(k, values of column k) for the columns of a step, in order; the lanes are the rows from
  // `row` on of the tile.
  template <typename F>
  MLLAMA_METHOD void columns(const uint8_t* tile, int64_t step, int row, const F& f) const {
    if constexpr (kBytes) {
      const GroupScale group = scale(tile, step, row, 0);
#pragma GCC unroll 8
      for (int word = 0; word < 8; ++word) {
        const UVec codes = load_words(tile, step * 8 + word, row);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          f(4 * word + i, byte_values(codes >> 8 * i & 255) * group.scale);
        }
      }
    } else {
      GroupScale group = scale(tile, step, row, 0);
#pragma GCC unroll 4
      for (int word = 0; word < 4; ++word) {
        if (kEncoding == Encoding::kQ6_K && word == 2) group = scale(tile, step, row, 1);
        const UVec codes = load_words(tile, step * 4 + word, row);
        UVec high = {};
        if constexpr (kEncoding == Encoding::kQ6_K) {
          high = load_words(tile + layout_.high_at, step * 2 + word / 2, row);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          f(8 * word + i,
            scaled(codes >> (i % 2 * 16 + i / 2 * 4), high >> high_shift(word % 2 * 8 + i), group));
        }
      }
    }
  }

  // Of the half `half` (16 columns) of a step, which for all but q6_k has one.
  MLLAMA_METHOD GroupScale scale(const uint8_t* tile, int64_t step, int row, int half) const {
    const uint8_t* scales = tile + layout_.scales_at;
    const uint8_t* extras = tile + layout_.extras_at;
    if constexpr (kEncoding == Encoding::kQ8_0 || kEncoding == Encoding::kQ4_0) {
      return {load_half(scales, step, row), FVec{}};
    } else if constexpr (kEncoding == Encoding::kInt8 || kEncoding == Encoding::kFp8) {
      return {load(reinterpret_cast<const float*>(scales) + row), FVec{}};
    } else if constexpr (kEncoding == Encoding::kQ4_K) {
      // Unsigned, so that of eight steps in a row the compiler knows each one's part.
      const uint64_t block = (uint64_t)step / 8, part = (uint64_t)step % 8;
      const UVec first = load_words(extras, block * 3, row),
                 second = load_words(extras, block * 3 + 1, row),
                 third = load_words(extras, block * 3 + 2, row);
      const int shift = (int)(part % 4 * 8);
      UVec scale = first >> shift & 63, minimum = second >> shift & 63;
      if (part >= 4) {
        scale = (third >> shift & 15) | (first >> (shift + 6) & 3) << 4;
        minimum = (third >> (shift + 4) & 15) | (second >> (shift + 6) & 3) << 4;
      }
      return {load_half(scales, block * 2, row) * to_float(scale),
              load_half(scales, block * 2 + 1, row) * to_float(minimum)};
    } else if constexpr (kEncoding == Encoding::kQ6_K) {
      const uint64_t part = (uint64_t)step * 2 + half;
      const UVec word = load_words(extras, part / 4, row);
      const IVec scale = (IVec)(word << (int)(24 - part % 4 * 8)) >> 24;
      return {load_half(scales, part / 16, row) * __builtin_convertvector(scale, FVec), FVec{}};
    } else if constexpr (kEncoding == Encoding::kInt4) {
      const int64_t at = step * kStepColumns / w_.group * kTileRows + row;
      return {load_elements(w_.scale, scales + at * layout_.scales.size),
              load_elements(w_.zero, extras + at * layout_.extras.size)};
    } else {
      const int64_t at = step / kTableSteps * kTileRows + row;
      return {load(reinterpret_cast<const float*>(scales) + at), FVec{}};
    }
  }

 private:
  static constexpr float kIntegers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

  static MLLAMA_METHOD FVec load_half(const uint8_t* plane, int64_t element, int row) {
    return load(reinterpret_cast<const F16*>(plane) + element * kTileRows + row);
  }

  static MLLAMA_METHOD FVec byte_values(UVec codes) {
    if constexpr (kEncoding == Encoding::kFp8) {
      return fp8_values(__builtin_convertvector(codes, HVec));
    } else {
      return to_float(codes) - 128.0f;
    }
  }

  // Of the codes in the lowest four bits of each lane, and for q6_k those in the lowest two of
  // high.
  MLLAMA_METHOD FVec scaled(UVec codes, UVec high, const GroupScale& group) const {
    if constexpr (kEncoding == Encoding::kQ6_K) {
      return (to_float((codes & 15) | (high & 3) << 4) - 32.0f) * group.scale;
    } else if constexpr (kTabled) {
      return lookup_(codes) * group.scale;
    } else {
#if defined(__AVX512F__)
      const FVec integer = lookup_(codes);
#else
      const FVec integer = to_float(codes & 15);
#endif
      if constexpr (kEncoding == Encoding::kQ4_0) return (integer - 8.0f) * group.scale;
      if constexpr (kEncoding == Encoding::kQ4_K) return integer * group.scale - group.offset;
      return (integer - group.offset) * group.scale;
    }
  }

  const QuantizedWeight& w_;
  const PackedLayout& layout_;
  const Lookup16 lookup_;
};

// f(EncodingIs<E>) with E the encoding.
template <Encoding kEncoding>
struct EncodingIs {
  static constexpr Encoding value = kEncoding;
};

template <typename F>
MLLAMA_INLINE void with_encoding(Encoding encoding, const F& f) {
  switch (encoding) {
    case Encoding::kQ8_0:
      return f(EncodingIs<Encoding::kQ8_0>{});
    case Encoding::kQ6_K:
      return f(EncodingIs<Encoding::kQ6_K>{});
    case Encoding::kQ4_K:
      return f(EncodingIs<Encoding::kQ4_K>{});
    case Encoding::kQ4_0:
      return f(EncodingIs<Encoding::kQ4_0>{});
    case Encoding::kInt8:
      return f(EncodingIs<Encoding::kInt8>{});
    case Encoding::kFp8:
      return f(EncodingIs<Encoding::kFp8>{});
    case Encoding::kInt4:
      return f(EncodingIs<Encoding::kInt4>{});
    case Encoding::kNf4:
    case Encoding::kFp4:
      return f(EncodingIs<Encoding::kNf4>{});
  }
}

}  // namespace mllama::MLLAMA_ISA
