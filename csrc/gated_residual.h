// gated_residual: out = residual + tanh(gate) * row_mask * x.
#pragma once

#include "common.h"

namespace mllama {

struct GatedResidualParams {
  const void* x;         // (rows, dim), last dimension contiguous
  const void* residual;  // (rows, dim), last dimension contiguous
  const void* gate;      // (1,)
  const bool* row_mask;  // (rows,), or null: all rows
  void* out;             // (rows, dim), contiguous
  int64_t rows, dim;
  int64_t x_row_stride, residual_row_stride;
  DType dtype;
};

void gated_residual_cpu(const GatedResidualParams& p);
int gated_residual_cuda(const GatedResidualParams& p, CUstream_st* stream);

}  // namespace mllama
