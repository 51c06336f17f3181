// Sums of products of the codes of a step and a row of x, for quantized_quads.h: with AVX-512, and
// without any instructions for it.
#pragma once

#include "quantized_quad_operands.h"

#ifndef MLLAMA_QUAD_BLOCKS

namespace mllama::MLLAMA_ISA {

// Of the quads of a run from `first` on: codes times integers; `int8`: x has no upper bytes.
template <typename Operands>
MLLAMA_INLINE IVec quad_dot(const UVec (&weight)[kQuads], const QuadX& x, int first, bool int8) {
#if defined(__AVX512F__)
  __m512i high = {}, low = {};
#pragma GCC unroll 8
  for (int q = first; q < first + Operands::kRunQuads; ++q) {
    const __m512i codes = (__m512i)weight[q];
    if (!int8) high = _mm512_dpbusd_epi32(high, codes, _mm512_set1_epi32(x.words[0][q]));
    low = _mm512_dpbusd_epi32(low, codes, _mm512_set1_epi32(x.words[1][q]));
  }
  return ((IVec)high << 8) + (IVec)low;
#else
  IVec sum = {};
  for (int q = first; q < first + Operands::kRunQuads; ++q) {
    const IVec codes = (IVec)weight[q];
    sum += (codes & 255) * (int16_t)x.words[0][q] + (codes >> 16 & 255) * (x.words[0][q] >> 16) +
           (codes >> 8 & 255) * (int16_t)x.words[1][q] +
           (codes >> 24 & 255) * (x.words[1][q] >> 16);
  }
  return sum;
#endif
}

#if defined(__AVX512F__)
// Of a step of a table's integers, two neighbouring columns in each lane.
template <typename Operands>
MLLAMA_INLINE FVec quad_dot(const UVec (&weight)[2 * kQuads], const QuadX& x, int, bool) {
  __m512i even = {}, odd = {};
#pragma GCC unroll 8
  for (int q = 0; q < kQuads; ++q) {
    const int32_t* pairs = &x.words[0][0] + 2 * q;
    even = _mm512_dpwssd_epi32(even, (__m512i)weight[2 * q], _mm512_set1_epi32(pairs[0]));
    odd = _mm512_dpwssd_epi32(odd, (__m512i)weight[2 * q + 1], _mm512_set1_epi32(pairs[1]));
  }
  return (FVec)_mm512_add_ps(_mm512_cvtepi32_ps(even), _mm512_cvtepi32_ps(odd));
}
#endif

}  // namespace mllama::MLLAMA_ISA

#endif  // MLLAMA_QUAD_BLOCKS
