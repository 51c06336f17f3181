// Gradients of blocked attention in the manner of FlashAttention-2 (Dao 2023, arXiv 2307.08691),
// rows outside and keys inside; see attention_backward.h.
//
// Tiling     kGradientRows rows meet kGradientKeys keys at a time. Keys and values are laid out
//            once for the whole task, a block of rows once for all keys it sees. Scores are
//            computed transposed, keys by rows: the products for grad_k and grad_v take them as
//            they come, and the one for grad_q, whose transpose is summed, takes them packed.
// Mask       Rows that do not see a segment are left out of it: hidden pairs cost nothing, and
//            nothing hidden is multiplied. Causal blocks end at the last key that a row of theirs
//            sees.
// Precision  Scores, weights and sums in float32 (float64 for float64). Where the processor
//            multiplies bfloat16, P and dS are rounded to it before their products.
#include "attention_backward.h"

#include "../../common.h"
#include "../common/gemm_amx.h"
#include "../common/gemm_dot.h"
#include "../common/gemm_fma.h"
#include "../common/machine.h"

namespace mllama::MLLAMA_ISA {
namespace {

constexpr int64_t kStep = 2 * kLanes;  // rows whose weights are computed at a time
static_assert(kGradientKeys % 32 == 0, "a block of keys is whole tiles");

template <typename T, typename Gemm>
class GradientRunner {
  using S = typename Gemm::Accumulator;
  using E = typename Gemm::Element;
  static constexpr bool kInPlace = sizeof(E) == sizeof(S);  // weights take the place of scores

 public:
  GradientRunner(const GradientTask<T>& task, Scratch& scratch)
      : task_(task),
        group_(task.group),
        dim_(task.head_dim),
        depth_(Gemm::padded_depth(dim_)),
        width_(padded_dim(dim_)),
        height_(round_up<int64_t>(dim_, Gemm::kRowsPerStep)),
        block_tokens_(gradient_tokens(group_)),
        stride_(round_up<int64_t>(block_tokens_ * group_, max<int64_t>(kStep, 32))),
        factor_((S)(task.softmax_scale * 1.4426950408889634074)) {
    int64_t keys = 0;
    for (int64_t s = 0; s < task.num_segments; ++s) keys += padded_keys(task.segments[s].keys);
    keys_ = scratch.take<E>(keys * depth_);
    values_ = scratch.take<E>(keys * depth_);
    keys_across_ = scratch.take<E>(task.with_rows ? keys * height_ : 0);
    q_ = scratch.take<T>(stride_ * dim_);
    reference_ = scratch.take<S>(stride_);
    rest_ = scratch.take<S>(stride_);
    delta_ = scratch.take<S>(stride_);
    picked_ = scratch.take<int32_t>(block_tokens_);
    seeing_ = scratch.take<int32_t>(block_tokens_);
    q_across_ = scratch.take<E>(Gemm::packed_elements(depth_, stride_));
    grad_across_ = scratch.take<E>(Gemm::packed_elements(depth_, stride_));
    q_packed_ = scratch.take<E>(Gemm::packed_elements(stride_, dim_));
    grad_packed_ = scratch.take<E>(Gemm::packed_elements(stride_, dim_));
    scores_ = scratch.take<S>(kGradientKeys * stride_);
    products_ = scratch.take<S>(kGradientKeys * stride_);
    weights_ = kInPlace ? reinterpret_cast<E*>(scores_) : scratch.take<E>(kGradientKeys * stride_);
    changes_ =
        kInPlace ? reinterpret_cast<E*>(products_) : scratch.take<E>(kGradientKeys * stride_);
    changes_packed_ = scratch.take<E>(Gemm::packed_elements(kGradientKeys, stride_));
    sums_ = scratch.take<S>(height_ * stride_);
    grad_q_ = scratch.take<S>(stride_ * dim_);
  }

  void run() {
    [[maybe_unused]] const typename Gemm::Session session;
    int64_t position = 0;
    for (int64_t s = 0; s < task_.num_segments; ++s) {
      load_keys(task_.segments[s], position);
      position += padded_keys(task_.segments[s].keys);
    }
    for (int64_t first = task_.first_token; first < task_.last_token; first += block_tokens_) {
      block_of_rows(first, min(block_tokens_, task_.last_token - first));
    }
  }

 private:
  // Keys that a token before `last_token` sees.
  int64_t visible_keys(const Segment& segment, int64_t last_token) const {
    return task_.causal ? max<int64_t>(0, min(segment.keys, last_token - task_.first_key))
                        : segment.keys;
  }

