// The gated residual add and its gradients.
#include "../gated_residual.h"

#include "checks.h"

namespace mllama {
namespace {

Tensor gated_residual(const Tensor& x_in, const Tensor& residual_in, const Tensor& gate,
                      const OptionalTensor& row_mask) {
  Tensor x = x_in, residual = residual_in;
  const Checker c{"gated_residual", x_in, "x"};
  check(x.dim() >= 1, c.op, "x must have at least one dimension");
  check_residual(c, x, residual, gate, row_mask);
  const Rows rows = merged_rows({&x, &residual}, 1);
  Tensor out = empty_like_contiguous(x);
  OptionalTensor mask;
  if (row_mask) mask = c.bools(*row_mask, "row_mask");
  GatedResidualParams p{};
  p.x = x.const_data_ptr();
  p.residual = residual.const_data_ptr();
  p.gate = gate.const_data_ptr();
  p.row_mask = static_cast<const bool*>(data(mask));
  p.out = out.mutable_data_ptr();
  p.rows = x.numel() == 0 ? 0 : rows.inner;
  p.dim = x.size(x.dim() - 1);
  p.x_row_stride = rows.inner_stride[0];
  p.residual_row_stride = rows.inner_stride[1];
  p.dtype = c.dtype();
  launch(c, p, gated_residual_cpu, MLLAMA_CUDA(gated_residual_cuda));
  return out;
}

std::tuple<Tensor, Tensor> gated_residual_backward(const Tensor& grad_out_in, const Tensor& x_in,
                                                   const Tensor& gate,
                                                   const OptionalTensor& row_mask) {
  Tensor grad_out = grad_out_in, x = x_in;
  const Checker c{"gated_residual_backward", x_in, "x"};
  check(x.dim() >= 1, c.op, "x must have at least one dimension");
  const int64_t last = x.dim() - 1;
  c.floating(grad_out, "grad_out");
  c.sizes(grad_out, "grad_out", std::vector<int64_t>(x.sizes().begin(), x.sizes().end()));
  check_gate(c, x, "x", gate, row_mask);
  const Rows rows = merged_rows({&grad_out, &x}, 1);
  Tensor grad_x = empty_like_contiguous(x), grad_gate = empty_like_contiguous(gate);
  Tensor partials = torch::stable::new_empty(x, {kGatePartials}, ScalarType::Double);
  OptionalTensor mask;
  if (row_mask) mask = c.bools(*row_mask, "row_mask");
  GatedResidualBackwardParams p{};
  p.grad_out = grad_out.const_data_ptr();
  p.x = x.const_data_ptr();
  p.gate = gate.const_data_ptr();
  p.row_mask = static_cast<const bool*>(data(mask));
  p.grad_x = grad_x.mutable_data_ptr();
  p.grad_gate = grad_gate.mutable_data_ptr();
  p.gate_partials = partials.mutable_data_ptr<double>();
  p.rows = x.numel() == 0 ? 0 : rows.inner;
  p.dim = x.size(last);
  p.grad_out_row_stride = rows.inner_stride[0];
  p.x_row_stride = rows.inner_stride[1];
  p.dtype = c.dtype();
  launch(c, p, gated_residual_backward_cpu, MLLAMA_CUDA(gated_residual_backward_cuda));
  return {grad_x, grad_gate};
}

}  // namespace
}  // namespace mllama

STABLE_TORCH_LIBRARY_FRAGMENT(mllama_kernels, m) {
  m.def("gated_residual(Tensor x, Tensor residual, Tensor gate, Tensor? row_mask) -> Tensor");
  m.def(
      "gated_residual_backward(Tensor grad_out, Tensor x, Tensor gate, Tensor? row_mask) -> "
      "(Tensor, "
      "Tensor)");
}

MLLAMA_IMPLEMENT(m) {
  m.impl("gated_residual", TORCH_BOX(&mllama::gated_residual));
  m.impl("gated_residual_backward", TORCH_BOX(&mllama::gated_residual_backward));
}
