// sample.
#include "../sample_row.h"
#include "checks.h"

namespace mllama {
namespace {

// The options of a call: checked, contiguous, and with values in range where the host can read
// them.
class Options {
 public:
  Options(const Checker& c, int64_t rows) : c_(c), rows_(rows) { kept_.reserve(16); }

  // One number per row; what `allows` says no to is named with its row.
  template <typename T>
  const T* numbers(const OptionalTensor& t, const char* what, bool (*allows)(T),
                   const char* expected) {
    if (!t) return nullptr;
    c_.typed(*t, what, std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Long);
    c_.sizes(*t, what, {rows_});
    const Tensor& values = keep(*t);
    const T* data = values.const_data_ptr<T>();
    for (int64_t row = 0; values.is_cpu() && row < rows_; ++row) {
      check(allows(data[row]), c_.op, what, " must be ", expected, ", got ", data[row], " in row ",
            row);
    }
    return data;
  }

  template <typename T>
  const T* table(const OptionalTensor& t, const char* what, ScalarType type, int64_t columns) {
    if (!t) return nullptr;
    c_.typed(*t, what, type);
    c_.sizes(*t, what, {rows_, columns});
    return static_cast<const T*>(keep(*t).const_data_ptr());
  }

  const bool* flags(const OptionalTensor& t, const char* what, int64_t columns) {
    if (!t) return nullptr;
    c_.typed(*t, what, ScalarType::Bool);
    c_.sizes(*t, what, {rows_, columns});
    return static_cast<const bool*>(kept_.emplace_back(c_.bools(*t, what)).const_data_ptr());
  }

 private:
  // Asking first spares a call of torch's dispatcher, which is what small rows take their time for.
  const Tensor& keep(const Tensor& t) {
    return kept_.emplace_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
  }

