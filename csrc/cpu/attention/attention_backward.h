// Gradients of blocked attention: what the attention ops share.
//
// P = exp(scale * Q K^T - lse) is recomputed block by block. With D = grad_out V^T and delta the
// row sums of grad_out * out:
//   dS = P (D - delta)
//   grad_v = P^T grad_out,   grad_k = scale * dS^T Q,   grad_q = scale * dS K
//
// An op describes a task: query rows of one key head and sequence, and segments of keys that they
// meet. Rows and keys are taken in blocks counted from the sequence's and the segment's start, and
// every sum runs over blocks in ascending order, so a task may be cut at the edges of blocks
// anywhere (and give the gradients of its rows alone, or of its keys alone) without a change to any
// bit.
#pragma once

#include "attention.h"

namespace mllama::MLLAMA_ISA {

// Keys in a block; segments are cut at multiples of it.
constexpr int64_t kGradientKeys = 128;
// Tokens in a block of rows.
constexpr int64_t kGradientRows = 192;
MLLAMA_INLINE int64_t gradient_tokens(int64_t group) {
  return max<int64_t>(1, kGradientRows / group);
}

// The queries of an op, and what becomes of their gradients.
template <typename T>
class GradientRows {
 public:
  // Of `tokens` tokens of a sequence from `first` on and key head h, token by token: the queries as
  // they meet the keys, (tokens * group, head_dim).
  virtual void load_rows(int64_t b, int64_t h, int64_t first, int64_t tokens, T* q) const = 0;
  // Their gradients, without the factor softmax_scale, in the same layout.
  virtual void store_rows(int64_t b, int64_t h, int64_t first, int64_t tokens,
                          const Scalar<T>* grad) const = 0;
};

// Query rows of one sequence and key head, and the keys they meet.
template <typename T>
struct GradientTask {
  const GradientRows<T>* rows;
  int64_t sequence, head;
  const T *grad_out, *out;  // query head g of token i at i * token_stride + g * head_stride; of out
                            // the heads are head_dim apart
  int64_t grad_out_token_stride, grad_out_head_stride, out_token_stride;
  const Scalar<T>* lse;  // at g * lse_head_stride + i
  int64_t lse_head_stride;
  int64_t first_token, last_token;  // first_token is where a block begins
  int64_t group, head_dim;
  const Segment* segments;
  int64_t num_segments;
  int64_t visible_stride;
  bool causal;        // token i sees positions up to i
  int64_t first_key;  // position of the first key of the (only) segment of a causal task
  double softmax_scale;
  // Gradients of the keys, that of k without the factor softmax_scale, are added to these: segment
  // by segment, padded_keys() rows of padded_dim() each. Null: not wanted.
  Scalar<T>*grad_k, *grad_v;
  bool with_rows;  // whether the gradients of the rows are wanted
};

MLLAMA_INLINE int64_t padded_keys(int64_t keys) {
  return (keys + kGradientKeys - 1) / kGradientKeys * kGradientKeys;
}
MLLAMA_INLINE int64_t padded_dim(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

template <typename T>
void add_gradients(const GradientTask<T>& task, Scratch& scratch);

// x times factor, rounded to the storage type.
template <typename T>
MLLAMA_INLINE void store_row(const Scalar<T>* x, Scalar<T> factor, int64_t dim, T* out) {
  for_vectors(dim, [&](int64_t d, auto part) { store(out + d, load(x + d, part) * factor, part); });
}

}  // namespace mllama::MLLAMA_ISA
