// Where the rows of ragged sequences lie: what rotary_attention, cross_attention and their
// gradients share.
#pragma once

#include "../common/simd.h"
#include "attention.h"

namespace mllama::MLLAMA_ISA {

template <typename T, typename Params>
class SequenceRows {
 public:
  explicit SequenceRows(const Params& p) : p_(p) {}

  int64_t batch() const { return p_.batch; }
  int64_t kv_heads() const { return p_.num_kv_heads; }
  int64_t group() const { return group_; }
  int64_t head_dim() const { return p_.head_dim; }
  int64_t tokens(int64_t b) const {
    return p_.cu_seqlens ? p_.cu_seqlens[b + 1] - start(b) : p_.max_seqlen;
  }

 protected:
  // Of sequence b: its first row among all tokens.
  int64_t start(int64_t b) const { return p_.cu_seqlens ? p_.cu_seqlens[b] : b * p_.max_seqlen; }

  // Token t of sequence b in a tensor of these strides.
  const T* row(const void* base, int64_t b, int64_t t, int64_t batch_stride,
               int64_t token_stride) const {
    return static_cast<const T*>(base) +
           (p_.cu_seqlens ? (start(b) + t) * token_stride : b * batch_stride + t * token_stride);
  }

  int64_t q_offset(int64_t b, int64_t h, int64_t t) const {
    return ((start(b) + t) * p_.num_q_heads + h * group_) * p_.head_dim;
  }

  // The log-sum-exp of token t and the first query head of key head h; the next head's is
  // lse_head_stride() elements on. Null if not wanted.
  Scalar<T>* lse(int64_t b, int64_t h, int64_t t) const {
    if (!p_.lse) return nullptr;
    const int64_t sequence = p_.cu_seqlens ? start(b) : b * p_.num_q_heads * p_.max_seqlen;
    return static_cast<Scalar<T>*>(p_.lse) + sequence + h * group_ * lse_head_stride() + t;
  }
  int64_t lse_head_stride() const { return p_.cu_seqlens ? p_.tokens : p_.max_seqlen; }

  // For `tokens` tokens of sequence b from `first` on and key head h: all of a task but its keys.
  // The queries are for the caller to load, to `q`.
  AttentionTask query_task(int64_t b, int64_t h, int64_t first, int64_t tokens, const T* q) const {
    AttentionTask task = {};
    task.q = q;
    task.out_token_stride = p_.num_q_heads * p_.head_dim;
    task.out = static_cast<T*>(p_.out) + q_offset(b, h, first);
    task.lse = lse(b, h, first);
    task.lse_head_stride = lse_head_stride();
    task.tokens = tokens;
    task.group = group_;
    task.head_dim = p_.head_dim;
    task.softmax_scale = p_.softmax_scale;
    return task;
  }

  const Params& p_;
  const int64_t group_ = p_.num_q_heads / p_.num_kv_heads;
};

}  // namespace mllama::MLLAMA_ISA
