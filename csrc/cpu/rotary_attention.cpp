// rotary_attention and rotary_attention_cached: new keys are rotated and stored first, into the
// pages or into scratch, then one task per (sequence, key head, run of tokens) attends; see
// attention_driver.h. Rotation   each product and the sum are rounded to the storage type, as plain
// PyTorch rounds them. Rows past the last sequence are zero.
#include "../rotary_attention.h"

#include "attention_driver.h"
#include "dtypes.h"
#include "kernels.h"

namespace mllama::MLLAMA_ISA {
namespace {

template <typename T>
void rotate_halves(const T* x, const T* cos, const T* sin, int64_t half, T* out) {
  for_vectors(half, [&](int64_t i, auto part) {
    const Vec<T> a = load(x + i, part), b = load(x + half + i, part);
    const Vec<T> c = load(cos + i, part), s = load(sin + i, part);
    store(out + i, round_to<T>(a * c) - round_to<T>(b * s), part);
    store(out + half + i, round_to<T>(b * c) + round_to<T>(a * s), part);
  });
}

template <typename T>
void rotate_pairs(const T* x, const T* cos, const T* sin, int64_t half, T* out) {
  T split[2 * kLanes], rotated[2 * kLanes];
  for_vectors(half, [&](int64_t i, auto part) {
    const int64_t count = min<int64_t>(kLanes, half - i);
    for (int64_t j = 0; j < count; ++j) {
      split[j] = x[2 * (i + j)];
      split[kLanes + j] = x[2 * (i + j) + 1];
    }
    const Vec<T> a = load(split, part), b = load(split + kLanes, part);
    const Vec<T> c = load(cos + i, part), s = load(sin + i, part);
    store(rotated, round_to<T>(a * c) - round_to<T>(b * s));
    store(rotated + kLanes, round_to<T>(b * c) + round_to<T>(a * s));
    for (int64_t j = 0; j < count; ++j) {
      out[2 * (i + j)] = rotated[j];
      out[2 * (i + j) + 1] = rotated[kLanes + j];
    }
  });
}

template <typename T>
class Sequences {
 public:
  explicit Sequences(const RotaryAttentionParams& p) : p_(p) {}

  void append() const {
    const int64_t chunks = ceil_div(p_.max_seqlen, kAppendTokens);
    parallel_for(0, p_.batch * chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / chunks, first = i % chunks * kAppendTokens;
        const int64_t last = min(tokens(b), first + kAppendTokens);
        for (int64_t t = first; t < last; ++t) append_token(b, t);
      }
    });
  }

  // For AttentionDriver.
  int64_t batch() const { return p_.batch; }
  int64_t kv_heads() const { return p_.num_kv_heads; }
  int64_t group() const { return group_; }
  int64_t head_dim() const { return p_.head_dim; }
  int64_t tokens(int64_t b) const {
    return p_.cu_seqlens ? p_.cu_seqlens[b + 1] - start(b) : p_.max_seqlen;
  }
  int64_t max_splits(int64_t b) const { return ceil_div(past(b) + tokens(b), kSplitKeys); }

  AttentionTask make_task(int64_t b, int64_t h, int64_t first, int64_t tokens,
                          Scratch& scratch) const {
    T* q = scratch.take<T>(tokens * group_ * p_.head_dim);
    for (int64_t t = 0; t < tokens; ++t) {
      const T* x = row(p_.q, b, first + t, p_.q_batch_stride, p_.q_token_stride) +
                   h * group_ * p_.q_head_stride;
      for (int64_t g = 0; g < group_; ++g) {
        rotate(x + g * p_.q_head_stride, start(b) + first + t, q + (t * group_ + g) * p_.head_dim);
      }
    }
    Segment* keys = scratch.take<Segment>(1);
    *keys = segment(b, h);
    AttentionTask task = {};
    task.q = q;
    task.out_token_stride = p_.num_q_heads * p_.head_dim;
    task.out = static_cast<T*>(p_.out) + (start(b) + first) * task.out_token_stride +
               h * group_ * p_.head_dim;
    task.tokens = tokens;
    task.group = group_;
    task.head_dim = p_.head_dim;
    task.segments = keys;
    task.num_segments = 1;
    task.causal = true;
    task.past = past(b) + first;
    task.softmax_scale = p_.softmax_scale;
    return task;
  }

 private:
  static constexpr int64_t kAppendTokens = 16;

  int64_t start(int64_t b) const { return p_.cu_seqlens ? p_.cu_seqlens[b] : b * p_.max_seqlen; }
  int64_t past(int64_t b) const { return p_.cache_lens ? p_.cache_lens[b] : 0; }

  const T* row(const void* base, int64_t b, int64_t t, int64_t batch_stride,
               int64_t token_stride) const {
    return static_cast<const T*>(base) +
           (p_.cu_seqlens ? (start(b) + t) * token_stride : b * batch_stride + t * token_stride);
  }

  void rotate(const T* x, int64_t token, T* out) const {
    const T* cos = static_cast<const T*>(p_.cos) + token % p_.cos_rows * p_.cos_row_stride;
    const T* sin = static_cast<const T*>(p_.sin) + token % p_.cos_rows * p_.sin_row_stride;
    (p_.interleaved ? rotate_pairs<T> : rotate_halves<T>)(x, cos, sin, p_.head_dim / 2, out);
  }

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
    const T* k = static_cast<const T*>(p_.k_cache) + start(b) * stride + h * p_.head_dim;
    const T* v = row(p_.v, b, 0, p_.v_batch_stride, p_.v_token_stride) + h * p_.v_head_stride;
    return {{reinterpret_cast<const char*>(k), stride * size, nullptr, 0, 0},
            {reinterpret_cast<const char*>(v), p_.v_token_stride * size, nullptr, 0, 0},
            keys,
            nullptr};
  }

  const RotaryAttentionParams& p_;
  const int64_t group_ = p_.num_q_heads / p_.num_kv_heads;
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
