// sample: from logits to tokens; penalty, temperature, top-k, top-p, min-p and draw in one call.
#pragma once

#include "common.h"

namespace mllama {

struct SampleParams {
  const void* logits;    // (rows, vocab), last dimension contiguous
  const int64_t* seeds;  // (rows,)
  const int64_t* step;   // (1,)
  const bool* seen;      // (rows, vocab), contiguous; null: no penalty
  int64_t* tokens;       // (rows,), what the op returns
  int64_t rows, vocab, logits_row_stride;
  float temperature, repetition_penalty;
  int64_t top_k;       // 0: off
  double drop_share;   // 1 - top_p; 0: off
  int64_t min_weight;  // of a token that may be drawn; at least 1
  bool do_sample;
  DType dtype;
};

void sample_cpu(const SampleParams& p);
int sample_cuda(const SampleParams& p, CUstream_st* stream);

}  // namespace mllama
