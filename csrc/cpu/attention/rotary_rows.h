// The rows of rotary_attention: rotated on their way to the products, their gradients rotated back.
#pragma once

#include "../../common.h"
#include "../common/rope.h"
#include "sequence_rows.h"

namespace mllama::MLLAMA_ISA {

template <typename T, typename Params>
class RotaryRows : public SequenceRows<T, Params> {
  using Base = SequenceRows<T, Params>;

 public:
  using Base::Base;

 protected:
  using Base::group_;
  using Base::p_;
  using Base::row;
  using Base::start;

  // f(b, t) for every token t of every sequence b, whatever max_seqlen is and however many
  // sequences are empty.
  template <typename F>
  void for_tokens(const F& f) const {
    parallel_for(0, end_of(p_.batch - 1), kRotatedTokens, [&](int64_t begin, int64_t end) {
      int64_t b = sequence_of(begin);
      for (int64_t i = begin; i < end; ++i) {
        while (i >= end_of(b)) ++b;
        f(b, i - start(b));
      }
    });
  }

  // Where the keys of head h start among rotated keys, (tokens, num_kv_heads, head_dim) contiguous.
  int64_t k_offset(int64_t b, int64_t h) const {
    return (start(b) * p_.num_kv_heads + h) * p_.head_dim;
  }

  // The queries of key head h, token by token, (tokens * group, head_dim) contiguous.
  void load_queries(int64_t b, int64_t h, int64_t first, int64_t tokens, T* out) const {
    for (int64_t t = 0; t < tokens; ++t) {
      const T* x = row(p_.q, b, first + t, p_.q_batch_stride, p_.q_token_stride) +
                   h * group_ * p_.q_head_stride;
      for (int64_t g = 0; g < group_; ++g, out += p_.head_dim) {
        rotate(x + g * p_.q_head_stride, start(b) + first + t, out);
      }
    }
  }

  // Token is counted over all sequences.
  void rotate(const T* x, int64_t token, T* out) const {
    (p_.interleaved ? rotate_pairs<T> : rotate_halves<T>)(x, cos(token), sin(token),
                                                          p_.head_dim / 2, out);
  }
  void unrotate(const Scalar<T>* grad, int64_t token, Scalar<T> scale, T* out) const {
    (p_.interleaved ? unrotate_pairs<T> : unrotate_halves<T>)(grad, cos(token), sin(token),
                                                              p_.head_dim / 2, scale, out);
  }

 private:
  static constexpr int64_t kRotatedTokens = 16;  // that a thread takes at least

  int64_t end_of(int64_t b) const { return start(b) + this->tokens(b); }

  // Of row i among all tokens: the last sequence that starts there or before.
  int64_t sequence_of(int64_t i) const {
    if (!p_.cu_seqlens) return i / p_.max_seqlen;
    int64_t low = 0, high = p_.batch;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (start(middle) <= i ? low : high) = middle;
    }
    return low;
  }

  const T* cos(int64_t token) const {
    return static_cast<const T*>(p_.cos) + token % p_.cos_rows * p_.cos_row_stride;
  }
  const T* sin(int64_t token) const {
    return static_cast<const T*>(p_.sin) + token % p_.cos_rows * p_.sin_row_stride;
  }
};

}  // namespace mllama::MLLAMA_ISA
