// What the driver of quantized_linear knows of its products, which are classes per encoding.
#pragma once

#include "common/scratch.h"
#include "quantized_layout.h"

namespace mllama::MLLAMA_ISA {

// Products in float32. x is (rows, columns of the layout) with a stride.
class FloatProduct {
 public:
  virtual ~FloatProduct() = default;
  // y[row][16 i + j] = x[row] . row j of tile i, for some neighbouring tiles.
  virtual void multiply(const uint8_t* tiles, int64_t count, const float* x, int64_t x_stride,
                        int64_t rows, float* y, int64_t ldy, Scratch& scratch) const = 0;
};

// Products with x in another form: exact, or near enough to it for the accuracy rule, as long as
// all that is added up is finite.
class ReencodedProduct {
 public:
  virtual ~ReencodedProduct() = default;
  virtual void take(int64_t rows, DType dtype) = 0;
  // Row `row` of x, (columns of the layout); false: it has to go the way of floats. Several threads
  // may call it, each for rows of its own.
  virtual bool take_row(int64_t row, const float* x) = 0;
  // y[row][16 i + j] = x[row] . row j of tile i, for some neighbouring tiles. Rows that were not
  // taken may have anything.
  virtual void multiply(const uint8_t* tiles, int64_t count, float* y, int64_t ldy) const = 0;
};

}  // namespace mllama::MLLAMA_ISA
