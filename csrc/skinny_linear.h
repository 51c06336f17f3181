// skinny_linear: a matrix product with few rows, bound by the reading of the weight, with what
// stands before and after it in a decoder layer:
//   h = norm_weight ? rms_norm(x, norm_weight, eps) : x        (rounded to the dtype)
//   y = h weight^T                                             (float32 sums, rounded to the dtype)
//   y = swiglu ? silu(y[:, :n]) * y[:, n:] : y                 (as swiglu.h)
//   out = residual ? residual + tanh(gate) * row_mask * y : y  (as gated_residual.h; gate may be
//   null)
#pragma once

#include "common.h"

namespace mllama {

constexpr int64_t kSkinnyLinearMaxRows = 16;

struct SkinnyLinearParams {
  const void* x;            // (rows, k), last dimension contiguous
  const void* weight;       // (swiglu ? 2 * n : n, k), last dimension contiguous
  const void* norm_weight;  // (k,), or null: no norm
  const void* residual;     // (rows, n), last dimension contiguous, or null
  const void* gate;         // (1,), or null; only with residual
  const bool* row_mask;     // (rows,), or null: all rows; only with gate
  void* out;                // (rows, n), contiguous
  int64_t rows;             // 0 to kSkinnyLinearMaxRows
  int64_t n, k;             // columns of out, columns of x
  int64_t x_row_stride, weight_row_stride, residual_row_stride;
  double eps;
  bool swiglu;
  // The launch just before on this stream does not write the weight, so that it may be read before
  // that launch has ended.
  bool weight_is_constant;
  DType dtype;
};

void skinny_linear_cpu(const SkinnyLinearParams& p);
int skinny_linear_cuda(const SkinnyLinearParams& p, CUstream_st* stream);

}  // namespace mllama
