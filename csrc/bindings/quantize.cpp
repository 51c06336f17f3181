// A weight's parts in an encoding.
#include "../quantize.h"

#include "checks.h"

namespace mllama {
namespace {

struct Made {
  const char* name;
  Encoding encoding;
  bool takes_importance;
};

constexpr Made kMade[] = {
    {"int8", Encoding::kInt8, false}, {"fp8", Encoding::kFp8, false},
    {"q8_0", Encoding::kQ8_0, false}, {"q6_k", Encoding::kQ6_K, true},
    {"q4_k", Encoding::kQ4_K, true},  {"q4_0", Encoding::kQ4_0, true},
};

const Made& made(const char* op, const std::string& name) {
  for (const Made& m : kMade) {
    if (name == m.name) return m;
  }
  check(false, op, "encoding must be int8, fp8, q8_0, q6_k, q4_k or q4_0, got ", name);
  return kMade[0];
}

// Raises for a weight that the kernel refused, for which the copies wait.
void check_refused(const Checker& c, const Tensor& weight, const Tensor& refused,
                   const Made& encoding) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const int64_t index = *torch::stable::to(refused, cpu).const_data_ptr<int64_t>();
  if (index == weight.numel()) return;
  const int64_t row = index / weight.size(1), column = index % weight.size(1);
  const Tensor cell = torch::stable::select(torch::stable::select(weight, 0, row), 0, column);
  const Tensor value = torch::stable::to(cell, ScalarType::Float, std::nullopt, cpu);
  check(false, c.op, "the weight in row ", row, ", column ", column, " is ",
        *value.const_data_ptr<float>(), "; ", encoding.name, " holds finite magnitudes up to ",
        largest_magnitude(encoding.encoding));
}

std::vector<Tensor> quantize_blocks(const Tensor& weight_in, std::string encoding,
                                    const OptionalTensor& importance_in) {
  const Checker c{"quantize", weight_in, "weight"};
  check(weight_in.dim() == 2, c.op, "weight must be (N, K), got shape ", shape(weight_in));
  check(weight_in.scalar_type() != ScalarType::Double, c.op,
        "weight must be float32, float16 or bfloat16, got float64");
  const Made& chosen = made(c.op, encoding);
  QuantizeParams p{};
  p.dtype = c.dtype();
  p.encoding = chosen.encoding;
  p.rows = weight_in.size(0);
  p.k = weight_in.size(1);
  const int64_t block = ggml_block(p.encoding);
  check(block == 0 || p.k % block == 0, c.op, chosen.name, " encodes ", block,
        " columns together, which does not divide the width ", p.k);
  OptionalTensor importance;
  if (importance_in) {
    check(chosen.takes_importance, c.op, chosen.name, " takes no importance");
    c.typed(*importance_in, "importance", ScalarType::Float);
    c.sizes(*importance_in, "importance", {p.k});
    importance = torch::stable::contiguous(*importance_in);
    p.importance = importance->const_data_ptr<float>();
  }
  const Tensor weight = with_contiguous_rows(weight_in);
  p.weight = weight.const_data_ptr();
  p.row_stride = stride(weight, 0);
  Tensor refused = torch::stable::new_empty(weight, {1}, ScalarType::Long);
  torch::stable::fill_(refused, static_cast<double>(weight.numel()));
  std::vector<Tensor> parts;
  if (block != 0) {
    parts.push_back(torch::stable::new_empty(
        weight, {p.rows, p.k / block * ggml_block_bytes(p.encoding)}, ScalarType::Byte));
  } else {
    parts.push_back(torch::stable::new_empty(
        weight, {p.rows, p.k},
        p.encoding == Encoding::kInt8 ? ScalarType::Char : ScalarType::Float8_e4m3fn));
    parts.push_back(torch::stable::new_empty(weight, {p.rows}, ScalarType::Float));
    p.scale = parts[1].mutable_data_ptr<float>();
  }
  p.data = static_cast<uint8_t*>(parts[0].mutable_data_ptr());
  p.refused = refused.mutable_data_ptr<int64_t>();
  if (p.rows * p.k == 0) return parts;
  launch(c, p, quantize_cpu, MLLAMA_CUDA(quantize_cuda));
  check_refused(c, weight, refused, chosen);
  return parts;
}

}  // namespace
}  // namespace mllama

STABLE_TORCH_LIBRARY_FRAGMENT(mllama_kernels, m) {
  m.def("quantize_blocks(Tensor weight, str encoding, Tensor? importance) -> Tensor[]");
}

MLLAMA_IMPLEMENT(m) { m.impl("quantize_blocks", TORCH_BOX(&mllama::quantize_blocks)); }
