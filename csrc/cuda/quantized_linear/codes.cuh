// A lane's codes of a half tile, eight rows x 64 columns, as words of the A operand of a product:
// exact in 16 bits, but for a table's. Shifts and logic run at half rate, so they are what is
// counted:
//
//               per weight: shifts, logic, products, loads of shared memory
//   4 bits                  1/2     1/2    1/2
//   table                   1/2 byte and address in one or two instructions, 1/2 load of 8 bytes
//   6 bits                  13/16   1      1/2
//   8 bits                  1/4     1 (float16: 1/2)   1/2
//   fp8                     3/4     1      1/2 (float16: none)
//
// bfloat16  Integers come as q * 2^-n, so that none is above 2^-6, which is about where weights
// are:
//           neither x near the largest numbers nor x near the smallest then fares worse than in a
//           product with the decoded weight. float16: as they are, since sums are float32.
#pragma once

#include <bit>
#include <type_traits>

#include "../common/ptx.cuh"
#include "../common/vec_math.cuh"
#include "layout.h"

namespace mllama {

// A pair of equal elements; the value is one of T's normal numbers.
template <typename T>
constexpr uint32_t twice(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t one = std::is_same_v<T, __half>
                           ? (bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - (112u << 23)) >> 13
                           : bits >> 16;
  return one * 0x10001u;
}

// (a & mask) | with, (a & mask) ^ with: one instruction, where an expression of two constants takes
// two.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t mask, uint32_t with) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;\n" : "=r"(result) : "r"(a), "r"(mask), "r"(with));
  return result;
}
__device__ __forceinline__ uint32_t and_xor(uint32_t a, uint32_t mask, uint32_t with) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;\n" : "=r"(result) : "r"(a), "r"(mask), "r"(with));
  return result;
}

// a * b + c of pairs.
template <typename T>
__device__ __forceinline__ uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c) {
  const auto pair = [](uint32_t& word) { return *reinterpret_cast<const Pair<T>*>(&word); };
  const Pair<T> result = __hfma2(pair(a), pair(b), pair(c));
  return *reinterpret_cast<const uint32_t*>(&result);
}

// Powers of two by which words are too small.
template <typename T, Family kFamily>
constexpr float kFinish = 1.0f;
template <>
constexpr float kFinish<__half, Family::kFp8> = 256.0f;
template <>
constexpr float kFinish<__nv_bfloat16, Family::kFp8> = 32768.0f;
template <>
constexpr float kFinish<__nv_bfloat16, Family::kInt8> = 16384.0f;
template <>
constexpr float kFinish<__nv_bfloat16, Family::kQ8_0> = 16384.0f;
template <>
constexpr float kFinish<__nv_bfloat16, Family::kQ6_K> = 2048.0f;
template <>
constexpr float kFinish<__nv_bfloat16, Family::kInt4> = 512.0f;

// Bits that make an integer in the lower ones a number: 1024 or 128 and the integer.
template <typename T>
constexpr uint32_t kMagic = std::is_same_v<T, __half> ? 0x64006400u : 0x43004300u;
template <typename T>
constexpr float kMagicValue = std::is_same_v<T, __half> ? 1024.0f : 128.0f;

// The integer less what stands for 0.
template <typename T, Family kFamily, int kStandsForZero>
__device__ __forceinline__ uint32_t from_magic(uint32_t word) {
  constexpr float kScale = 1.0f / kFinish<T, kFamily>;
  constexpr uint32_t kFactor = twice<T>(kScale);
  constexpr uint32_t kZero = twice<T>(-(kMagicValue<T> + kStandsForZero) * kScale);
  return fma_pairs<T>(word, kFactor, kZero);
}

// Four bits less what stands for zero, a whole or a half number, so that as in the decoded weight a
// column that is zero is so whatever x is, and any other has its sign: twice the code is made a
// number, and half of it and of `doubled_zero` are what pair() subtracts.
constexpr int kMaxDoubledZero = 31;  // above every code; -1 is below
template <typename T>
__device__ __forceinline__ uint32_t int4_zero(float doubled_zero) {
  constexpr float kScale = 0.5f / kFinish<T, Family::kInt4>;
  const float zero = fmaf(doubled_zero, -kScale, -kMagicValue<T> * kScale);
  return pack_pair<T>(zero, zero);
}

