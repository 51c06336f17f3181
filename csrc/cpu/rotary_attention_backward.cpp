// Gradients of rotary_attention: keys are rotated first, queries on their way into a block;
// gradients are rotated back on their way out. See attention/attention_backward.cpp.
//
// Precision  the rotation back is in float32 (float64 for float64), and rounds once.
#include "../rotary_attention.h"
#include "attention/attention_backward_driver.h"
#include "attention/rotary_rows.h"
#include "attention/sequence_gradients.h"
#include "common/dtypes.h"
#include "ops.h"

namespace mllama::MLLAMA_ISA {
namespace {

using Params = RotaryAttentionBackwardParams;

template <typename T>
class Gradients : public SequenceGradients<T, RotaryRows<T, Params>> {
  using Base = SequenceGradients<T, RotaryRows<T, Params>>;
  using Base::group_;
  using Base::k_offset;
  using Base::p_;
  using Base::q_offset;
  using Base::rotate;
  using Base::row;
  using Base::start;
  using Base::unrotate;
  using S = Scalar<T>;

 public:
  using Base::Base;
  using Base::batch;
  using Base::tokens;

  void rotate_keys() const {
    this->for_tokens([&](int64_t b, int64_t t) {
      const T* k = row(p_.k, b, t, p_.k_batch_stride, p_.k_token_stride);
      for (int64_t h = 0; h < p_.num_kv_heads; ++h) {
        rotate(k + h * p_.k_head_stride, start(b) + t,
               static_cast<T*>(p_.k_cache) + k_offset(b, h) + t * k_token_stride());
      }
    });
  }

  // For GradientDriver: the keys of a sequence are a set.
  int64_t sets() const { return batch(); }
  int64_t keys(int64_t set) const { return tokens(set); }
  int64_t users(int64_t) const { return 1; }
  KeyUser user(int64_t set, int64_t) const { return {set, 0}; }
  int64_t set(KeyUser user) const { return user.sequence; }
  int64_t segments() const { return 1; }
  bool shares_sets() const { return false; }

  GradientTask<T> make_task(int64_t b, int64_t h, int64_t, int64_t, Scratch& scratch) const {
    constexpr int64_t size = sizeof(T);
    const T* k = static_cast<const T*>(p_.k_cache) + k_offset(b, h);
    const T* v = row(p_.v, b, 0, p_.v_batch_stride, p_.v_token_stride) + h * p_.v_head_stride;
    Segment* segment = scratch.take<Segment>(1);
    *segment = {{reinterpret_cast<const char*>(k), k_token_stride() * size, nullptr, 0, 0},
                {reinterpret_cast<const char*>(v), p_.v_token_stride * size, nullptr, 0, 0},
                tokens(b),
                nullptr};
    GradientTask<T> task = this->task(b, h, segment, 1);
    task.causal = true;
    return task;
  }

  void store_rows(int64_t b, int64_t h, int64_t first, int64_t tokens,
                  const S* grad) const override {
    for (int64_t t = first; t < first + tokens; ++t) {
      T* grad_q = static_cast<T*>(p_.grad_q) + q_offset(b, h, t);
      for (int64_t g = 0; g < group_; ++g, grad += p_.head_dim) {
        unrotate(grad, start(b) + t, (S)p_.softmax_scale, grad_q + g * p_.head_dim);
      }
    }
  }

  void store_keys(int64_t b, int64_t h, int64_t first, int64_t n, const S* grad_k,
                  const S* grad_v) const {
    const int64_t stride = padded_dim(p_.head_dim);
    for (int64_t t = 0; t < n; ++t) {
      const int64_t offset = k_offset(b, h) + (first + t) * k_token_stride();
      unrotate(grad_k + t * stride, start(b) + first + t, (S)p_.softmax_scale,
               static_cast<T*>(p_.grad_k) + offset);
      store_row(grad_v + t * stride, (S)1, p_.head_dim, static_cast<T*>(p_.grad_v) + offset);
    }
  }

 private:
  // Of rotated keys and of the keys' gradients.
  int64_t k_token_stride() const { return p_.num_kv_heads * p_.head_dim; }
};

}  // namespace

void rotary_attention_backward(const Params& p) {
  with_dtype(p.dtype, [&]<typename T>(Type<T>) {
    const Gradients<T> gradients(p);
    gradients.rotate_keys();  // parallel_for returns when all of it is done
    GradientDriver<T, Gradients<T>>(gradients).run();
  });
}

}  // namespace mllama::MLLAMA_ISA
