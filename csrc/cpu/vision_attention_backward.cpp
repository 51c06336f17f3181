// Gradients of vision_attention; see attention/attention_backward.cpp. An image's keys are two
// segments, gathered: real tokens, which all queries see, and padding, which real queries see.
#include "../vision_attention.h"
#include "attention/attention_backward_driver.h"
#include "common/dtypes.h"
#include "ops.h"

namespace mllama::MLLAMA_ISA {
namespace {

using Params = VisionAttentionBackwardParams;

template <typename T>
class Gradients : public GradientRows<T> {
  using S = Scalar<T>;

 public:
  Gradients(const Params& p, Scratch& scratch)
      : p_(p),
        order_(scratch.take<int32_t>(p.batch * p.seqlen)),
        real_(scratch.take<bool>(p.batch * p.seqlen)),
        count_(scratch.take<int64_t>(p.batch)) {
    for (int64_t b = 0; b < p.batch; ++b) {
      int32_t* order = order_ + b * p.seqlen;
      for (int padding = 0; padding < 2; ++padding) {
        for (int64_t t = 0; t < p.seqlen; ++t) {
          if (is_padding(b, t) == padding) *order++ = (int32_t)t;
        }
        if (!padding) count_[b] = order - (order_ + b * p.seqlen);
      }
      for (int64_t t = 0; t < p.seqlen; ++t) real_[b * p.seqlen + t] = !is_padding(b, t);
    }
  }

  // For GradientDriver: an image has two sets of keys.
  int64_t batch() const { return p_.batch; }
  int64_t kv_heads() const { return p_.num_heads; }
  int64_t group() const { return 1; }
  int64_t head_dim() const { return p_.head_dim; }
  int64_t tokens(int64_t) const { return p_.seqlen; }
  int64_t sets() const { return 2 * p_.batch; }
  int64_t keys(int64_t set) const {
    return set % 2 == 0 ? count_[set / 2] : p_.seqlen - count_[set / 2];
  }
  int64_t users(int64_t) const { return 1; }
  KeyUser user(int64_t set, int64_t) const { return {set / 2, set % 2}; }
  int64_t set(KeyUser user) const { return 2 * user.sequence + user.segment; }
  int64_t segments() const { return 2; }
  bool shares_sets() const { return false; }

  GradientTask<T> make_task(int64_t b, int64_t h, int64_t first, int64_t last,
                            Scratch& scratch) const {
    const auto start = [&](const void* base, int64_t batch_stride, int64_t head_stride) {
      return static_cast<const T*>(base) + b * batch_stride + h * head_stride;
    };
    Segment* segments = scratch.take<Segment>(last - first);
    for (int64_t i = first; i < last; ++i) {
      const auto gathered = [&](const T* base, int64_t token_stride) {
        const int64_t bytes = token_stride * (int64_t)sizeof(T);
        return KeyRows{reinterpret_cast<const char*>(base), 0, tokens_of(2 * b + i), 1, bytes};
      };
      segments[i - first] = {
          gathered(start(p_.k, p_.k_batch_stride, p_.k_head_stride), p_.k_token_stride),
          gathered(start(p_.v, p_.v_batch_stride, p_.v_head_stride), p_.v_token_stride),
          keys(2 * b + i), i == 0 ? nullptr : real_ + b * p_.seqlen};
    }
    GradientTask<T> task = {};
    task.rows = this;
    task.sequence = b;
    task.head = h;
    task.grad_out = start(p_.grad_out, p_.grad_out_batch_stride, p_.grad_out_head_stride);
    task.grad_out_token_stride = p_.grad_out_token_stride;
    task.grad_out_head_stride = p_.grad_out_head_stride;
    task.out = static_cast<const T*>(p_.out) + offset(b, 0, h);
    task.out_token_stride = p_.num_heads * p_.head_dim;
    task.lse = static_cast<const S*>(p_.lse) + (b * p_.num_heads + h) * p_.seqlen;
    task.last_token = p_.seqlen;
    task.group = 1;
    task.head_dim = p_.head_dim;
    task.segments = segments;
    task.num_segments = last - first;
    task.visible_stride = 1;
    task.softmax_scale = p_.softmax_scale;
    return task;
  }

  void load_rows(int64_t b, int64_t h, int64_t first, int64_t tokens, T* q) const override {
    for (int64_t t = first; t < first + tokens; ++t, q += p_.head_dim) {
      memcpy(q,
             static_cast<const T*>(p_.q) + b * p_.q_batch_stride + t * p_.q_token_stride +
                 h * p_.q_head_stride,
             p_.head_dim * sizeof(T));
    }
  }

  void store_rows(int64_t b, int64_t h, int64_t first, int64_t tokens,
                  const S* grad) const override {
    for (int64_t t = first; t < first + tokens; ++t, grad += p_.head_dim) {
      store_row(grad, (S)p_.softmax_scale, p_.head_dim,
                static_cast<T*>(p_.grad_q) + offset(b, t, h));
    }
  }

  void store_keys(int64_t set, int64_t h, int64_t first, int64_t n, const S* grad_k,
                  const S* grad_v) const {
    const int64_t stride = padded_dim(p_.head_dim);
    for (int64_t j = 0; j < n; ++j) {
      const int64_t place = offset(set / 2, tokens_of(set)[first + j], h);
      store_row(grad_k + j * stride, (S)p_.softmax_scale, p_.head_dim,
                static_cast<T*>(p_.grad_k) + place);
      store_row(grad_v + j * stride, (S)1, p_.head_dim, static_cast<T*>(p_.grad_v) + place);
    }
  }

 private:
  bool is_padding(int64_t b, int64_t t) const {
    return p_.padding && p_.padding[b * p_.padding_batch_stride + t];
  }
  const int32_t* tokens_of(int64_t set) const {
    return order_ + set / 2 * p_.seqlen + (set % 2 == 0 ? 0 : count_[set / 2]);
  }
  // Of a token's head in the output and the gradients.
  int64_t offset(int64_t b, int64_t t, int64_t h) const {
    return ((b * p_.seqlen + t) * p_.num_heads + h) * p_.head_dim;
  }

  const Params& p_;
  int32_t* order_;  // of each image: its real tokens, then its padding
  bool* real_;
  int64_t* count_;  // of each image's real tokens
};

}  // namespace

void vision_attention_backward(const Params& p) {
  with_dtype(p.dtype, [&]<typename T>(Type<T>) {
    Scratch scratch;
    const Gradients<T> gradients(p, scratch);
    GradientDriver<T, Gradients<T>>(gradients).run();
  });
}

}  // namespace mllama::MLLAMA_ISA
