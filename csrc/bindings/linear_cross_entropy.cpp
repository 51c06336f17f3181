// linear_cross_entropy: chunks of logits by the library's matrix product, each turned into losses
// and gradient by the kernel and multiplied on before the next takes its place.
#include "../linear_cross_entropy.h"

#include "product.h"

namespace mllama {
namespace {

constexpr int64_t kVectorElements = 8;  // rows of logits start on 16 bytes in every dtype
constexpr int64_t kMaxClasses = INT32_MAX;
constexpr int64_t kProductTile = 128;  // chunks are whole tiles of the matrix product

Tensor rows_of(const Tensor& t, int64_t begin, int64_t count) { return narrow(t, 0, begin, count); }

// Columns of a buffer that has some to spare.
Tensor columns_of(const Tensor& buffer, int64_t count) { return narrow(buffer, 1, 0, count); }

// How many rows or classes of logits, each a line of so many elements, are made at once.
int64_t chunk_of(int64_t lines, int64_t line_elements, int64_t element_size, int64_t chunk_bytes) {
  const int64_t fit = chunk_bytes / std::max<int64_t>(1, line_elements * element_size);
  const int64_t whole = fit < kProductTile ? fit : fit / kProductTile * kProductTile;
  return std::clamp<int64_t>(whole, 1, std::max<int64_t>(1, lines));
}

ScalarType statistics_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void* offset(const Tensor& t, int64_t elements) {
  return static_cast<char*>(t.mutable_data_ptr()) +
         elements * static_cast<int64_t>(t.element_size());
}

CrossEntropyTerms checked_terms(const Checker& c, const Tensor& x, const Tensor& weight,
                                const Tensor& labels, int64_t ignore_index, int64_t masked_token,
                                double label_smoothing, double z_loss, int64_t chunk_bytes) {
  check(x.dim() == 2, c.op, "x must be (rows, E), got shape ", shape(x));
  c.floating(weight, "weight");
  check(weight.dim() == 2 && weight.size(1) == x.size(1) && weight.size(0) > 0, c.op,
        "weight must be (V, ", x.size(1), "), got shape ", shape(weight));
  check(weight.size(0) <= kMaxClasses, c.op, "weight must have at most ", kMaxClasses,
        " rows, got shape ", shape(weight));
  c.typed(labels, "labels", ScalarType::Long);
  c.sizes(labels, "labels", {x.size(0)});
  check(label_smoothing >= 0 && label_smoothing <= 1, c.op,
        "label_smoothing must be from 0 to 1, got ", label_smoothing);
  check(std::isfinite(z_loss), c.op, "z_loss must be finite, got ", z_loss);
  check(chunk_bytes > 0, c.op, "chunk_bytes must be positive, got ", chunk_bytes);
  return {weight.size(0), ignore_index, masked_token, label_smoothing, z_loss};
}

// On a GPU nobody can look without waiting for it; there such a row's loss is NaN.
void check_labels(const Checker& c, const Tensor& labels, const CrossEntropyTerms& terms) {
  if (!c.runs_on_cpu()) return;
  const int64_t* label = labels.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < labels.size(0); ++row) {
    const bool ignored = label[row] == terms.ignore_index || label[row] == terms.masked_token;
    check(ignored || (label[row] >= 0 && label[row] < terms.vocab), c.op, "labels must be ",
          terms.ignore_index, " or within 0..", terms.vocab - 1, ", got ", label[row], " in row ",
          row);
  }
}

// with_grad_logits: all rows at once, and what they leave in the logits' place for the backward.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    const Tensor& x, const Tensor& weight, const Tensor& labels_in, int64_t ignore_index,
    int64_t masked_token, double label_smoothing, double z_loss, bool with_grad_x,
    bool with_grad_logits, int64_t chunk_bytes) {
  const Checker c{"linear_cross_entropy", x, "x"};
  LinearCrossEntropyParams p{};
  p.terms = checked_terms(c, x, weight, labels_in, ignore_index, masked_token, label_smoothing,
                          z_loss, chunk_bytes);
  p.dtype = c.dtype();
  p.with_grad = with_grad_x || with_grad_logits;
  const Tensor labels = torch::stable::contiguous(labels_in);
  check_labels(c, labels, p.terms);
  const int64_t rows = x.size(0), vocab = p.terms.vocab;
  const ScalarType statistics = statistics_type(x);
  const Tensor loss = torch::stable::new_empty(x, {rows}, statistics);
  const Tensor sums = torch::stable::new_empty(x, {2, rows}, statistics);
  const Tensor grad_x = torch::stable::new_empty(x, {with_grad_x ? rows : 0, x.size(1)});
  const int64_t line = round_up(vocab, kVectorElements);
  const int64_t chunk =
      with_grad_logits ? rows : chunk_of(rows, line, element_size(p.dtype), chunk_bytes);
  const Tensor buffer = columns_of(torch::stable::new_empty(x, {chunk, line}), vocab);
  const Tensor grad_logits = with_grad_logits ? buffer : torch::stable::new_empty(x, {0, vocab});
  if (rows == 0) return {loss, sums, grad_x, grad_logits};
  const Tensor to_logits = torch::stable::transpose(weight, 0, 1);
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    p.rows = std::min(chunk, rows - begin);
    const Tensor logits = rows_of(buffer, 0, p.rows);
    multiply(rows_of(x, begin, p.rows), to_logits, logits);
    p.logits = logits.mutable_data_ptr();
    p.logits_row_stride = line;
    p.labels = labels.const_data_ptr<int64_t>() + begin;
    p.loss = offset(loss, begin);
    p.maximum = offset(sums, begin);
    p.sum = offset(sums, rows + begin);
    launch(c, p, linear_cross_entropy_cpu, MLLAMA_CUDA(linear_cross_entropy_cuda));
    if (with_grad_x) multiply(logits, weight, rows_of(grad_x, begin, p.rows));
  }
  return {loss, sums, grad_x, grad_logits};
}

