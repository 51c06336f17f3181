// swiglu: out = round(silu(gate)) * up on the fused projection [gate, up].
#pragma once

#include "common.h"

namespace mllama {

struct SwigluParams {
  const void* gate_up;  // (rows, 2 * dim), last dimension contiguous
  void* out;            // (rows, dim), contiguous
  int64_t rows, dim;
  int64_t gate_up_row_stride;
  DType dtype;
};

struct SwigluBackwardParams {
  const void* grad_out;  // (rows, dim), last dimension contiguous
  const void* gate_up;   // (rows, 2 * dim), last dimension contiguous
  void* grad_gate_up;    // (rows, 2 * dim), contiguous
  int64_t rows, dim;
  int64_t grad_out_row_stride, gate_up_row_stride;
  DType dtype;
};

void swiglu_cpu(const SwigluParams& p);
int swiglu_cuda(const SwigluParams& p, CUstream_st* stream);
void swiglu_backward_cpu(const SwigluBackwardParams& p);
int swiglu_backward_cuda(const SwigluBackwardParams& p, CUstream_st* stream);

}  // namespace mllama
