// The scaled logits of a chunk: biases, penalties, allowed tokens and temperature, in one pass.
// Every operation is rounded: setup.py compiles without contractions.
#pragma once

#include "sample_chunks.h"

namespace mllama::MLLAMA_ISA {
namespace {

static_assert(kChunk % 32 == 0 && 32 % kLanes == 0, "a vector's bits lie in one word of `allowed`");

MLLAMA_INLINE int64_t size_of(Whole) { return kLanes; }
MLLAMA_INLINE int64_t size_of(First part) { return part.n; }

// What a row adds to the logits of a chunk and takes from them, vector by vector.
class Changes {
 public:
  Changes(const SampleParams& p, const ScaleOptions& options, int64_t row, int64_t begin)
      : options_(options), begin_(begin) {
    if (options.repetition != 1) seen_ = p.seen + row * p.vocab + begin;
    if (options.presence != 0 || options.frequency != 0) {
      counts_ = p.counts + row * p.vocab + begin;
    }
    if (p.num_biases == 0) return;
    tokens_ = p.bias_tokens + row * p.num_biases;
    values_ = p.bias + row * p.num_biases;
    end_ = tokens_ + p.num_biases;
    while (tokens_ < end_ && *tokens_ >= 0 && *tokens_ < begin) ++tokens_, ++values_;
    find_next();
  }

  // Of the chunk's tokens from i on.
  template <typename Part>
  __attribute__((always_inline)) FVec apply(FVec z, int64_t i, Part part) {
    for (; next_ < i + size_of(part); ++tokens_, ++values_, find_next()) z[next_ - i] += *values_;
    if (seen_ != nullptr) z = penalize_seen(z, seen_ + i, part);
    if (counts_ != nullptr) {
      IVec counts = {};
      memcpy(&counts, counts_ + i, size_of(part) * sizeof(int32_t));
      const FVec repeated = options_.frequency * __builtin_convertvector(counts, FVec);
      z = counts > 0 ? z - repeated - options_.presence : z;
    }
    return z;
  }

 private:
  void find_next() { next_ = tokens_ < end_ && *tokens_ >= 0 ? *tokens_ - begin_ : INT64_MAX; }

  // Few tokens are seen, and a division takes long.
  template <typename Part>
  __attribute__((always_inline)) FVec penalize_seen(FVec z, const bool* seen, Part part) {
    uint32_t words[kLanes / 4] = {}, any = 0;
    memcpy(words, seen, size_of(part));
    for (uint32_t word : words) any |= word;
    if (any == 0) return z;
    IVec mask;
    for (int lane = 0; lane < kLanes; ++lane)
      mask[lane] = -(int)(words[lane / 4] >> lane % 4 * 8 & 1);
    return mask ? (z < 0.0f ? z * options_.repetition : z / options_.repetition) : z;
  }

  const ScaleOptions& options_;
  int64_t begin_;
  const bool* seen_ = nullptr;
  const int32_t* counts_ = nullptr;
  const int64_t *tokens_ = nullptr, *end_ = nullptr;
  const float* values_ = nullptr;
  int64_t next_ = INT64_MAX;  // token of the chunk that has a bias
};

// change(z, i, part): the logits z of the chunk's tokens from i on, behind biases and penalties.
// What is not allowed is hidden, but for a NaN or an infinity. out: null where the largest is all
// that is wanted.
template <typename T, typename Change>
void scale_vectors(const T* logits, const Change& change, const int32_t* allowed, float temperature,
                   float* out, int64_t size, Chunk& chunk) {
  const float infinity = __builtin_inff();
  FVec largest = splat(-infinity);
  IVec nans = {}, lane_bits;
  for (int lane = 0; lane < kLanes; ++lane) lane_bits[lane] = 1 << lane;
  for_vectors(size, [&](int64_t i, auto part) {
    FVec z = change(load_float(logits + i, part), i, part);
    if (allowed != nullptr) {
      const int32_t bits = static_cast<int32_t>(static_cast<uint32_t>(allowed[i / 32]) >> i % 32);
      const IVec is_hidden = ((lane_bits & bits) == 0) & (z < infinity);
      z = is_hidden ? splat(-infinity) : z;
    }
    if (temperature != 1) z /= temperature;
    for (int64_t lane = size_of(part); lane < kLanes; ++lane) z[lane] = -infinity;
    nans |= z != z;
    largest = max_vec(z, largest);
    if (out != nullptr) store(out + i, z, part);
  });
  chunk.largest = max_lanes(largest);
  chunk.has_nan = false;
  for (int lane = 0; lane < kLanes; ++lane) chunk.has_nan |= nans[lane] != 0;
}

template <typename T>
void scale(const SampleParams& p, const ScaleOptions& options, int64_t row, int64_t begin,
           float* out, int64_t size, Chunk& chunk) {
  const T* logits = logits_of<T>(p, row) + begin;
  const int32_t* allowed = nullptr;
  if (p.allowed != nullptr) allowed = p.allowed + row * ceil_div<int64_t>(p.vocab, 32) + begin / 32;
  const auto scale_with = [&](const auto& change) {
    scale_vectors(logits, change, allowed, options.temperature, out, size, chunk);
  };
  if (!options.are_penalties() && p.num_biases == 0) {
    return scale_with([](FVec z, int64_t, auto) { return z; });
  }
  Changes changes(p, options, row, begin);
  scale_with([&](FVec z, int64_t i, auto part) { return changes.apply(z, i, part); });
}

}  // namespace
}  // namespace mllama::MLLAMA_ISA
