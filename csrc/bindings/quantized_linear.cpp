// quantized_linear: the kernel for any number of rows on a CPU; on CUDA for few, and for more the
// library's product of slabs of the weight, decoded one after another into the same memory.
#include "linear_steps.h"
#include "product.h"
#include "quantized_weight.h"

namespace mllama {
namespace {

constexpr int64_t kSlabBytes = int64_t{64} << 20;
constexpr int64_t kProductTile = 128;  // slabs are whole tiles of the library's product

int64_t slab_rows(const QuantizedWeight& w, DType dtype) {
  const int64_t fit = std::max<int64_t>(1, kSlabBytes / (w.k * element_size(dtype)));
  return std::min(w.n, fit < kProductTile ? fit : fit / kProductTile * kProductTile);
}

void multiply_by_slabs(const Checker& c, const QuantizedWeight& w, const Tensor& x,
                       const OptionalTensor& bias, const Tensor& out) {
  const DType dtype = c.dtype();
  const int64_t step = slab_rows(w, dtype);
  const Tensor slab = torch::stable::new_empty(x, {step, w.k});
  for (int64_t begin = 0; begin < w.n; begin += step) {
    QuantizedRowsParams p{};
    p.w = w;
    p.begin = begin;
    p.rows = std::min(step, w.n - begin);
    p.out = slab.mutable_data_ptr();
    p.dtype = dtype;
    launch(c, p, quantized_rows_cpu, MLLAMA_CUDA(quantized_rows_cuda));
    const Tensor weight = narrow(slab, 0, 0, p.rows);
    const Tensor part = narrow(out, 1, begin, p.rows);
    if (bias) {
      library_linear(x, weight, narrow(*bias, 0, begin, p.rows), part);
    } else {
      multiply(x, torch::stable::transpose(weight, 0, 1), part);
    }
  }
}

// x as 8-bit integers hold it, in its dtype. On CUDA alone.
Tensor rounded_to_int8(const Checker& c, const Tensor& x) {
  const Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  QuantizedRoundParams p{};
  p.x = x.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.rows = x.size(0);
  p.k = x.size(1);
  p.x_row_stride = stride(x, 0);
  p.dtype = c.dtype();
  launch<QuantizedRoundParams>(c, p, nullptr, MLLAMA_CUDA(quantized_round_cuda));
  return out;
}

Tensor quantized_linear(const Tensor& x_in, const Tensor& packed, OptionalTensor table,
                        int64_t encoding, int64_t n_in, int64_t group, int64_t scale_type,
                        int64_t zero_type, const OptionalTensor& bias_in,
                        const OptionalTensor& norm_weight, double eps,
                        const OptionalTensor& residual, const OptionalTensor& gate,
                        const OptionalTensor& row_mask, bool swiglu, bool weight_is_constant,
                        bool int8_activations) {
  const Checker c{"quantized_linear", x_in, "x"};
  check(x_in.scalar_type() != ScalarType::Double, c.op,
        "x must be float32, float16 or bfloat16, got float64; "
        "mllama_kernels.reference.quantized_linear takes it");
  QuantizedLinearParams p{};
  p.dtype = c.dtype();
  check(x_in.dim() == 2, c.op, "x must be (rows, K), got shape ", shape(x_in));
  const int64_t rows = x_in.size(0), k = x_in.size(1);
  check(k > 0, c.op, "x must have at least one column, got shape ", shape(x_in));
  p.w = weight_of(c, packed, table, {encoding, n_in, k, group, scale_type, zero_type});
  check(!swiglu || n_in % 2 == 0, c.op, "weight must have an even number of rows with swiglu, got ",
        n_in);
  const int64_t n = swiglu ? n_in / 2 : n_in;
  check(!int8_activations || has_integer_codes(p.w.encoding), c.op,
        "activations=\"int8\" has no kernel for ", traits(p.w.encoding).name);
  OptionalTensor bias;
  if (bias_in) {
    c.floating(*bias_in, "bias");
    c.sizes(*bias_in, "bias", {n_in});
    bias = torch::stable::contiguous(*bias_in);
  }
  const LinearSteps steps = linear_steps(c, rows, n, k, norm_weight, eps, residual, gate, row_mask);
  c.product("the result", {rows, n, element_size(p.dtype)});
  const Tensor x = with_contiguous_rows(x_in);
  Tensor out = torch::stable::new_empty(x, {rows, n});
  if (out.numel() == 0) return out;
  if (!c.runs_on_cpu() && rows > kQuantizedLinearMaxRows) {
    check(!norm_weight && !residual && !swiglu, c.op,
          "norm_weight, residual and swiglu go with at most ", kQuantizedLinearMaxRows,
          " rows on CUDA, got ", rows);
    multiply_by_slabs(c, p.w, int8_activations ? rounded_to_int8(c, x) : x, bias, out);
    return out;
  }
  p.x = x.const_data_ptr();
  p.bias = data(bias);
  p.out = out.mutable_data_ptr();
  p.rows = rows;
  p.n = n;
  p.k = k;
  p.x_row_stride = stride(x, 0);
  put_steps(steps, eps, p);
  p.swiglu = swiglu;
  p.weight_is_constant = weight_is_constant;
  p.int8_activations = int8_activations;
  launch(c, p, quantized_linear_cpu, MLLAMA_CUDA(quantized_linear_cuda));
  return out;
}

}  // namespace
}  // namespace mllama

STABLE_TORCH_LIBRARY_FRAGMENT(mllama_kernels, m) {
  m.def(
      "quantized_linear(Tensor x, Tensor packed, Tensor? table, int encoding, int n, int group, "
      "int scale_type, int zero_type, Tensor? bias, Tensor? norm_weight, float eps, "
      "Tensor? residual, Tensor? gate, Tensor? row_mask, bool swiglu, bool weight_is_constant, "
      "bool int8_activations) -> Tensor");
}

MLLAMA_IMPLEMENT(m) { m.impl("quantized_linear", TORCH_BOX(&mllama::quantized_linear)); }
