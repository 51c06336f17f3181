// skinny_linear.
#include "../skinny_linear.h"

#include "linear_steps.h"

namespace mllama {
namespace {

Tensor skinny_linear(const Tensor& x_in, const Tensor& weight, const OptionalTensor& norm_weight,
                     double eps, const OptionalTensor& residual, const OptionalTensor& gate,
                     const OptionalTensor& row_mask, bool swiglu, bool weight_is_constant) {
  const Checker c{"skinny_linear", x_in, "x"};
  check(x_in.dim() == 2, c.op, "x must be (rows, K), got shape ", shape(x_in));
  const int64_t rows = x_in.size(0), k = x_in.size(1);
  check(rows <= kSkinnyLinearMaxRows, c.op, "x must have at most ", kSkinnyLinearMaxRows,
        " rows, got ", rows);
  check(k > 0, c.op, "x must have at least one column, got shape ", shape(x_in));
  c.floating(weight, "weight");
  check(weight.dim() == 2 && weight.size(1) == k, c.op, "weight must be (", swiglu ? "2 N" : "N",
        ", ", k, "), got shape ", shape(weight));
  check(!swiglu || weight.size(0) % 2 == 0, c.op,
        "weight must have an even number of rows with swiglu, got ", weight.size(0));
  c.last_contiguous(weight, "weight");  // a copy would cost more than the product
  const int64_t n = swiglu ? weight.size(0) / 2 : weight.size(0);
  const LinearSteps steps = linear_steps(c, rows, n, k, norm_weight, eps, residual, gate, row_mask);
  const Tensor x = with_contiguous_rows(x_in);
  Tensor out = torch::stable::new_empty(x, {rows, n});
  SkinnyLinearParams p{};
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.rows = rows;
  p.n = n;
  p.k = k;
  p.x_row_stride = stride(x, 0);
  p.weight_row_stride = stride(weight, 0);
  put_steps(steps, eps, p);
  p.swiglu = swiglu;
  p.weight_is_constant = weight_is_constant;
  p.dtype = c.dtype();
  if (out.numel() != 0) launch(c, p, skinny_linear_cpu, MLLAMA_CUDA(skinny_linear_cuda));
  return out;
}

}  // namespace
}  // namespace mllama

STABLE_TORCH_LIBRARY_FRAGMENT(mllama_kernels, m) {
  m.def(
      "skinny_linear(Tensor x, Tensor weight, Tensor? norm_weight, float eps, Tensor? residual, "
      "Tensor? gate, Tensor? row_mask, bool swiglu, bool weight_is_constant) -> Tensor");
}

MLLAMA_IMPLEMENT(m) { m.impl("skinny_linear", TORCH_BOX(&mllama::skinny_linear)); }
