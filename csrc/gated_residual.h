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

// The gradient of the residual is grad_out itself.
struct GatedResidualBackwardParams {
  const void* grad_out;   // (rows, dim), last dimension contiguous
  const void* x;          // (rows, dim), last dimension contiguous
  const void* gate;       // (1,)
  const bool* row_mask;   // (rows,), or null: all rows
  void* grad_x;           // (rows, dim), contiguous
  void* grad_gate;        // (1,)
  double* gate_partials;  // (kGatePartials,)
  int64_t rows, dim;
  int64_t grad_out_row_stride, x_row_stride;
  DType dtype;
};

// At most so many partial sums of the gate's gradient, by a rule that knows rows and dim alone.
constexpr int64_t kGatePartials = 512;

void gated_residual_cpu(const GatedResidualParams& p);
int gated_residual_cuda(const GatedResidualParams& p, CUstream_st* stream);
void gated_residual_backward_cpu(const GatedResidualBackwardParams& p);
int gated_residual_backward_cuda(const GatedResidualBackwardParams& p, CUstream_st* stream);

}  // namespace mllama