// A table's value as two numbers of the dtype: the second is what the first leaves, and has its
// sign, so that an infinite x makes their sum no NaN. A single one would be wrong by the same
// amount wherever its code stands, which adds up over a row of x that has a mean.
template <typename T>
__device__ __forceinline__ float2 two_terms(float value) {
  if (!(fabsf(value) > 0.0f)) return make_float2(value, 0.0f);
  const float below = __uint_as_float(__float_as_uint(value) - 1);
  float first, least = 0.0f;
  if constexpr (std::is_same_v<T, __half>) {
    first = __half2float(__float2half_rz(below)), least = 0x1p-24f;
  } else {
    first = __bfloat162float(__float2bfloat16_rz(below));
  }
  return make_float2(first, copysignf(fmaxf(fabsf(value - first), least), value));
}

// The words of a lane: 16 codes.
template <typename T, Family kFamily>
struct Codes {
  static constexpr bool kBytes =
      kFamily == Family::kInt8 || kFamily == Family::kFp8 || kFamily == Family::kQ8_0;

  uint32_t word[kBytes ? 4 : 2];
  uint32_t high = 0;  // of six bits

  // At the lane's own of a part.
  __device__ __forceinline__ explicit Codes(const char* own) {
    if constexpr (kBytes) {
      const uint4 words = *reinterpret_cast<const uint4*>(own);
      word[0] = words.x, word[1] = words.y, word[2] = words.z, word[3] = words.w;
    } else {
      const uint2 words = *reinterpret_cast<const uint2*>(own);
      word[0] = words.x, word[1] = words.y;
      if constexpr (kFamily == Family::kQ6_K) {
        const int lane = threadIdx.x % kWarpSize;
        high = *reinterpret_cast<const uint32_t*>(own + kLowBytes - lane * 4);
      }
    }
  }

  // Pair p of the four columns of half h of 32 columns g. `zero`: int4_zero() of these.
  __device__ __forceinline__ uint32_t pair(int g, int h, int p, uint32_t zero) const {
    if constexpr (kBytes) {
      return byte_pair(word[2 * g + h], p);
    } else {
      const uint32_t own = word[g];
      const int i = 2 * h + p;
      if constexpr (kFamily == Family::kInt4) {
        const uint32_t doubled = i == 0 ? own << 1 : own >> (4 * i - 1);
        return fma_pairs<T>(and_or(doubled, 0x001e001eu, kMagic<T>),
                            twice<T>(0.5f / kFinish<T, kFamily>), zero);
      }
      const uint32_t low = and_or(own >> 4 * i, 0x000f000fu, kMagic<T>);
      const int shift = 4 * i + 2 * g - 4;
      const uint32_t shifted = shift < 0 ? high << -shift : high >> shift;
      return from_magic<T, kFamily, 32>(and_or(shifted, 0x00300030u, low));
    }
  }

  // Of a table: the pair's first terms, and the second ones. `lookup`: those of all pairs by byte,
  // 128 bytes apart, in shared memory.
  __device__ __forceinline__ uint2 table_pair(int g, int h, int p, uint32_t lookup) const {
    uint2 pair;
    asm("ld.shared.v2.u32 {%0, %1}, [%2];\n"
        : "=r"(pair.x), "=r"(pair.y)
        : "r"(lookup + __byte_perm(word[g], 0, 0x4440 + 2 * h + p) * 128));
    return pair;
  }

 private:
  // Bytes p and p + 2 of a word.
  __device__ __forceinline__ static uint32_t byte_pair(uint32_t own, int p) {
    constexpr bool kHalf = std::is_same_v<T, __half>;
    if constexpr (kFamily != Family::kFp8) {
      const uint32_t bytes = own >> 8 * p;
      // With the sign's bit changed, 128 more than the integer.
      if constexpr (kHalf) {
        return from_magic<T, kFamily, 128>(and_xor(bytes, 0x00ff00ffu, kMagic<T> ^ 0x00800080u));
      } else {
        // Eight bits are one too many: the highest goes to the exponent of what is taken away, 128
        // or 256.
        constexpr float kScale = 1.0f / kFinish<T, kFamily>;
        static_assert(kScale * 128 == 0x1p-7f, "0xbc00 is minus that");
        return fma_pairs<T>(and_or(bytes, 0x007f007fu, kMagic<T>), twice<T>(kScale),
                            and_or(bytes, 0x00800080u, 0xbc00bc00u));
      }
    } else if constexpr (kHalf) {  // 2^-8 of the number, which subnormals are too
      return and_or(p == 0 ? own << 8 : own, 0x80008000u,
                    (p == 0 ? own << 7 : own >> 1) & 0x3f803f80u);
    } else {  // 2^-120
      const uint32_t number = and_or(p == 0 ? own << 8 : own, 0x80008000u,
                                     (p == 0 ? own << 4 : own >> 4) & 0x07f007f0u);
      return fma_pairs<T>(number, twice<T>(0x1p120f / kFinish<T, kFamily>), 0x80008000u);
    }
  }
};

}  // namespace mllama
