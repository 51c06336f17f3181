// rms_norm and add_rms_norm: y = weight * round(t / sqrt(mean(t^2) + eps)), where t is x or, with a
// residual, residual + x or residual + tanh(gate) * row_mask * x.
#pragma once

#include "common.h"

namespace mllama {

struct RmsNormParams {
  const void* x;         // (outer, inner, dim), last dimension contiguous
  const void* residual;  // like x, or null
  const void* gate;      // (1,), or null: no gate
  const bool* row_mask;  // (outer * inner,), or null: all rows
  const void* weight;    // (dim,)
  void* y;               // (outer, inner, dim), contiguous
  void* residual_out;    // like y; null without residual
  int64_t outer, inner, dim;
  int64_t x_outer_stride, x_inner_stride;
  int64_t residual_outer_stride, residual_inner_stride;
  double eps;
  DType dtype;
};

void rms_norm_cpu(const RmsNormParams& p);
int rms_norm_cuda(const RmsNormParams& p, CUstream_st* stream);  // a cudaError_t; 0 is success

}  // namespace mllama
