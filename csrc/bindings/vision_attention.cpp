// Attention of the vision tower, and its gradients.
#include "attention_call.h"

namespace mllama {
namespace {

std::tuple<Tensor, Tensor> vision_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const OptionalTensor& padding, double softmax_scale,
                                            bool with_lse) {
  const Checker c{"vision_attention", q, "q"};
  VisionCall call = vision_call(c, q, k, v, padding, softmax_scale);
  VisionAttentionParams& p = call.params;
  Tensor out = empty_like_contiguous(q), lse = new_lse(c, call.lse_sizes, with_lse);
  p.out = out.mutable_data_ptr();
  p.lse = with_lse ? lse.mutable_data_ptr() : nullptr;
  if (out.numel() != 0) launch(c, p, vision_attention_cpu, MLLAMA_CUDA(vision_attention_cuda));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> vision_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const OptionalTensor& padding, double softmax_scale) {
  const Checker c{"vision_attention_backward", q, "q"};
  const VisionCall call = vision_call(c, q, k, v, padding, softmax_scale);
  VisionAttentionBackwardParams p{call.params};
  const Results given = results(c, q, grad_out, out, lse, call.lse_sizes, p);
  Tensor grad_q = empty_like_contiguous(q), grad_k = empty_like_contiguous(k),
         grad_v = empty_like_contiguous(v);
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_k = grad_k.mutable_data_ptr();
  p.grad_v = grad_v.mutable_data_ptr();
  if (q.numel() == 0) return {grad_q, grad_k, grad_v};
  Tensor scratch = workspace(c, p, MLLAMA_CUDA(vision_attention_backward_workspace));
  launch(c, p, vision_attention_backward_cpu, MLLAMA_CUDA(vision_attention_backward_cuda));
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace mllama

STABLE_TORCH_LIBRARY_FRAGMENT(mllama_kernels, m) {
  m.def(
      "vision_attention(Tensor q, Tensor k, Tensor v, Tensor? padding, float softmax_scale, "
      "bool with_lse) -> (Tensor, Tensor)");
  m.def(
      "vision_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor? padding, float softmax_scale) -> (Tensor, Tensor, Tensor)");
}

MLLAMA_IMPLEMENT(m) {
  m.impl("vision_attention", TORCH_BOX(&mllama::vision_attention));
  m.impl("vision_attention_backward", TORCH_BOX(&mllama::vision_attention_backward));
}
