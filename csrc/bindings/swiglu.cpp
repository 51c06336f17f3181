// SwiGLU and its gradients.
#include "../swiglu.h"

#include "checks.h"

namespace mllama {
namespace {

Tensor swiglu(const Tensor& gate_up_in) {
  Tensor gate_up = gate_up_in;
  const Checker c{"swiglu", gate_up_in, "gate_up"};
  check(gate_up.dim() >= 1 && gate_up.size(gate_up.dim() - 1) % 2 == 0, c.op,
        "gate_up must have an even last dimension, got shape ", shape(gate_up));
  const Rows rows = merged_rows({&gate_up}, 1);
  std::vector<int64_t> out_sizes(gate_up.sizes().begin(), gate_up.sizes().end());
  out_sizes.back() /= 2;
  Tensor out = torch::stable::new_empty(gate_up, out_sizes);
  SwigluParams p{};
  p.gate_up = gate_up.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.rows = out.numel() == 0 ? 0 : rows.inner;
  p.dim = out_sizes.back();
  p.gate_up_row_stride = rows.inner_stride[0];
  p.dtype = c.dtype();
  launch(c, p, swiglu_cpu, MLLAMA_CUDA(swiglu_cuda));
  return out;
}

Tensor swiglu_backward(const Tensor& grad_out_in, const Tensor& gate_up_in) {
  Tensor grad_out = grad_out_in, gate_up = gate_up_in;
  const Checker c{"swiglu_backward", gate_up_in, "gate_up"};
  const int64_t last = gate_up.dim() - 1;
  check(last >= 0 && gate_up.size(last) % 2 == 0, c.op,
        "gate_up must have an even last dimension, got shape ", shape(gate_up));
  std::vector<int64_t> sizes(gate_up.sizes().begin(), gate_up.sizes().end());
  sizes.back() /= 2;
  c.floating(grad_out, "grad_out");
  c.sizes(grad_out, "grad_out", sizes);
  const Rows rows = merged_rows({&grad_out, &gate_up}, 1);
  Tensor grad_gate_up = empty_like_contiguous(gate_up);
  SwigluBackwardParams p{};
  p.grad_out = grad_out.const_data_ptr();
  p.gate_up = gate_up.const_data_ptr();
  p.grad_gate_up = grad_gate_up.mutable_data_ptr();
  p.rows = gate_up.numel() == 0 ? 0 : rows.inner;
  p.dim = sizes.back();
  p.grad_out_row_stride = rows.inner_stride[0];
  p.gate_up_row_stride = rows.inner_stride[1];
  p.dtype = c.dtype();
  launch(c, p, swiglu_backward_cpu, MLLAMA_CUDA(swiglu_backward_cuda));
  return grad_gate_up;
}

}  // namespace
}  // namespace mllama

STABLE_TORCH_LIBRARY_FRAGMENT(mllama_kernels, m) {
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("swiglu_backward(Tensor grad_out, Tensor gate_up) -> Tensor");
}

MLLAMA_IMPLEMENT(m) {
  m.impl("swiglu", TORCH_BOX(&mllama::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&mllama::swiglu_backward));
}