  const Checker& c_;
  int64_t rows_;
  std::vector<Tensor> kept_;
};

void check_together(const Checker& c, bool has_first, const char* first, bool has_second,
                    const char* second) {
  check(has_first == has_second, c.op, "give ", first, " and ", second, " together, got only ",
        has_first ? first : second);
}

void check_biases(const Checker& c, const SampleParams& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t* tokens = p.bias_tokens + row * p.num_biases;
    for (int64_t i = 0; i < p.num_biases; ++i) {
      check(is_bias_token(tokens, i, p.vocab), c.op, "bias_tokens must rise in a row from 0 to ",
            p.vocab - 1, " at most, with -1 behind the last, got ", tokens[i], " at ", i,
            " of row ", row);
      const float bias = p.bias[row * p.num_biases + i];
      check(tokens[i] < 0 || bias < INFINITY, c.op, "bias must be finite or -inf, got ", bias,
            " at ", i, " of row ", row);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> sample(
    const Tensor& logits_in, const Tensor& seeds, const Tensor& steps,
    const OptionalTensor& temperature, const OptionalTensor& top_k, const OptionalTensor& top_p,
    const OptionalTensor& min_p, const OptionalTensor& repetition_penalty,
    const OptionalTensor& seen, const OptionalTensor& presence_penalty,
    const OptionalTensor& frequency_penalty, const OptionalTensor& counts,
    const OptionalTensor& bias_tokens, const OptionalTensor& bias, const OptionalTensor& allowed,
    const OptionalTensor& num_likeliest) {
  const Checker c{"sample", logits_in, "logits"};
  check(logits_in.dim() == 2 && logits_in.size(1) > 0 && logits_in.size(1) < kMaxVocab, c.op,
        "logits must be (B, V) with V from 1 to ", kMaxVocab - 1, ", got shape ", shape(logits_in));
  SampleParams p{};
  p.rows = logits_in.size(0);
  p.vocab = logits_in.size(1);
  p.dtype = c.dtype();
  check_together(c, repetition_penalty.has_value(), "repetition_penalty", seen.has_value(), "seen");
  check_together(c, presence_penalty || frequency_penalty, "presence_penalty or frequency_penalty",
                 counts.has_value(), "counts");
  check_together(c, bias_tokens.has_value(), "bias_tokens", bias.has_value(), "bias");
  if (bias_tokens) {
    check(bias_tokens->dim() == 2, c.op, "bias_tokens must be (B, M), got shape ",
          shape(*bias_tokens));
    p.num_biases = bias_tokens->size(1);
  }
  Options options(c, p.rows);
  constexpr auto any = [](int64_t) { return true; };
  p.seeds = options.numbers<int64_t>(seeds, "seeds", any, "");
  p.steps = options.numbers<int64_t>(steps, "steps", any, "");
  p.temperature = options.numbers<double>(temperature, "temperature", is_temperature,
                                          "0 (greedy) or a positive float32");
  p.top_k = options.numbers<int64_t>(
      top_k, "top_k", [](int64_t k) { return k >= 0; }, "0 (off) or positive");
  p.top_p = options.numbers<double>(top_p, "top_p", is_share, "from 0 to 1");
  p.min_p = options.numbers<double>(min_p, "min_p", is_share, "from 0 to 1");
  p.repetition_penalty = options.numbers<double>(repetition_penalty, "repetition_penalty",
                                                 is_positive_float, "a positive float32");
  p.seen = options.flags(seen, "seen", p.vocab);
  p.presence_penalty = options.numbers<double>(presence_penalty, "presence_penalty",
                                               is_finite_float, "a finite float32");
  p.frequency_penalty = options.numbers<double>(frequency_penalty, "frequency_penalty",
                                                is_finite_float, "a finite float32");
  p.counts = options.table<int32_t>(counts, "counts", ScalarType::Int, p.vocab);
  p.bias_tokens =
      options.table<int64_t>(bias_tokens, "bias_tokens", ScalarType::Long, p.num_biases);
  p.bias = options.table<float>(bias, "bias", ScalarType::Float, p.num_biases);
  p.allowed =
      options.table<int32_t>(allowed, "allowed", ScalarType::Int, ceil_div<int64_t>(p.vocab, 32));
  p.num_likeliest =
      options.numbers<int64_t>(num_likeliest, "num_likeliest", is_num_likeliest, "from -1 to 20");
  if (p.num_biases > 0 && bias->is_cpu()) check_biases(c, p);
  const Tensor logits = with_contiguous_rows(logits_in);
  p.logits = logits.const_data_ptr();
  p.logits_row_stride = stride(logits, 0);
  const int64_t reported = num_likeliest ? kMaxLikeliest : 0, own = num_likeliest ? 1 : 0;
  Tensor tokens = torch::stable::new_empty(seeds, {p.rows});
  Tensor likeliest = torch::stable::new_empty(seeds, {p.rows, reported});
  Tensor logprobs = torch::stable::new_empty(logits, {p.rows, own + reported}, ScalarType::Float);
  p.tokens = tokens.mutable_data_ptr<int64_t>();
  p.likeliest = likeliest.mutable_data_ptr<int64_t>();
  p.logprobs = logprobs.mutable_data_ptr<float>();
  if (p.rows != 0) launch(c, p, sample_cpu, MLLAMA_CUDA(sample_cuda));
  return {tokens, likeliest, logprobs};
}

}  // namespace
}  // namespace mllama

STABLE_TORCH_LIBRARY_FRAGMENT(mllama_kernels, m) {
  m.def(
      "sample(Tensor logits, Tensor seeds, Tensor steps, Tensor? temperature, Tensor? top_k, "
      "Tensor? top_p, Tensor? min_p, Tensor? repetition_penalty, Tensor? seen, "
      "Tensor? presence_penalty, Tensor? frequency_penalty, Tensor? counts, Tensor? bias_tokens, "
      "Tensor? bias, Tensor? allowed, Tensor? num_likeliest) -> (Tensor, Tensor, Tensor)");
}

MLLAMA_IMPLEMENT(m) { m.impl("sample", TORCH_BOX(&mllama::sample)); }
