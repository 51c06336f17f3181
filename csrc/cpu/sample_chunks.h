// The rows of sample on the CPU, in chunks that are tasks of their own: scratch, what a chunk
// knows, and its scaled logits.
#pragma once

#include "../sample_row.h"
#include "common/dtypes.h"

namespace mllama::MLLAMA_ISA {
namespace {

constexpr int64_t kChunk = 8192;  // tokens of one task
static_assert(kChunk % 32 == 0 && 32 % kLanes == 0, "a vector's bits lie in one word of `allowed`");

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

// Penalties and biases, which change few tokens. Every operation is rounded: setup.py compiles
// without contractions.
template <typename T>
void change(const SampleParams& p, const ScaleOptions& options, int64_t row, float* out,
            int64_t begin, int64_t size) {
  const T* logits = logits_of<T>(p, row) + begin;
  const bool* seen = options.repetition != 1 ? p.seen + row * p.vocab + begin : nullptr;
  for_vectors(size, [&](int64_t i, auto part) {
    FVec z = load_float(logits + i, part);
    if (seen != nullptr) {
      IVec mask = {};
      const int64_t n = min<int64_t>(kLanes, size - i);
      for (int64_t lane = 0; lane < n; ++lane) mask[lane] = -(int)seen[i + lane];
      const FVec penalized = z < 0.0f ? z * options.repetition : z / options.repetition;
      z = mask ? penalized : z;
    }
    store(out + i, z, part);
  });
  if (options.presence != 0 || options.frequency != 0) {
    const int32_t* counts = p.counts + row * p.vocab + begin;
    for (int64_t i = 0; i < size; ++i) {
      if (counts[i] <= 0) continue;
      out[i] = out[i] - options.frequency * static_cast<float>(counts[i]) - options.presence;
    }
  }
  const int64_t* tokens = p.bias_tokens + row * p.num_biases;
  for (int64_t i = 0; i < p.num_biases && tokens[i] >= 0 && tokens[i] < begin + size; ++i) {
    if (tokens[i] >= begin) out[tokens[i] - begin] += p.bias[row * p.num_biases + i];
  }
}

// Hides what is not allowed, and divides; the chunk's largest. A NaN or an infinity stays visible.
// out: null where the largest is all that is wanted.
template <typename T>
void divide(const T* logits, const int32_t* allowed, float temperature, float* out, int64_t size,
            Chunk& chunk) {
  const float infinity = __builtin_inff();
  FVec largest = splat(-infinity);
  IVec nans = {}, lane_bits;
  for (int lane = 0; lane < kLanes; ++lane) lane_bits[lane] = 1 << lane;
  for_vectors(size, [&](int64_t i, auto part) {
    FVec z = load_float(logits + i, part);
    if (allowed != nullptr) {
      const int32_t bits = static_cast<int32_t>(static_cast<uint32_t>(allowed[i / 32]) >> i % 32);
      const IVec is_hidden = ((lane_bits & bits) == 0) & (z < infinity);
      z = is_hidden ? splat(-infinity) : z;
    }
    if (temperature != 1) z /= temperature;
    for (int64_t lane = min<int64_t>(kLanes, size - i); lane < kLanes; ++lane) z[lane] = -infinity;
    nans |= z != z;
    largest = max_vec(z, largest);
    if (out != nullptr) store(out + i, z, part);
  });
  chunk.largest = max_lanes(largest);
  chunk.has_nan = false;
  for (int lane = 0; lane < kLanes; ++lane) chunk.has_nan |= nans[lane] != 0;
}

// The scaled logits of a chunk. keep: false where the largest is all that is wanted.
template <typename T>
void scale(const SampleParams& p, const ScaleOptions& options, int64_t row, bool keep, float* out,
           int64_t begin, int64_t size, Chunk& chunk) {
  const int32_t* allowed = nullptr;
  if (p.allowed != nullptr) allowed = p.allowed + row * ceil_div<int64_t>(p.vocab, 32) + begin / 32;
  if (!options.are_penalties() && p.num_biases == 0) {
    divide(logits_of<T>(p, row) + begin, allowed, options.temperature, keep ? out : nullptr, size,
           chunk);
  } else {
    change<T>(p, options, row, out, begin, size);
    divide(out, allowed, options.temperature, keep ? out : nullptr, size, chunk);
  }
}

void find_levels(const float* scaled, float largest, uint32_t* levels, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const float distance = largest - scaled[i];
    const float cut = distance < kMaxDistance ? distance : kMaxDistance;
    levels[i] = static_cast<uint32_t>(static_cast<int32_t>(cut * kLevelsPerUnit));
  }
}

}  // namespace
}  // namespace mllama::MLLAMA_ISA
