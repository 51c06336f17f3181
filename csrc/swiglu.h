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

void swiglu_cpu(const SwigluParams& p);
int swiglu_cuda(const SwigluParams& p, CUstream_st* stream);

}  // namespace mllama
