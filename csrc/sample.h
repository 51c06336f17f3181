// sample: from logits to tokens; penalties, biases, allowed tokens, temperature, top-k, top-p,
// min-p and draw in one call, every option of a row its own, and log-probabilities of the logits as
// given.
#pragma once

#include "common.h"

namespace mllama {

// What a row asks for lies in arrays of one element per row; where one is null, no row asks for it.
// Numbers out of range make a row's token kInvalidToken (sample_math.h).
struct SampleParams {
  const void* logits;    // (rows, vocab), last dimension contiguous
  const int64_t* seeds;  // (rows,)
  const int64_t* steps;  // (rows,)
  const double* temperature;
  const int64_t* top_k;
  const double *top_p, *min_p;
  const double *repetition_penalty, *presence_penalty, *frequency_penalty;
  const bool* seen;            // (rows, vocab), contiguous; not null with repetition_penalty
  const int32_t* counts;       // (rows, vocab), contiguous; not null with the other penalties
  const int64_t* bias_tokens;  // (rows, num_biases), contiguous: rising, then -1
  const float* bias;           // (rows, num_biases), contiguous
  const int32_t* allowed;      // (rows, ceil(vocab / 32)), contiguous; the lowest bit comes first
  const int64_t* num_likeliest;
  int64_t* tokens;     // (rows,)
  int64_t* likeliest;  // (rows, kMaxLikeliest), contiguous
  float* logprobs;     // (rows, 1 + kMaxLikeliest), contiguous: of the token, then of the likeliest
  int64_t rows, vocab, logits_row_stride, num_biases;
  DType dtype;
};

constexpr int kMaxLikeliest = 20;

void sample_cpu(const SampleParams& p);
int sample_cuda(const SampleParams& p, CUstream_st* stream);

}  // namespace mllama
