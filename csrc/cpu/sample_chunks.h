// The rows of sample on the CPU, in chunks that are tasks of their own: scratch, and what a chunk
// knows.
#pragma once

#include "../sample_row.h"
#include "common/dtypes.h"

namespace mllama::MLLAMA_ISA {
namespace {

constexpr int64_t kChunk = 8192;  // tokens of one task

MLLAMA_INLINE FVec load_float(const double* p, Whole part) {
  return __builtin_convertvector(load(p, part), FVec);
}
MLLAMA_INLINE FVec load_float(const double* p, First part) {
  return __builtin_convertvector(load(p, part), FVec);
}
template <typename T, typename Part>
MLLAMA_INLINE FVec load_float(const T* p, Part part) {
  return load(p, part);
}

// The likeliest tokens so far: the larger logit first, then the lower token.
struct Likeliest {
  float logits[kMaxLikeliest];
  int32_t tokens[kMaxLikeliest];
  int count;

  // In the order of the tokens.
  void add(float logit, int32_t token, int wanted) {
    if (count == wanted && !(logit > logits[count - 1])) return;
    int place = count < wanted ? count++ : count - 1;
    for (; place > 0 && logit > logits[place - 1]; --place) {
      logits[place] = logits[place - 1];
      tokens[place] = tokens[place - 1];
    }
    logits[place] = logit;
    tokens[place] = token;
  }
};

// What one task knows of its chunk.
struct Chunk {
  float largest;
  bool has_nan;
  int64_t packed;  // tokens kept together at the chunk's place in the arrays
  int64_t mass;    // of those that may be drawn, or of all
  int64_t bins[kBins];
  Likeliest likeliest;
};

struct Row {
  float* scaled;     // (vocab,)
  uint32_t* levels;  // (vocab,), packed chunk by chunk
  int32_t* tokens;   // which token a packed level belongs to
  int64_t* weights;  // of the packed levels
  Chunk* chunks;
  int64_t vocab;

  int64_t count() const { return ceil_div(vocab, kChunk); }

  template <typename F>
  void for_chunks(const F& f) const {
    parallel_for(0, count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        f(chunks[i], i * kChunk, min(kChunk, vocab - i * kChunk));
    });
  }
};

template <typename T>
const T* logits_of(const SampleParams& p, int64_t row) {
  return static_cast<const T*>(p.logits) + row * p.logits_row_stride;
}

}  // namespace
}  // namespace mllama::MLLAMA_ISA
