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

// Rows of (outer, inner, dim), the last dimension contiguous; data is null for an absent tensor.
struct RowsView {
  const void* data;
  int64_t outer_stride, inner_stride;
};

struct RmsNormBackwardParams {
  RowsView total;        // what was normalised: x of rms_norm, the sum of add_rms_norm
  RowsView grad_y;       // the gradient of the result
  RowsView grad_total;   // the gradient that reaches the sum from elsewhere, or absent
  RowsView x;            // of add_rms_norm, if it has a gate
  const void* weight;    // (dim,)
  const void* gate;      // (1,), or null
  const bool* row_mask;  // (outer * inner,), or null
  void* grad_residual;  // (outer, inner, dim), contiguous: of the sum, so of x too without gate and
                        // mask
  void* grad_x;         // like it; null without gate and mask
  void* grad_weight;    // (dim,)
  void* grad_gate;      // (1,); null without gate
  void* weight_partials;  // (norm_row_blocks(rows), dim rounded up to 8), kept in double for 32 and
                          // 64 bits
  double* gate_partials;  // (norm_row_blocks(rows),); null without gate
  int64_t outer, inner, dim;
  double eps;
  DType dtype;
};

// The gradients of weight and gate are sums over rows: first within this many blocks of consecutive
// rows, then over the blocks in their order, which therefore depends on nothing but the number of
// rows; block b begins with row rows * b / blocks. One block for each multiprocessor of a large
// GPU; enough rows in each that the partial sums are few bytes beside them.
constexpr int64_t norm_row_blocks(int64_t rows) {
  if (rows >= 8192) return 256;
  return rows >= 512 ? 128 : ceil_div<int64_t>(rows, 4);
}

void rms_norm_cpu(const RmsNormParams& p);
int rms_norm_cuda(const RmsNormParams& p, CUstream_st* stream);  // a cudaError_t; 0 is success
void rms_norm_backward_cpu(const RmsNormBackwardParams& p);
int rms_norm_backward_cuda(const RmsNormBackwardParams& p, CUstream_st* stream);

}  // namespace mllama
