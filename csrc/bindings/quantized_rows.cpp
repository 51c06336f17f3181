// quantized_rows, the rows of a weight that an embedding reads, and quantized_dequantize, those of
// a range.
#include "quantized_weight.h"

namespace mllama {
namespace {

void check_ids(const Checker& c, const Tensor& ids, int64_t n) {
  if (!c.runs_on_cpu()) return;
  const int64_t* id = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i) {
    check(id[i] >= 0 && id[i] < n, c.op, "ids must be within 0..", n - 1, ", got ", id[i]);
  }
}

Tensor quantized_rows(const Tensor& ids_in, const Tensor& packed, OptionalTensor table,
                      int64_t encoding, int64_t n, int64_t k, int64_t group, int64_t scale_type,
                      int64_t zero_type, ScalarType dtype) {
  const Checker c{"quantized_rows", ids_in, "ids"};
  c.typed(ids_in, "ids", ScalarType::Long);
  QuantizedRowsParams p{};
  p.dtype = decoded_dtype(c, dtype);
  p.w = weight_of(c, packed, table, {encoding, n, k, group, scale_type, zero_type});
  const Tensor ids = torch::stable::contiguous(ids_in);
  check_ids(c, ids, n);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < ids.dim(); ++i) sizes.push_back(ids.size(i));
  sizes.push_back(k);
  c.product("ids", {ids.numel(), k, 4});
  Tensor out = torch::stable::new_empty(packed, sizes, dtype);
  p.ids = ids.const_data_ptr<int64_t>();
  p.rows = ids.numel();
  p.out = out.mutable_data_ptr();
  if (p.rows != 0) launch(c, p, quantized_rows_cpu, MLLAMA_CUDA(quantized_rows_cuda));
  return out;
}

Tensor quantized_dequantize(const Tensor& packed, OptionalTensor table, int64_t encoding, int64_t n,
                            int64_t k, int64_t group, int64_t scale_type, int64_t zero_type,
                            int64_t begin, int64_t end, ScalarType dtype) {
  const Checker c{"quantized_dequantize", packed, "packed"};
  QuantizedRowsParams p{};
  p.dtype = decoded_dtype(c, dtype);
  p.w = weight_of(c, packed, table, {encoding, n, k, group, scale_type, zero_type});
  check(begin >= 0 && begin <= end && end <= n, c.op, "begin and end must be among the ", n,
        " rows of the weight, got ", begin, ", ", end);
  Tensor out = torch::stable::new_empty(packed, {end - begin, k}, dtype);
  p.begin = begin;
  p.rows = end - begin;
  p.out = out.mutable_data_ptr();
  if (p.rows != 0) launch(c, p, quantized_rows_cpu, MLLAMA_CUDA(quantized_rows_cuda));
  return out;
}

}  // namespace
}  // namespace mllama

STABLE_TORCH_LIBRARY_FRAGMENT(mllama_kernels, m) {
  m.def(
      "quantized_rows(Tensor ids, Tensor packed, Tensor? table, int encoding, int n, int k, "
      "int group, int scale_type, int zero_type, ScalarType dtype) -> Tensor");
  m.def(
      "quantized_dequantize(Tensor packed, Tensor? table, int encoding, int n, int k, int group, "
      "int scale_type, int zero_type, int begin, int end, ScalarType dtype) -> Tensor");
}

MLLAMA_IMPLEMENT(m) {
  m.impl("quantized_rows", TORCH_BOX(&mllama::quantized_rows));
  m.impl("quantized_dequantize", TORCH_BOX(&mllama::quantized_dequantize));
}
