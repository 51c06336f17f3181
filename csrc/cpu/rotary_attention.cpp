// rotary_attention and rotary_attention_cached: new keys are rotated and stored first, into the
// pages or into scratch, then one task per (sequence, key head, run of tokens) attends; see
// attention_driver.h. Rows past the last sequence are zero.
#include "../rotary_attention.h"

#include "attention/attention_driver.h"
#include "attention/rotary_rows.h"
#include "common/dtypes.h"
#include "ops.h"

namespace mllama::MLLAMA_ISA {
namespace {

template <typename T>
class Sequences : public RotaryRows<T, RotaryAttentionParams> {
  using Base = RotaryRows<T, RotaryAttentionParams>;
  using Base::group_;
  using Base::k_offset;
  using Base::load_queries;
  using Base::p_;
  using Base::rotate;
  using Base::row;
  using Base::start;

 public:
  using Base::Base;
  using Base::tokens;

  void append() const {
    this->for_tokens([&](int64_t b, int64_t t) { append_token(b, t); });
  }

  // For AttentionDriver.
  int64_t max_splits(int64_t b) const { return ceil_div(past(b) + tokens(b), kSplitKeys); }

  AttentionTask make_task(int64_t b, int64_t h, int64_t first, int64_t tokens,
                          Scratch& scratch) const {
    T* q = scratch.take<T>(tokens * group_ * p_.head_dim);
    load_queries(b, h, first, tokens, q);
    Segment* keys = scratch.take<Segment>(1);
    *keys = segment(b, h);
    AttentionTask task = this->query_task(b, h, first, tokens, q);
    task.segments = keys;
    task.num_segments = 1;
    task.causal = true;
    task.past = past(b) + first;
    return task;
  }

 private:
  int64_t past(int64_t b) const { return p_.cache_lens ? p_.cache_lens[b] : 0; }

  // Where the cache holds head h of position t of sequence b, in elements.
  int64_t cache_offset(int64_t b, int64_t h, int64_t position) const {
    const int64_t page = p_.page_table[b * p_.max_pages + position / p_.page_size];
    return ((page * p_.num_kv_heads + h) * p_.page_size + position % p_.page_size) * p_.head_dim;
  }

  void append_token(int64_t b, int64_t t) const {
    const T* k = row(p_.k, b, t, p_.k_batch_stride, p_.k_token_stride);
    const T* v = row(p_.v, b, t, p_.v_batch_stride, p_.v_token_stride);
    const int64_t token = start(b) + t;
    for (int64_t h = 0; h < p_.num_kv_heads; ++h) {
      const int64_t offset = p_.page_table ? cache_offset(b, h, past(b) + t)
                                           : (token * p_.num_kv_heads + h) * p_.head_dim;
      rotate(k + h * p_.k_head_stride, token, static_cast<T*>(p_.k_cache) + offset);
      if (p_.page_table) {
        memcpy(static_cast<T*>(p_.v_cache) + offset, v + h * p_.v_head_stride,
               p_.head_dim * sizeof(T));
      }
    }
  }

  Segment segment(int64_t b, int64_t h) const {
    constexpr int64_t size = sizeof(T);
    const int64_t keys = past(b) + tokens(b);
    if (p_.page_table) {
      const int32_t* pages = p_.page_table + b * p_.max_pages;
      const int64_t head = h * p_.page_size * p_.head_dim * size,
                    page = p_.num_kv_heads * p_.page_size * p_.head_dim;
      const auto rows = [&](const void* cache) {
        return KeyRows{static_cast<const char*>(cache) + head, p_.head_dim * size, pages,
                       p_.page_size, page * size};
      };
      return {rows(p_.k_cache), rows(p_.v_cache), keys, nullptr};
    }
    const int64_t stride = p_.num_kv_heads * p_.head_dim;
    const T* k = static_cast<const T*>(p_.k_cache) + k_offset(b, h);
    const T* v = row(p_.v, b, 0, p_.v_batch_stride, p_.v_token_stride) + h * p_.v_head_stride;
    return {{reinterpret_cast<const char*>(k), stride * size, nullptr, 0, 0},
            {reinterpret_cast<const char*>(v), p_.v_token_stride * size, nullptr, 0, 0},
            keys,
            nullptr};
  }
};

}  // namespace

void rotary_attention(const RotaryAttentionParams& p) {
  if (p.tokens * p.num_q_heads * p.head_dim == 0) return;
  with_dtype(p.dtype, [&]<typename T>(Type<T>) {
    const Sequences<T> sequences(p);
    clear_tail<T>(p);
    sequences.append();  // parallel_for returns when all of it is done
    AttentionDriver<T, Sequences<T>>(sequences).run();
  });
}

}  // namespace mllama::MLLAMA_ISA
