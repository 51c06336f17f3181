// What one row of sample asks for, and which numbers it may: the same on both devices.
#pragma once

#include <math.h>

#include "sample.h"
#include "sample_math.h"

namespace mllama {

// Comparisons that a NaN fails. What the kernels multiply with and divide by is the float32 value.
MLLAMA_HOST_DEVICE static inline bool is_finite_float(double x) {
  const float y = static_cast<float>(x);
  return y - y == 0;
}
MLLAMA_HOST_DEVICE static inline bool is_positive_float(double x) {
  return is_finite_float(x) && static_cast<float>(x) > 0;
}
MLLAMA_HOST_DEVICE static inline bool is_temperature(double x) {
  return x == 0 || is_positive_float(x);
}
MLLAMA_HOST_DEVICE static inline bool is_share(double x) { return x >= 0 && x <= 1; }
MLLAMA_HOST_DEVICE static inline bool is_num_likeliest(int64_t n) {
  return n >= -1 && n <= kMaxLikeliest;
}
// Whether a row's list of tokens with a bias may have `token` at `place`.
MLLAMA_HOST_DEVICE static inline bool is_bias_token(const int64_t* tokens, int64_t place,
                                                    int64_t vocab) {
  const int64_t token = tokens[place], before = place == 0 ? -1 : tokens[place - 1];
  const bool has_ended = place != 0 && before == -1;
  return token == -1 || (token > before && token < vocab && !has_ended);
}

namespace {  // internal linkage: the CPU kernels are compiled once per instruction set

// What makes scaled logits of those given.
struct ScaleOptions {
  float temperature, repetition, presence, frequency;
  bool is_greedy, are_valid;

  MLLAMA_HOST_DEVICE bool are_penalties() const {
    return repetition != 1 || presence != 0 || frequency != 0;
  }
};

MLLAMA_HOST_DEVICE inline ScaleOptions scale_options(const SampleParams& p, int64_t row) {
  ScaleOptions options{1, 1, 0, 0, false, true};
  if (p.temperature != nullptr) {
    const double value = p.temperature[row];
    options.are_valid = is_temperature(value);
    options.is_greedy = value == 0;
    if (!options.is_greedy) options.temperature = static_cast<float>(value);
  }
  if (p.repetition_penalty != nullptr) {
    const double value = p.repetition_penalty[row];
    options.are_valid = options.are_valid && is_positive_float(value);
    options.repetition = static_cast<float>(value);
  }
  if (p.presence_penalty != nullptr) {
    const double value = p.presence_penalty[row];
    options.are_valid = options.are_valid && is_finite_float(value);
    options.presence = static_cast<float>(value);
  }
  if (p.frequency_penalty != nullptr) {
    const double value = p.frequency_penalty[row];
    options.are_valid = options.are_valid && is_finite_float(value);
    options.frequency = static_cast<float>(value);
  }
  return options;
}

// Which tokens may be drawn, by their scaled logits; and how many are to be reported.
struct FilterOptions {
  int64_t top_k;       // 0: off
  double drop_share;   // 1 - top_p; 0: off
  int64_t min_weight;  // of a token that may be drawn; at least 1
  int num_likeliest;   // -1: not even the log-probability of the token
  bool are_valid;
};

// Of numbers of one row; null: nothing is asked for.
MLLAMA_HOST_DEVICE inline FilterOptions filter_options(const int64_t* top_k, const double* top_p,
                                                       const double* min_p,
                                                       const int64_t* num_likeliest) {
  FilterOptions options{0, 0, 1, -1, true};
  if (top_k != nullptr) {
    options.top_k = *top_k;
    options.are_valid = *top_k >= 0;
  }
  if (top_p != nullptr) {
    options.are_valid = options.are_valid && is_share(*top_p);
    options.drop_share = 1 - *top_p;
  }
  if (min_p != nullptr) {
    options.are_valid = options.are_valid && is_share(*min_p);
    if (is_share(*min_p) && *min_p > 0) {
      const double weight = *min_p * kMaxWeight;  // exact
      options.min_weight = static_cast<int64_t>(weight);
      options.min_weight += static_cast<double>(options.min_weight) < weight;
    }
  }
  if (num_likeliest != nullptr) {
    options.are_valid = options.are_valid && is_num_likeliest(*num_likeliest);
    options.num_likeliest = static_cast<int>(*num_likeliest);
  }
  return options;
}

}  // namespace
}  // namespace mllama
