// quantize: a weight's parts (quantized_linear.h) in int8, fp8 or one of ggml's encodings.
#pragma once

#include "quantized_linear.h"

namespace mllama {

// Magnitudes up to this have an encoding: beyond it the scale of a block, a half, may be infinite.
// int8 and fp8, whose scales are float32, have one for every finite magnitude.
constexpr float largest_magnitude(Encoding encoding) {
  switch (encoding) {
    case Encoding::kQ8_0:
      return 127 * 65504.0f;
    case Encoding::kQ4_0:
      return 8 * 65504.0f;
    case Encoding::kQ4_K:
      return 0x1p21f;
    case Encoding::kQ6_K:
      return 0x1p27f;
    default:
      return 0x1.fffffep127f;
  }
}

struct QuantizeParams {
  const void* weight;       // (rows, k), last dimension contiguous; k is whole blocks
  int64_t row_stride;       // of the weight
  const float* importance;  // (k,), positive, or null; for q4_0, q4_k and q6_k
  int64_t rows, k;
  Encoding encoding;
  uint8_t* data;  // blocks (rows, bytes), or the codes of int8 and fp8 (rows, k)
  float* scale;   // (rows,) of int8 and fp8; null for the others
  // rows * k; the first weight, counted along rows, that is NaN, infinite or beyond
  // largest_magnitude is written here, and the parts are of no use then.
  int64_t* refused;
  DType dtype;  // kFloat32, kFloat16 or kBFloat16
};

void quantize_cpu(const QuantizeParams& p);
int quantize_cuda(const QuantizeParams& p, CUstream_st* stream);

}  // namespace mllama
