// sample.
#include "../sample.h"

#include "../sample_math.h"
#include "checks.h"

namespace mllama {
namespace {

Tensor sample(const Tensor& logits_in, const Tensor& seeds_in, const Tensor& step, bool do_sample,
              double temperature, int64_t top_k, double top_p, double min_p,
              double repetition_penalty, const OptionalTensor& seen_in) {
  const Checker c{"sample", logits_in, "logits"};
  check(logits_in.dim() == 2 && logits_in.size(1) > 0 && logits_in.size(1) < kMaxVocab, c.op,
        "logits must be (B, V) with V from 1 to ", kMaxVocab - 1, ", got shape ", shape(logits_in));
  SampleParams p{};
  p.rows = logits_in.size(0);
  p.vocab = logits_in.size(1);
  p.dtype = c.dtype();
  c.typed(seeds_in, "seeds", ScalarType::Long);
  c.sizes(seeds_in, "seeds", {p.rows});
  c.typed(step, "step", ScalarType::Long);
  check(step.numel() == 1, c.op, "step must have one element, got shape ", shape(step));
  // What the kernels divide by is the float32 value.
  p.temperature = static_cast<float>(temperature);
  p.repetition_penalty = static_cast<float>(repetition_penalty);
  check(p.temperature > 0 && std::isfinite(p.temperature), c.op,
        "temperature must be a positive float32, got ", temperature);
  check(p.repetition_penalty > 0 && std::isfinite(p.repetition_penalty), c.op,
        "repetition_penalty must be a positive float32, got ", repetition_penalty);
  check(top_k >= 0, c.op, "top_k must not be negative, got ", top_k);
  check(top_p >= 0 && top_p <= 1, c.op, "top_p must be from 0 to 1, got ", top_p);
  check(min_p >= 0 && min_p <= 1, c.op, "min_p must be from 0 to 1, got ", min_p);
  OptionalTensor seen;
  if (seen_in) {
    c.typed(*seen_in, "seen", ScalarType::Bool);
    c.sizes(*seen_in, "seen", {p.rows, p.vocab});
    if (repetition_penalty != 1) seen = c.bools(*seen_in, "seen");
  }
  const Tensor logits = with_contiguous_rows(logits_in);
  const Tensor seeds = torch::stable::contiguous(seeds_in);
  Tensor tokens = torch::stable::new_empty(seeds, {p.rows});
  p.logits = logits.const_data_ptr();
  p.seeds = seeds.const_data_ptr<int64_t>();
  p.step = step.const_data_ptr<int64_t>();
  p.seen = static_cast<const bool*>(data(seen));
  p.tokens = tokens.mutable_data_ptr<int64_t>();
  p.logits_row_stride = stride(logits, 0);
  p.top_k = top_k;
  p.drop_share = 1 - top_p;
  p.min_weight = std::max<int64_t>(1, static_cast<int64_t>(std::ceil(min_p * kMaxWeight)));
  p.do_sample = do_sample;
  if (p.rows != 0) launch(c, p, sample_cpu, MLLAMA_CUDA(sample_cuda));
  return tokens;
}

}  // namespace
}  // namespace mllama

STABLE_TORCH_LIBRARY_FRAGMENT(mllama_kernels, m) {
  m.def(
      "sample(Tensor logits, Tensor seeds, Tensor step, bool do_sample, float temperature, "
      "int top_k, float top_p, float min_p, float repetition_penalty, Tensor? seen) -> Tensor");
}

MLLAMA_IMPLEMENT(m) { m.impl("sample", TORCH_BOX(&mllama::sample)); }