  // Keys and values as left operands, and keys transposed block by block, each with zeros behind
  // its end.
  void load_keys(const Segment& segment, int64_t position) {
    const int64_t n = visible_keys(segment, task_.last_token);
    for (int64_t j = 0; j < n; ++j) {
      const T* key = reinterpret_cast<const T*>(segment.k.row(j));
      const T* value = reinterpret_cast<const T*>(segment.v.row(j));
      Gemm::template load_row<T>(key, dim_, 1, keys_ + (position + j) * depth_);
      Gemm::template load_row<T>(value, dim_, 1, values_ + (position + j) * depth_);
    }
    const int64_t end = padded_keys(n);
    memset(keys_ + (position + n) * depth_, 0, (end - n) * depth_ * sizeof(E));
    memset(values_ + (position + n) * depth_, 0, (end - n) * depth_ * sizeof(E));
    if (!task_.with_rows) return;
    for (int64_t begin = position; begin < position + end; begin += kGradientKeys) {
      E* across = keys_across_ + begin * height_;
      for (int64_t j = 0; j < kGradientKeys; ++j) {
        const E* key = keys_ + (begin + j) * depth_;
        for (int64_t d = 0; d < dim_; ++d) across[d * kGradientKeys + j] = key[d];
      }
      memset(across + dim_ * kGradientKeys, 0, (height_ - dim_) * kGradientKeys * sizeof(E));
    }
  }

  void block_of_rows(int64_t first, int64_t tokens) {
    first_ = first;
    tokens_ = tokens;
    count_ = 0;
    task_.rows->load_rows(task_.sequence, task_.head, first, tokens, q_);
    memset(grad_q_, 0, tokens * group_ * dim_ * sizeof(S));
    int64_t position = 0;
    for (int64_t s = 0; s < task_.num_segments; ++s) {
      const Segment& segment = task_.segments[s];
      const int64_t keys = visible_keys(segment, first + tokens);
      if (keys > 0 && pick_rows(segment)) {
        for (int64_t begin = 0; begin < keys; begin += kGradientKeys) {
          meet(position + begin, begin, min(kGradientKeys, keys - begin));
        }
      }
      position += padded_keys(segment.keys);
    }
    if (!task_.with_rows) return;
    scatter_sums();
    task_.rows->store_rows(task_.sequence, task_.head, first, tokens, grad_q_);
  }

  // Packs the rows of the block that see the segment, unless they are packed already; false if
  // there are none.
  bool pick_rows(const Segment& segment) {
    int64_t count = 0;
    for (int64_t t = 0; t < tokens_; ++t) {
      const bool* visible = segment.visible;
      if (!visible || visible[(first_ + t) * task_.visible_stride]) seeing_[count++] = (int32_t)t;
    }
    if (count == 0) return false;
    if (count == count_ && memcmp(seeing_, picked_, count * sizeof(int32_t)) == 0) return true;
    scatter_sums();
    memcpy(picked_, seeing_, count * sizeof(int32_t));
    count_ = count;
    pack_rows();
    return true;
  }

  void pack_rows() {
    rows_ = count_ * group_;
    const auto q = [&](int64_t r) {
      return reinterpret_cast<const char*>(q_ + (picked_[r / group_] * group_ + r % group_) * dim_);
    };
    const auto grad = [&](int64_t r) {
      return reinterpret_cast<const char*>(
          task_.grad_out + (first_ + picked_[r / group_]) * task_.grad_out_token_stride +
          r % group_ * task_.grad_out_head_stride);
    };
    Gemm::template pack_transposed<T>(q, rows_, dim_, q_across_);
    Gemm::template pack_transposed<T>(grad, rows_, dim_, grad_across_);
    if (task_.grad_k) {
      Gemm::template pack<T>(q, rows_, dim_, q_packed_);
      Gemm::template pack<T>(grad, rows_, dim_, grad_packed_);
    }
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t token = first_ + picked_[r / group_], g = r % group_;
      const T* gradient = reinterpret_cast<const T*>(grad(r));
      const T* out = task_.out + token * task_.out_token_stride + g * dim_;
      Vec<S> sum = {};
      for_vectors(dim_, [&](int64_t d, auto part) {
        sum += load(gradient + d, part) * load(out + d, part);
      });
      delta_[r] = sum_lanes(sum);
      const double reference = task_.lse[g * task_.lse_head_stride + token] / task_.softmax_scale;
      reference_[r] = (S)reference;
      rest_[r] = (S)((reference - (double)reference_[r]) * (double)factor_);
    }
    memset(sums_, 0, height_ * stride_ * sizeof(S));
  }

