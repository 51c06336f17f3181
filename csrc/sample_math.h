// The arithmetic that defines a drawn token, the same on both devices: integers behind the level,
// so that neither the order of additions nor the contraction of a product and a sum can show.
// reference_sampling.py has it in PyTorch.
//
//   level   of a token: how far its float32 logit lies below the row's largest, in units of 2^-26,
//           cut to whole units and at kMaxLevel. Equal levels are equally likely: they tie.
//   weight  of a level: exp(-level * 2^-26) * 2^40, rounded; relative error 2^-29 before. It never
//           increases with the level, is 2^40 at level 0 and 0 at kMaxLevel.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define MLLAMA_HOST_DEVICE __host__ __device__
#else
#define MLLAMA_HOST_DEVICE
#endif

namespace mllama {

constexpr int64_t kInvalidToken = -1;
constexpr float kMaxDistance = 29.0f;  // exp(-29) * 2^40 rounds to 0
constexpr float kLevelsPerUnit = 0x1p26f;
constexpr uint32_t kMaxLevel = 29u << 26;
constexpr int64_t kMaxWeight = int64_t{1} << 40;
// The weights of a row must sum to less than 2^63.
constexpr int64_t kMaxVocab = int64_t{1} << 22;

namespace {  // internal linkage: the CPU kernels are compiled once per instruction set (simd.h)

// One number of 64 bits, or as many as a vector has: Numbers::multiply(a, b) is the product of
// their lower words.
struct OneNumber {
  using Value = uint64_t;
  MLLAMA_HOST_DEVICE static Value multiply(Value a, Value b) {
    return uint64_t{static_cast<uint32_t>(a)} * static_cast<uint32_t>(b);
  }
};

template <typename Numbers>
MLLAMA_HOST_DEVICE inline typename Numbers::Value weights_of(typename Numbers::Value level) {
  using Value = typename Numbers::Value;
  // 42 - level * 2^-26 * log2(e), with 57 bits behind the point; 2^40 is what level 0 gets.
  const Value exponent = (uint64_t{42} << 57) - Numbers::multiply(level, Value{} + 3098164009u);
  const Value fraction = (exponent >> 25) & 0xffffffffu;
  // (2^f - 1) / f, scaled by 2^31. The coefficients sum to 2^31, so that 2^f stays below 2.
  Value p = Value{} + 46022;
  p = (Numbers::multiply(p, fraction) >> 32) + 308748;
  p = (Numbers::multiply(p, fraction) >> 32) + 2881712;
  p = (Numbers::multiply(p, fraction) >> 32) + 20646516;
  p = (Numbers::multiply(p, fraction) >> 32) + 119196129;
  p = (Numbers::multiply(p, fraction) >> 32) + 515882277;
  p = (Numbers::multiply(p, fraction) >> 32) + 1488522244;
  const Value power = ((Numbers::multiply(p, fraction) >> 32) + (1u << 31)) << 9;
  const Value shift = 42 - (exponent >> 57);
  return (power + (((Value{} + 1) << shift) >> 1)) >> shift;
}

MLLAMA_HOST_DEVICE inline int64_t weight_of(uint32_t level) {
  return static_cast<int64_t>(weights_of<OneNumber>(level));
}

}  // namespace

// The log-probability of a token, of the row's largest logit and of the sum of all weights: the
// logits in float32, the rest in float64.
MLLAMA_HOST_DEVICE static inline double log_mass(int64_t total) {
  return log(static_cast<double>(total) * 0x1p-40);
}
MLLAMA_HOST_DEVICE static inline float log_probability(float logit, float largest,
                                                       double log_mass) {
  const double distance = static_cast<double>(logit) - static_cast<double>(largest);
  return static_cast<float>(distance - log_mass);
}

// 53 random bits, a function of (seed, step): SplitMix64 (Steele, Lea, Flood 2014).
MLLAMA_HOST_DEVICE static inline uint64_t mix_bits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// The point of a row's distribution function, in [0, total), that decides its token: the first
// token with a running sum of weights beyond it.
MLLAMA_HOST_DEVICE static inline int64_t draw_target(int64_t seed, int64_t step, int64_t total) {
  const uint64_t counter = (static_cast<uint64_t>(step) + 1) * 0x9E3779B97F4A7C15u;
  const uint64_t bits = mix_bits(mix_bits(static_cast<uint64_t>(seed)) + counter) >> 11;
  const double u = static_cast<double>(bits) * 0x1p-53;
  const int64_t target = static_cast<int64_t>(u * static_cast<double>(total));
  return target < total ? target : total - 1;  // the product may round up to total
}

// Top-p keeps a token while the more likely ones together weigh less than this.
MLLAMA_HOST_DEVICE static inline int64_t mass_to_keep(int64_t total, double drop_share) {
  const int64_t mass = total - static_cast<int64_t>(drop_share * static_cast<double>(total));
  return mass < 1 ? 1 : mass;
}

// Top-k and top-p look for a cut: the largest level whose tokens stay. The levels are sorted into
// kBins bins, the bin with the cut into finer bins, and so on: an interval of levels from `first`
// on, whose bins hold 2^shift levels each.
constexpr int kBinBits = 8;
constexpr int kBins = 1 << kBinBits;

namespace {  // internal linkage, as above

struct CutInterval {
  uint32_t first = 0;
  int shift = 31 - kBinBits;  // kMaxLevel < 2^31

  MLLAMA_HOST_DEVICE bool contains(uint32_t level) const {
    return (level - first) >> shift < static_cast<uint32_t>(kBins);
  }
  MLLAMA_HOST_DEVICE int bin(uint32_t level) const {
    return static_cast<int>((level - first) >> shift);
  }
  MLLAMA_HOST_DEVICE uint32_t last_level(int bin) const {
    return first + ((static_cast<uint32_t>(bin) + 1) << shift) - 1;
  }
  // Whether the cut is the end of `bin`: a token there stays while the amount of more likely ones
  // is below `need`. `amount` is that of all tokens up to the end of the bin, `least` a lower bound
  // for one token's.
  MLLAMA_HOST_DEVICE bool keeps_bin(int64_t amount, int64_t least, int64_t need) const {
    return shift == 0 || amount - least < need;
  }
  MLLAMA_HOST_DEVICE void enter(int bin) {
    first += static_cast<uint32_t>(bin) << shift;
    shift = shift > kBinBits ? shift - kBinBits : 0;
  }
};

}  // namespace

}  // namespace mllama
