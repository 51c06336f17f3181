// Levels of scaled logits, and weights of levels, a vector at a time (sample_math.h).
#pragma once

#include "../sample_math.h"
#include "common/simd.h"

namespace mllama::MLLAMA_ISA {
namespace {

constexpr int kWideLanes = kLanes / 2;

struct WideNumbers {
  typedef uint64_t Value __attribute__((vector_size(kWideLanes * 8)));

  // By an instruction that leaves out the upper words; compilers do not find it by themselves.
  __attribute__((always_inline)) static Value multiply(Value a, Value b) {
#if defined(__AVX512F__)
    return (Value)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Value)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
  }
};

void find_levels(const float* scaled, float largest, uint32_t* levels, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const float distance = largest - scaled[i];
    const float cut = distance < kMaxDistance ? distance : kMaxDistance;
    levels[i] = static_cast<uint32_t>(static_cast<int32_t>(cut * kLevelsPerUnit));
  }
}

void find_weights(const uint32_t* levels, int64_t* weights, int64_t size) {
  typedef uint32_t Levels __attribute__((vector_size(kWideLanes * 4)));
  int64_t i = 0;
  for (; i + kWideLanes <= size; i += kWideLanes) {
    const auto level = __builtin_convertvector(load_bits<Levels>(levels + i), WideNumbers::Value);
    const WideNumbers::Value weight = weights_of<WideNumbers>(level);
    memcpy(weights + i, &weight, sizeof(weight));
  }
  for (; i < size; ++i) weights[i] = weight_of(levels[i]);
}

}  // namespace
}  // namespace mllama::MLLAMA_ISA
