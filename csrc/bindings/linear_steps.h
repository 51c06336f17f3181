// What stands before and after the product of a projection, as ops of one take it.
#pragma once

#include "checks.h"

namespace mllama {

// Checked, and in the layouts that the kernels read; kept as long as they do.
struct LinearSteps {
  OptionalTensor norm_weight, residual, gate, row_mask;
};

// Of x (rows, k) and a result (rows, n).
inline LinearSteps linear_steps(const Checker& c, int64_t rows, int64_t n, int64_t k,
                                const OptionalTensor& norm_weight, double eps,
                                const OptionalTensor& residual, const OptionalTensor& gate,
                                const OptionalTensor& row_mask) {
  c.eps(eps);
  check(!gate || residual, c.op, "gate is given without residual");
  check(!row_mask || gate, c.op, "row_mask is given without gate");
  LinearSteps steps;
  if (norm_weight) {
    c.floating(*norm_weight, "norm_weight");
    c.sizes(*norm_weight, "norm_weight", {k});
    steps.norm_weight = torch::stable::contiguous(*norm_weight);
  }
  if (residual) {
    c.floating(*residual, "residual");
    c.sizes(*residual, "residual", {rows, n});
    steps.residual = with_contiguous_rows(*residual);
  }
  if (gate) {
    c.floating(*gate, "gate");
    check(gate->numel() == 1, c.op, "gate must have one element, got shape ", shape(*gate));
    steps.gate = gate;
  }
  if (row_mask) {
    c.sizes(*row_mask, "row_mask", {rows});
    steps.row_mask = c.bools(*row_mask, "row_mask");
  }
  return steps;
}

template <typename Params>
void put_steps(const LinearSteps& steps, double eps, Params& p) {
  p.norm_weight = data(steps.norm_weight);
  p.residual = data(steps.residual);
  p.gate = data(steps.gate);
  p.row_mask = static_cast<const bool*>(data(steps.row_mask));
  p.residual_row_stride = steps.residual ? stride(*steps.residual, 0) : 0;
  p.eps = eps;
}

}  // namespace mllama
