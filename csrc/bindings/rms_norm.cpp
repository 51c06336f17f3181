// RMSNorm, with or without a residual add before it, and its gradients.
#include "../rms_norm.h"

#include "checks.h"

namespace mllama {
namespace {

void run_rms_norm(const Checker& c, Tensor x, OptionalTensor residual, const OptionalTensor& gate,
                  const OptionalTensor& row_mask, const Tensor& weight, double eps, Tensor& y,
                  Tensor* residual_out) {
  check(x.dim() >= 1, c.op, "x must have at least one dimension");
  const int64_t dim = x.size(x.dim() - 1);
  c.floating(weight, "weight");
  c.sizes(weight, "weight", {dim});
  c.eps(eps);
  const DType dtype = c.dtype();
  const Tensor w = torch::stable::contiguous(weight);
  const Rows rows = residual ? merged_rows({&x, &*residual}, 2) : merged_rows({&x}, 2);
  OptionalTensor g, mask;
  if (gate) g = torch::stable::contiguous(*gate);
  if (row_mask) mask = c.bools(*row_mask, "row_mask");
  RmsNormParams p{};
  p.x = x.const_data_ptr();
  p.residual = data(residual);
  p.gate = data(g);
  p.row_mask = static_cast<const bool*>(data(mask));
  p.weight = w.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.residual_out = residual_out ? residual_out->mutable_data_ptr() : nullptr;
  p.outer = x.numel() == 0 ? 0 : rows.outer;
  p.inner = rows.inner;
  p.dim = dim;
  p.x_outer_stride = rows.outer_stride[0];
  p.x_inner_stride = rows.inner_stride[0];
  p.residual_outer_stride = residual ? rows.outer_stride[1] : 0;
  p.residual_inner_stride = residual ? rows.inner_stride[1] : 0;
  p.eps = eps;
  p.dtype = dtype;
  launch(c, p, rms_norm_cpu, MLLAMA_CUDA(rms_norm_cuda));
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Checker c{"rms_norm", x, "x"};
  Tensor y = empty_like_contiguous(x);
  run_rms_norm(c, x, std::nullopt, std::nullopt, std::nullopt, weight, eps, y, nullptr);
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                        const Tensor& weight, double eps,
                                        const OptionalTensor& gate,
                                        const OptionalTensor& row_mask) {
  const Checker c{"add_rms_norm", x, "x"};
  check(x.dim() >= 1, c.op, "x must have at least one dimension");
  check_residual(c, x, residual, gate, row_mask);
  Tensor y = empty_like_contiguous(x), residual_out = empty_like_contiguous(x);
  run_rms_norm(c, x, residual, gate, row_mask, weight, eps, y, &residual_out);
  return {y, residual_out};
}

// The gradients of the sum (of x, for rms_norm), of x behind a gate or mask, of weight and of gate;
// those of arguments that are not there are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> run_rms_norm_backward(
    const Checker& c, const Tensor& total, const char* total_name, const Tensor& grad_y,
    const OptionalTensor& grad_total, const Tensor& weight, double eps, const OptionalTensor& x,
    const OptionalTensor& gate, const OptionalTensor& row_mask) {
  check(total.dim() >= 1, c.op, total_name, " must have at least one dimension");
  const std::vector<int64_t> sizes(total.sizes().begin(), total.sizes().end());
  const int64_t dim = sizes.back();
  c.floating(weight, "weight");
  c.sizes(weight, "weight", {dim});
  c.eps(eps);
  check(gate.has_value() == x.has_value(), c.op, "x and gate must be given together");
  check_gate(c, total, total_name, gate, row_mask);
  // In the order of `views` below.
  std::vector<Tensor> tensors{total, grad_y};
  const auto take = [&](const OptionalTensor& t, const char* what) {
    if (!t) return;
    c.floating(*t, what);
    c.sizes(*t, what, sizes);
    tensors.push_back(*t);
  };
  c.floating(grad_y, "grad_y");
  c.sizes(grad_y, "grad_y", sizes);
  take(grad_total, "grad_total");
  take(x, "x");
  std::vector<Tensor*> pointers;
  for (Tensor& t : tensors) pointers.push_back(&t);
  const Rows rows = merged_rows(pointers, 2);
  const Tensor w = torch::stable::contiguous(weight);
  OptionalTensor g, mask;
  if (gate) g = torch::stable::contiguous(*gate);
  if (row_mask) mask = c.bools(*row_mask, "row_mask");
  RmsNormBackwardParams p{};
  std::vector<RowsView*> views{&p.total, &p.grad_y};
  if (grad_total) views.push_back(&p.grad_total);
  if (x) views.push_back(&p.x);
  for (size_t i = 0; i < views.size(); ++i) {
    *views[i] = {tensors[i].const_data_ptr(), rows.outer_stride[i], rows.inner_stride[i]};
  }
  p.weight = w.const_data_ptr();
  p.gate = data(g);
  p.row_mask = static_cast<const bool*>(data(mask));
  p.outer = total.numel() == 0 ? 0 : rows.outer;
  p.inner = rows.inner;
  p.dim = dim;
  p.eps = eps;
  p.dtype = c.dtype();
  Tensor grad_residual = empty_like_contiguous(total), grad_weight = empty_like_contiguous(weight);
  Tensor grad_x =
      gate || row_mask ? empty_like_contiguous(total) : torch::stable::new_empty(total, {0});
  Tensor grad_gate = gate ? empty_like_contiguous(*gate) : torch::stable::new_empty(total, {0});
  p.grad_residual = grad_residual.mutable_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  if (gate || row_mask) p.grad_x = grad_x.mutable_data_ptr();
  if (gate) p.grad_gate = grad_gate.mutable_data_ptr();
  const int64_t blocks = norm_row_blocks(p.outer * p.inner);
  const bool wide = element_size(p.dtype) > 2;
  Tensor weight_partials = torch::stable::new_empty(total, {blocks, round_up<int64_t>(dim, 8)},
                                                    wide ? ScalarType::Double : ScalarType::Float);
  Tensor gate_partials = torch::stable::new_empty(total, {gate ? blocks : 0}, ScalarType::Double);
  p.weight_partials = weight_partials.mutable_data_ptr();
  if (gate) p.gate_partials = gate_partials.mutable_data_ptr<double>();
  launch(c, p, rms_norm_backward_cpu, MLLAMA_CUDA(rms_norm_backward_cuda));
  return {grad_residual, grad_x, grad_weight, grad_gate};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_y, const Tensor& x,
                                             const Tensor& weight, double eps) {
  const Checker c{"rms_norm_backward", x, "x"};
  const auto [grad_x, none, grad_weight, no_gate] = run_rms_norm_backward(
      c, x, "x", grad_y, std::nullopt, weight, eps, std::nullopt, std::nullopt, std::nullopt);
  return {grad_x, grad_weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_rms_norm_backward(
    const Tensor& grad_y, const OptionalTensor& grad_total, const Tensor& total,
    const Tensor& weight, double eps, const OptionalTensor& x, const OptionalTensor& gate,
    const OptionalTensor& row_mask) {
  const Checker c{"add_rms_norm_backward", total, "total"};
  return run_rms_norm_backward(c, total, "total", grad_y, grad_total, weight, eps, x, gate,
                               row_mask);
}

}  // namespace
}  // namespace mllama

STABLE_TORCH_LIBRARY_FRAGMENT(mllama_kernels, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, Tensor? gate, "
      "Tensor? row_mask) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor grad_y, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def(
      "add_rms_norm_backward(Tensor grad_y, Tensor? grad_total, Tensor total, Tensor weight, float "
      "eps, Tensor? x, Tensor? gate, Tensor? row_mask) -> (Tensor, Tensor, Tensor, Tensor)");
}

MLLAMA_IMPLEMENT(m) {
  m.impl("rms_norm", TORCH_BOX(&mllama::rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&mllama::add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&mllama::rms_norm_backward));
  m.impl("add_rms_norm_backward", TORCH_BOX(&mllama::add_rms_norm_backward));
}
