// The table of nf4 or fp4 as integers, for quantized_quads.h.
#pragma once

#include "../common.h"
#include "common/simd.h"

namespace mllama::MLLAMA_ISA {

// A table's values over a unit that they have in common, as integers below 2^14.
//
// An entry is off by the same wherever it stands, so that over a row of x with a mean the errors of
// a code add up: of 192 units the one with the smallest errors is taken, in their squares and in
// their sum. One of the 192 makes the largest entry a multiple of 192, and so integers of fp4's,
// which are multiples of 1/192.
class IntegerTable {
 public:
  explicit IntegerTable(const float* table) {
    float largest = 0;
    for (int i = 0; i < 16; ++i) {
      if (!__builtin_isfinite(table[i])) return;
      largest = max(largest, __builtin_fabsf(table[i]));
    }
    // So that scales times the unit stay far from the ends of the exponents: the least, of a second
    // word of x (QuadProduct::take_row), is 2^-80 times 2^-28 times a 2^14th of this.
    if (!(largest >= 0x1p-3f && largest <= 0x1p20f)) return;
    const float most = kLargest - best(table, kLargest / largest, 1 / largest);
    unit_ = largest / most;
    error_ = 0;
    for (int i = 0; i < 16; ++i) {
      const float value = table[i] * (most / largest);
      const float integer = round_nearest(splat(value))[0];
      const float error = __builtin_fabsf(value - integer);
      // What was cut to zero has lost all.
      if (error != 0) error_ = max(error_, error / max(__builtin_fabsf(integer), error));
      const int code = (int)integer;
      integers[i] = integers[16 + i] = (int16_t)code;
      low[i] = low[16 + i] = (uint8_t)code;
      high[i] = high[16 + i] = (uint8_t)(code >> 8);
    }
  }

  // Whether products with it keep to the accuracy rule: in bfloat16, which rounds each entry's
  // products by up to 2^-9, if none is off by much more than nf4's, 2^-13, whose errors add up to
  // at most 1.7 times those of plain PyTorch in 28672 columns of its worst two codes; in float16,
  // whose errors over a row are smaller than those that add up, if all are integers but for
  // float32's rounding.
  bool is_enough(DType dtype) const {
    return error_ <= (dtype == DType::kBFloat16 ? 0x1.1p-13f : 0x1p-20f);
  }

  float unit() const { return unit_; }

  // The integers, twice, and their bytes.
  int16_t integers[32];
  uint8_t low[32], high[32];

 private:
  static constexpr float kLargest = 16383;
  static constexpr int kUnits = 192;

  // How much below kLargest the largest value is best.
  static float best(const float* table, float scale, float step) {
    float found = 0, least = 1e30f;
    for (int first = 0; first < kUnits; first += kLanes) {
      FVec below, squares = {}, sum = {};
      for (int i = 0; i < kLanes; ++i) below[i] = (float)(first + i);
      const FVec factor = scale - below * step;
      for (int i = 0; i < 16; ++i) {
        const FVec value = table[i] * factor, error = value - round_nearest(value);
        squares += error * error;
        sum += error;
      }
      squares += sum * sum;
      for (int i = 0; i < kLanes; ++i) {
        if (squares[i] >= least) continue;
        least = squares[i];
        found = below[i];
      }
    }
    return found;
  }

  float unit_ = 0, error_ = __builtin_inff();
};

}  // namespace mllama::MLLAMA_ISA
