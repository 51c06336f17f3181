// linear_cross_entropy: from a chunk of logits to losses and, in its place, to the gradient.
#pragma once

#include "common.h"

namespace mllama {

// loss = lse - (1 - label_smoothing) * logits[label] - label_smoothing * mean(logits)
//        + z_loss * lse^2,   lse = log(sum(exp(logits))).
struct CrossEntropyTerms {
  int64_t vocab;
  int64_t ignore_index, masked_token;  // labels of rows without a loss
  double label_smoothing, z_loss;
};

// Chunks of rows. Ignored rows: everything is 0. On CUDA a label that is no class makes loss, sum
// and gradient NaN; on CPU the caller has checked.
struct LinearCrossEntropyParams {
  void* logits;           // (rows, vocab); with_grad: the gradient of each row's loss replaces them
  const int64_t* labels;  // (rows,)
  void* loss;             // (rows,) float32, float64 for float64
  void* maximum;  // (rows,), like loss: the largest logit, and the sum of exp(logit - maximum).
  void* sum;      // Together they are exact where lse would lose the digits of large logits.
  int64_t rows, logits_row_stride;
  CrossEntropyTerms terms;
  bool with_grad;
  DType dtype;
};

// Chunks of classes: grad_loss times the gradient of each row's loss.
struct LinearCrossEntropyBackwardParams {
  void* logits;           // (rows, classes) from first_class on; the gradient replaces them
  const int64_t* labels;  // (rows,)
  const void* maximum;    // (rows,), of the forward
  const void* sum;
  const void* grad_loss;  // (rows,), like maximum
  int64_t rows, classes, first_class, logits_row_stride;
  CrossEntropyTerms terms;
  DType dtype;
};

void linear_cross_entropy_cpu(const LinearCrossEntropyParams& p);
int linear_cross_entropy_cuda(const LinearCrossEntropyParams& p, CUstream_st* stream);
void linear_cross_entropy_backward_cpu(const LinearCrossEntropyBackwardParams& p);
int linear_cross_entropy_backward_cuda(const LinearCrossEntropyBackwardParams& p,
                                       CUstream_st* stream);

}  // namespace mllama
