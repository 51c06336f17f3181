// A weight's parts as every device has them (quantized_linear.h), element by element.
#pragma once

#include <cuda_runtime.h>

#include "../../quantized_linear.h"

namespace mllama {

// q4_k's scale and minimum of a block's 32 columns j, low and next 6 bits, from its 12 bytes.
__device__ __forceinline__ uint32_t q4_k_pair(const uint8_t* s, int j) {
  if (j < 4) return (s[j] & 63) | (s[j + 4] & 63) << 6;
  return (s[j + 4] & 15) | s[j - 4] >> 6 << 4 | (s[j + 4] >> 4) << 6 | s[j] >> 6 << 10;
}
// And back: byte i of the 12, of pair(j).
template <typename Pair>
__device__ __forceinline__ uint32_t q4_k_byte(int i, const Pair& pair) {
  if (i < 4) return (pair(i) & 63) | (pair(i + 4) >> 4 & 3) << 6;
  if (i < 8) return (pair(i - 4) >> 6) | pair(i) >> 10 << 6;
  return (pair(i - 4) & 15) | (pair(i - 4) >> 6 & 15) << 4;
}

// The columns whose codes byte `at` of a ggml block's codes holds: f(column, bit of the code, bits,
// bit of the byte).
template <typename F>
__device__ __forceinline__ void for_codes_of_byte(Encoding e, int at, const F& f) {
  switch (e) {
    case Encoding::kQ8_0:
      f(at, 0, 8, 0);
      return;
    case Encoding::kQ4_0:
      f(at, 0, 4, 0);
      f(at + 16, 0, 4, 4);
      return;
    case Encoding::kQ4_K:
      f(at / 32 * 64 + at % 32, 0, 4, 0);
      f(at / 32 * 64 + 32 + at % 32, 0, 4, 4);
      return;
    default:  // q6_k: 128 bytes of low and 64 of high bits
      if (at < 128) {
        f(at / 64 * 128 + at % 64, 0, 4, 0);
        f(at / 64 * 128 + 64 + at % 64, 0, 4, 4);
      } else {
#pragma unroll
        for (int g = 0; g < 4; ++g) f((at - 128) / 32 * 128 + g * 32 + at % 32, 4, 2, 2 * g);
      }
  }
}

// The code of a column of a row that is inside the weight.
__device__ __forceinline__ uint32_t stored_code(const QuantizedWeight& w, const void* const* parts,
                                                int64_t row, int64_t column) {
  const uint8_t* const data = static_cast<const uint8_t*>(parts[0]) + row * part_row_bytes(w, 0);
  const int64_t block = ggml_block(w.encoding);
  if (block == 0) {
    if (part_row_bytes(w, 0) == w.k) return data[column];
    return data[column / 2] >> column % 2 * 4 & 15;
  }
  const uint8_t* const own = data + column / block * ggml_block_bytes(w.encoding);
  const int i = static_cast<int>(column % block);
  switch (w.encoding) {
    case Encoding::kQ8_0:
      return own[2 + i];
    case Encoding::kQ4_0:
      return own[2 + i % 16] >> i / 16 * 4 & 15;
    case Encoding::kQ4_K:
      return own[16 + i / 64 * 32 + i % 32] >> i / 32 % 2 * 4 & 15;
    default: {
      const int g = i / 32 % 4, e = i % 32;
      const uint32_t low = own[i / 128 * 64 + g % 2 * 32 + e] >> g / 2 * 4 & 15;
      return low | (own[128 + i / 128 * 32 + e] >> 2 * g & 3) << 4;
    }
  }
}

}  // namespace mllama