  // The packed rows and n keys of a segment from `begin` on, which lie at `position`.
  void meet(int64_t position, int64_t begin, int64_t n) {
    const int64_t keys = round_up<int64_t>(n, Gemm::kRowsPerStep);
    const typename Gemm::Packed q_across = {q_across_, depth_, rows_},
                                grad_across = {grad_across_, depth_, rows_};
    Gemm::multiply(keys_ + position * depth_, depth_, q_across, keys, rows_, depth_, scores_,
                   stride_, false);
    Gemm::multiply(values_ + position * depth_, depth_, grad_across, keys, rows_, depth_, products_,
                   stride_, false);
    for (int64_t j = 0; j < keys; ++j) differentiate(j, hidden_rows(begin + j, j < n));
    if (task_.grad_k) {
      const typename Gemm::Packed q = {q_packed_, rows_, dim_}, grad = {grad_packed_, rows_, dim_};
      const int64_t depth = Gemm::padded_depth(rows_);
      Gemm::multiply(changes_, stride_, q, keys, dim_, depth, task_.grad_k + position * width_,
                     width_, true);
      Gemm::multiply(weights_, stride_, grad, keys, dim_, depth, task_.grad_v + position * width_,
                     width_, true);
    }
    if (task_.with_rows) {
      const auto row = [&](int64_t j) {
        return reinterpret_cast<const char*>(changes_ + j * stride_);
      };
      Gemm::template pack<E>(row, n, rows_, changes_packed_);
      const typename Gemm::Packed changes = {changes_packed_, n, rows_};
      Gemm::multiply(keys_across_ + position * height_, kGradientKeys, changes, height_, rows_,
                     Gemm::padded_depth(n), sums_, stride_, true);
    }
  }

  // Packed rows, the first ones, that do not see key j of the segment.
  int64_t hidden_rows(int64_t j, bool exists) const {
    if (!exists) return rows_;
    if (!task_.causal) return 0;
    return min(rows_, max<int64_t>(0, task_.first_key + j - first_) * group_);
  }

  // Key j of the block: scores to P, and products of grad_out with its value to dS.
  void differentiate(int64_t j, int64_t hidden) {
    const S *scores = scores_ + j * stride_, *products = products_ + j * stride_;
    E *weights = weights_ + j * stride_, *changes = changes_ + j * stride_;
    const int64_t begin = hidden / kStep * kStep, end = round_up(rows_, kStep);
    for (int64_t r = begin; r < end; r += kStep) {
      const Vec<S> low = weight(load(scores + r), r);
      const Vec<S> high = weight(load(scores + r + kLanes), r + kLanes);
      const Vec<S> low_change = low * (load(products + r) - load(delta_ + r));
      const Vec<S> high_change = high * (load(products + r + kLanes) - load(delta_ + r + kLanes));
      Gemm::store_weights(weights + r, low, high);
      Gemm::store_weights(changes + r, low_change, high_change);
    }
    clear_hidden(weights, hidden, end);
    clear_hidden(changes, hidden, end);
  }

  // P from scores of packed rows r, r + 1, ... with one key.
  Vec<S> weight(Vec<S> scores, int64_t r) const {
    return Gemm::exp2((scores - load(reference_ + r)) * factor_ - load(rest_ + r));
  }

  // The first elements of a row, which belong to hidden rows, and those behind the last.
  void clear_hidden(E* row, int64_t hidden, int64_t end) const {
    memset(row, 0, hidden * sizeof(E));
    memset(row + rows_, 0, (end - rows_) * sizeof(E));
  }

  // Adds what the packed rows have summed up to their places.
  void scatter_sums() {
    if (count_ == 0 || !task_.with_rows) return;
    for (int64_t r = 0; r < rows_; ++r) {
      S* grad = grad_q_ + (picked_[r / group_] * group_ + r % group_) * dim_;
      for (int64_t d = 0; d < dim_; ++d) grad[d] += sums_[d * stride_ + r];
    }
  }

  const GradientTask<T>& task_;
  const int64_t group_, dim_, depth_, width_, height_, block_tokens_, stride_;
  const S factor_;
  E *keys_, *values_, *keys_across_;
  T* q_;
  // lse / softmax_scale, and what its rounding lost, times factor_: large weights, whose scores are
  // near it, keep their last digits.
  S *reference_, *rest_;
  S* delta_;
  int32_t *picked_, *seeing_;  // tokens of the block: those packed, those that see a segment
  E *q_across_, *grad_across_, *q_packed_, *grad_packed_;
  S *scores_, *products_;
  E *weights_, *changes_, *changes_packed_;
  S *sums_, *grad_q_;
  int64_t first_ = 0, tokens_ = 0, count_ = 0, rows_ = 0;
};

}  // namespace

template <typename T>
void add_gradients(const GradientTask<T>& task, Scratch& scratch) {
  const Scratch::Mark mark(scratch);
#ifdef __AVX512BF16__
  if constexpr (__is_same(T, BF16)) {
    if (amx_available()) return GradientRunner<T, AmxGemm>(task, scratch).run();
    return GradientRunner<T, DotGemm>(task, scratch).run();
  }
#endif
  GradientRunner<T, FmaGemm<Scalar<T>>>(task, scratch).run();
}

template void add_gradients<float>(const GradientTask<float>&, Scratch&);
template void add_gradients<F16>(const GradientTask<F16>&, Scratch&);
template void add_gradients<BF16>(const GradientTask<BF16>&, Scratch&);
template void add_gradients<double>(const GradientTask<double>&, Scratch&);

}  // namespace mllama::MLLAMA_ISA