Tensor linear_cross_entropy_backward(const Tensor& grad_loss_in, const Tensor& x,
                                     const Tensor& weight, const Tensor& labels_in,
                                     const Tensor& sums_in, int64_t ignore_index,
                                     int64_t masked_token, double label_smoothing, double z_loss,
                                     int64_t chunk_bytes) {
  const Checker c{"linear_cross_entropy_backward", x, "x"};
  LinearCrossEntropyBackwardParams p{};
  p.terms = checked_terms(c, x, weight, labels_in, ignore_index, masked_token, label_smoothing,
                          z_loss, chunk_bytes);
  p.dtype = c.dtype();
  c.typed(grad_loss_in, "grad_loss", statistics_type(x));
  c.sizes(grad_loss_in, "grad_loss", {x.size(0)});
  c.typed(sums_in, "sums", statistics_type(x));
  c.sizes(sums_in, "sums", {2, x.size(0)});
  const Tensor labels = torch::stable::contiguous(labels_in);
  const Tensor sums = torch::stable::contiguous(sums_in);
  const Tensor grad_loss = torch::stable::contiguous(grad_loss_in);
  check_labels(c, labels, p.terms);
  Tensor grad_weight = torch::stable::new_empty(weight, weight.sizes());
  p.rows = x.size(0);
  if (p.rows == 0) return torch::stable::zero_(grad_weight);
  p.labels = labels.const_data_ptr<int64_t>();
  p.maximum = sums.const_data_ptr();
  p.sum = rows_of(sums, 1, 1).const_data_ptr();
  p.grad_loss = grad_loss.const_data_ptr();
  const int64_t vocab = p.terms.vocab;
  const int64_t chunk = chunk_of(vocab, p.rows, element_size(p.dtype), chunk_bytes);
  p.logits_row_stride = round_up(chunk, kVectorElements);
  const Tensor buffer = torch::stable::new_empty(x, {p.rows, p.logits_row_stride});
  p.logits = buffer.mutable_data_ptr();
  for (p.first_class = 0; p.first_class < vocab; p.first_class += chunk) {
    p.classes = std::min(chunk, vocab - p.first_class);
    const Tensor logits = columns_of(buffer, p.classes);
    const Tensor classes = rows_of(weight, p.first_class, p.classes);
    multiply(x, torch::stable::transpose(classes, 0, 1), logits);
    launch(c, p, linear_cross_entropy_backward_cpu,
           MLLAMA_CUDA(linear_cross_entropy_backward_cuda));
    multiply(torch::stable::transpose(logits, 0, 1), x,
             rows_of(grad_weight, p.first_class, p.classes));
  }
  return grad_weight;
}

}  // namespace
}  // namespace mllama

STABLE_TORCH_LIBRARY_FRAGMENT(mllama_kernels, m) {
  m.def(
      "linear_cross_entropy(Tensor x, Tensor weight, Tensor labels, int ignore_index, "
      "int masked_token, float label_smoothing, float z_loss, bool with_grad_x, "
      "bool with_grad_logits, int chunk_bytes) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_cross_entropy_backward(Tensor grad_loss, Tensor x, Tensor weight, Tensor labels, "
      "Tensor sums, int ignore_index, int masked_token, float label_smoothing, float z_loss, "
      "int chunk_bytes) -> Tensor");
}

MLLAMA_IMPLEMENT(m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&mllama::linear_cross_entropy));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&mllama::linear_cross_entropy_backward));
}
