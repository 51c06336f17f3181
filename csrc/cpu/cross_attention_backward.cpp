// Gradients of cross_attention; see attention/attention_backward.cpp. A tile is a segment, and a
// slot a set of keys that may be a tile of several sequences: their parts are summed in the order
// of the table.
//
// Norm       grad_q goes back through it on its way out: with n = x / rms and g = grad * weight,
//            grad_x = (g - n * mean(g * n)) / rms. grad_q_norm_weight sums grad * round(n) over
//            each block of rows, then over the blocks in order.
// Precision  float32 (float64 for float64), blocks of weight gradients in float64.
#include "../cross_attention.h"
#include "attention/attention_backward_driver.h"
#include "attention/cross_rows.h"
#include "attention/sequence_gradients.h"
#include "common/dtypes.h"
#include "ops.h"

namespace mllama::MLLAMA_ISA {
namespace {

using Params = CrossAttentionBackwardParams;

template <typename T>
class Gradients : public SequenceGradients<T, CrossRows<T, Params>> {
  using Base = SequenceGradients<T, CrossRows<T, Params>>;
  using Base::group_;
  using Base::p_;
  using Base::q_offset;
  using Base::query;
  using Base::row;
  using Base::slot;
  using S = Scalar<T>;

 public:
  using Base::batch;
  using Base::kv_heads;
  using Base::tokens;

  Gradients(const Params& p, Scratch& scratch)
      : Base(p),
        user_begin_(scratch.take<int64_t>(p.num_slots + 1)),
        users_(scratch.take<KeyUser>(p.batch * p.tiles)),
        block_begin_(scratch.take<int64_t>(p.batch + 1)) {
    find_users();
    block_begin_[0] = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      block_begin_[b + 1] = block_begin_[b] + ceil_div(tokens(b), gradient_tokens(group_));
    }
    if (p.q_norm_weight) {
      grad_weight_ = scratch.take<S>(block_begin_[p.batch] * p.num_kv_heads * p.head_dim);
    }
  }

  // For GradientDriver: a slot is a set.
  int64_t sets() const { return p_.num_slots; }
  int64_t keys(int64_t) const { return p_.tile_tokens; }
  int64_t users(int64_t set) const { return user_begin_[set + 1] - user_begin_[set]; }
  KeyUser user(int64_t set, int64_t i) const { return users_[user_begin_[set] + i]; }
  int64_t set(KeyUser user) const { return slot(user.sequence, user.segment); }
  int64_t segments() const { return p_.tiles; }
  bool shares_sets() const {
    for (int64_t s = 0; s < sets(); ++s) {
      if (users(s) > 1) return true;
    }
    return false;
  }

  GradientTask<T> make_task(int64_t b, int64_t h, int64_t first, int64_t last,
                            Scratch& scratch) const {
    Segment* segments = scratch.take<Segment>(last - first);
    for (int64_t t = first; t < last; ++t) {
      segments[t - first] = slot(b, t) < 0 ? Segment{} : this->segment(b, h, t, 0);
    }
    GradientTask<T> task = this->task(b, h, segments, last - first);
    task.visible_stride = p_.tile_mask_row_stride;
    return task;
  }

  void store_rows(int64_t b, int64_t h, int64_t first, int64_t tokens,
                  const S* grad) const override {
    S* grad_weight = block_sums(b, h, first);
    S part[kMaxHeadDim] = {};  // of a few rows: short sums keep the rounding error small
    int64_t rows = 0;
    if (grad_weight) memset(grad_weight, 0, p_.head_dim * sizeof(S));
    for (int64_t t = first; t < first + tokens; ++t) {
      T* grad_q = static_cast<T*>(p_.grad_q) + q_offset(b, h, t);
      for (int64_t g = 0; g < group_; ++g, grad += p_.head_dim, grad_q += p_.head_dim) {
        if (grad_weight) {
          norm_gradient(query(b, h, t, g), grad, grad_q, part);
          if (++rows % kPartRows == 0) add_part(part, grad_weight);
        } else {
          store_row(grad, (S)p_.softmax_scale, p_.head_dim, grad_q);
        }
      }
    }
    if (grad_weight) add_part(part, grad_weight);
  }

  void store_keys(int64_t set, int64_t h, int64_t first, int64_t n, const S* grad_k,
                  const S* grad_v) const {
    const int64_t stride = padded_dim(p_.head_dim);
    for (int64_t j = 0; j < n; ++j) {
      const int64_t place =
          ((set * p_.tile_tokens + first + j) * p_.num_kv_heads + h) * p_.head_dim;
      store_row(grad_k + j * stride, (S)p_.softmax_scale, p_.head_dim,
                static_cast<T*>(p_.grad_k) + place);
      store_row(grad_v + j * stride, (S)1, p_.head_dim, static_cast<T*>(p_.grad_v) + place);
    }
  }

