// Attention to image tiles, and its gradients.
#include "attention_call.h"

namespace mllama {
namespace {

std::tuple<Tensor, Tensor> cross_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const OptionalTensor& tile_mask,
                                           const OptionalTensor& q_norm_weight, double eps,
                                           double softmax_scale, const OptionalTensor& tile_table,
                                           const OptionalTensor& cu_seqlens, int64_t max_seqlen,
                                           bool with_lse) {
  const Checker c{"cross_attention", q, "q"};
  CrossCall call = cross_call(c, q, k, v, tile_mask, q_norm_weight, eps, softmax_scale, tile_table,
                              cu_seqlens, max_seqlen);
  CrossAttentionParams& p = call.params;
  Tensor out = empty_like_contiguous(q), lse = new_lse(c, call.lse_sizes, with_lse);
  p.out = out.mutable_data_ptr();
  p.lse = with_lse ? lse.mutable_data_ptr() : nullptr;
  if (has_no_rows(p) || has_no_keys(p)) return seeing_nothing(out, lse);
  Tensor scratch = workspace(c, p, MLLAMA_CUDA(cross_attention_workspace));
  launch(c, p, cross_attention_cpu, MLLAMA_CUDA(cross_attention_cuda));
  return {out, lse};
}

// The last gradient is empty without q_norm_weight.
std::tuple<Tensor, Tensor, Tensor, Tensor> cross_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const OptionalTensor& tile_mask, const OptionalTensor& q_norm_weight,
    double eps, double softmax_scale, const OptionalTensor& tile_table,
    const OptionalTensor& cu_seqlens, int64_t max_seqlen) {
  const Checker c{"cross_attention_backward", q, "q"};
  const CrossCall call = cross_call(c, q, k, v, tile_mask, q_norm_weight, eps, softmax_scale,
                                    tile_table, cu_seqlens, max_seqlen);
  CrossAttentionBackwardParams p{call.params};
  const Results given = results(c, q, grad_out, out, lse, call.lse_sizes, p);
  Tensor grad_q = empty_like_contiguous(q), grad_k = empty_like_contiguous(k),
         grad_v = empty_like_contiguous(v);
  Tensor grad_weight = torch::stable::new_empty(q, {q_norm_weight ? p.head_dim : 0});
  if (q.numel() == 0 || has_no_rows(p) || has_no_keys(p)) {
    for (Tensor* grad : {&grad_q, &grad_k, &grad_v, &grad_weight}) torch::stable::zero_(*grad);
    return {grad_q, grad_k, grad_v, grad_weight};
  }
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_k = grad_k.mutable_data_ptr();
  p.grad_v = grad_v.mutable_data_ptr();
  p.grad_q_norm_weight = q_norm_weight ? grad_weight.mutable_data_ptr() : nullptr;
  Tensor scratch = workspace(c, p, MLLAMA_CUDA(cross_attention_backward_workspace));
  launch(c, p, cross_attention_backward_cpu, MLLAMA_CUDA(cross_attention_backward_cuda));
  return {grad_q, grad_k, grad_v, grad_weight};
}

}  // namespace
}  // namespace mllama

STABLE_TORCH_LIBRARY_FRAGMENT(mllama_kernels, m) {
  m.def(
      "cross_attention(Tensor q, Tensor k, Tensor v, Tensor? tile_mask, Tensor? q_norm_weight, "
      "float eps, float softmax_scale, Tensor? tile_table, Tensor? cu_seqlens, SymInt max_seqlen, "
      "bool with_lse) -> (Tensor, Tensor)");
  m.def(
      "cross_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor? tile_mask, Tensor? q_norm_weight, float eps, float softmax_scale, "
      "Tensor? tile_table, Tensor? cu_seqlens, SymInt max_seqlen) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}

MLLAMA_IMPLEMENT(m) {
  m.impl("cross_attention", TORCH_BOX(&mllama::cross_attention));
  m.impl("cross_attention_backward", TORCH_BOX(&mllama::cross_attention_backward));
}
