// Log-probabilities of a row's logits as they were given: of the token, and of the likeliest.
#pragma once

#include "sample_chunks.h"
#include "sample_weights.h"

namespace mllama::MLLAMA_ISA {
namespace {

template <typename T>
void find_likeliest(const T* logits, int64_t begin, int64_t size, int wanted, Likeliest& found) {
  found.count = 0;
  for_vectors(size, [&](int64_t i, auto part) {
    const FVec z = load_float(logits + begin + i, part);
    if (found.count == wanted && !(max_lanes(z) > found.logits[wanted - 1])) return;
    const int64_t n = min<int64_t>(kLanes, size - i);
    for (int64_t lane = 0; lane < n; ++lane)
      found.add(z[lane], static_cast<int32_t>(begin + i + lane), wanted);
  });
}

template <typename T>
int64_t find_total(const T* logits, float largest, int64_t size) {
  constexpr int64_t kBlock = 256;
  float z[kBlock];
  uint32_t levels[kBlock];
  int64_t weights[kBlock];
  int64_t total = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t count = min(kBlock, size - begin);
    for_vectors(count, [&](int64_t i, auto part) {
      store(z + i, load_float(logits + begin + i, part), part);
    });
    find_levels(z, largest, levels, count);
    find_weights(levels, weights, count);
    for (int64_t i = 0; i < count; ++i) total += weights[i];
  }
  return total;
}

template <typename T>
void write_logprobs(const SampleParams& p, const Row& row, int64_t index, int64_t token) {
  int64_t* tokens = p.likeliest + index * kMaxLikeliest;
  float* logprobs = p.logprobs + index * (1 + kMaxLikeliest);
  for (int i = 0; i < kMaxLikeliest; ++i) tokens[i] = kInvalidToken;
  for (int i = 0; i <= kMaxLikeliest; ++i) logprobs[i] = __builtin_nanf("");
  const int64_t wanted = p.num_likeliest[index];
  if (token == kInvalidToken || wanted < 0) return;
  const T* logits = logits_of<T>(p, index);
  const int kept = max<int>(1, static_cast<int>(wanted));
  row.for_chunks([&](Chunk& chunk, int64_t begin, int64_t size) {
    find_likeliest(logits, begin, size, kept, chunk.likeliest);
  });
  Likeliest all;
  all.count = 0;
  for (int64_t c = 0; c < row.count(); ++c) {
    const Likeliest& found = row.chunks[c].likeliest;
    for (int i = 0; i < found.count; ++i) all.add(found.logits[i], found.tokens[i], kept);
  }
  const float largest = all.logits[0];
  row.for_chunks([&](Chunk& chunk, int64_t begin, int64_t size) {
    chunk.mass = find_total(logits + begin, largest, size);
  });
  int64_t total = 0;
  for (int64_t c = 0; c < row.count(); ++c) total += row.chunks[c].mass;
  const double mass = log_mass(total);
  logprobs[0] = log_probability(load_float(logits + token, First{1})[0], largest, mass);
  for (int i = 0; i < min<int>(all.count, static_cast<int>(wanted)); ++i) {
    tokens[i] = all.tokens[i];
    logprobs[1 + i] = log_probability(all.logits[i], largest, mass);
  }
}

}  // namespace
}  // namespace mllama::MLLAMA_ISA