  // Slots that are no tile of any sequence.
  void clear_unused() const {
    const int64_t slot = p_.tile_tokens * p_.num_kv_heads * p_.head_dim;
    parallel_for(0, sets(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        if (users(s) > 0) continue;
        memset(static_cast<T*>(p_.grad_k) + s * slot, 0, slot * sizeof(T));
        memset(static_cast<T*>(p_.grad_v) + s * slot, 0, slot * sizeof(T));
      }
    });
  }

  // The second stage of grad_q_norm_weight.
  void sum_blocks() const {
    if (!grad_weight_) return;
    const int64_t blocks = block_begin_[batch()] * kv_heads();
    for (int64_t d = 0; d < p_.head_dim; ++d) {
      double sum = 0;
      for (int64_t i = 0; i < blocks; ++i) sum += (double)grad_weight_[i * p_.head_dim + d];
      static_cast<T*>(p_.grad_q_norm_weight)[d] = from_scalar<T>((S)sum);
    }
  }

 private:
  static constexpr int64_t kMaxHeadDim = 256, kPartRows = 16;

  void add_part(S* part, S* grad_weight) const {
    for (int64_t d = 0; d < p_.head_dim; ++d) grad_weight[d] += part[d];
    memset(part, 0, p_.head_dim * sizeof(S));
  }

  // The users of each slot, in the order of the table.
  void find_users() {
    memset(user_begin_, 0, (p_.num_slots + 1) * sizeof(int64_t));
    for_tiles([&](int64_t s, KeyUser) { ++user_begin_[s + 1]; });
    for (int64_t s = 0; s < p_.num_slots; ++s) user_begin_[s + 1] += user_begin_[s];
    for_tiles([&](int64_t s, KeyUser user) { users_[user_begin_[s]++] = user; });
    for (int64_t s = p_.num_slots; s > 0; --s) user_begin_[s] = user_begin_[s - 1];
    user_begin_[0] = 0;
  }

  template <typename F>
  void for_tiles(const F& f) const {
    for (int64_t b = 0; b < p_.batch; ++b) {
      for (int64_t t = 0; t < p_.tiles; ++t) {
        if (slot(b, t) >= 0) f(slot(b, t), KeyUser{b, t});
      }
    }
  }

  S* block_sums(int64_t b, int64_t h, int64_t first) const {
    if (!grad_weight_) return nullptr;
    const int64_t block = block_begin_[b] + first / gradient_tokens(group_);
    return grad_weight_ + (block * p_.num_kv_heads + h) * p_.head_dim;
  }

  void norm_gradient(const T* x, const S* grad, T* grad_x, S* grad_weight) const {
    const T* weight = static_cast<const T*>(p_.q_norm_weight);
    const double factor = inverse_rms(x, p_.head_dim, p_.eps);
    const S high = (S)factor, low = (S)(factor - (double)high), scale = (S)p_.softmax_scale;
    Vec<S> total = {};
    for_vectors(p_.head_dim, [&](int64_t d, auto part) {
      const Vec<S> n = load(x + d, part) * high + load(x + d, part) * low;
      const Vec<S> y_grad = load(grad + d, part) * scale;
      total += y_grad * load(weight + d, part) * n;
      store(grad_weight + d, load(grad_weight + d, part) + y_grad * round_to<T>(n), part);
    });
    const S mean = sum_lanes(total) / (S)p_.head_dim;
    for_vectors(p_.head_dim, [&](int64_t d, auto part) {
      const Vec<S> n = load(x + d, part) * high + load(x + d, part) * low;
      const Vec<S> n_grad = load(grad + d, part) * scale * load(weight + d, part);
      store(grad_x + d, (n_grad - n * mean) * high, part);
    });
  }

  int64_t* user_begin_;  // slot s has users_[user_begin_[s]] to users_[user_begin_[s + 1] - 1]
  KeyUser* users_;
  int64_t* block_begin_;      // the first block of rows of each sequence, among all
  S* grad_weight_ = nullptr;  // of each block and key head; null without a norm
};

}  // namespace

void cross_attention_backward(const Params& p) {
  with_dtype(p.dtype, [&]<typename T>(Type<T>) {
    Scratch scratch;
    const Gradients<T> gradients(p, scratch);
    gradients.clear_unused();
    GradientDriver<T, Gradients<T>>(gradients).run();
    gradients.sum_blocks();
  });
}

}  // namespace mllama::MLLAMA_ISA
