// Blocked attention with online softmax (Milakov, Gimelshein 2018, arXiv 1805.02867), with the
// order of loops of FlashAttention-2 (Dao 2023, arXiv 2307.08691) inside a task.
//
// Tiling     A task of up to kTaskRows rows walks its keys in blocks of kBlockKeys, packed once per
//            task for the matrix products; rows go through in sub-blocks of kSubRows, whose scores
//            stay in cache.
// Mask       One visible prefix per (row, block); padding keys one by one, for padding queries
//            alone. A block that no row of a sub-block sees is skipped; if no row at all sees it,
//            it is not read.
// Empty      A row that sees nothing keeps sum 0 and stores 0; exp2(-inf - -inf) is never formed.
// Precision  Scores, softmax and sums in float32 (float64 for float64). Where the processor
//            multiplies bfloat16, weights are rounded to it before the product with v.
#include "attention.h"

#include "../../common.h"
#include "../common/gemm_amx.h"
#include "../common/gemm_dot.h"
#include "../common/gemm_fma.h"
#include "../common/machine.h"

namespace mllama::MLLAMA_ISA {
namespace {

constexpr int64_t kBlockKeys = 384;
constexpr int64_t kSubRows = 32;
constexpr int64_t kAhead = 12;  // rows of keys and values that are fetched before they are packed
constexpr int64_t kStep = 2 * kLanes;  // keys that the softmax takes at a time
static_assert(kBlockKeys % kStep == 0 && kBlockKeys % 32 == 0,
              "a block is whole vectors and whole tiles");

template <typename T, typename Gemm>
class TaskRunner {
  using S = typename Gemm::Accumulator;
  using E = typename Gemm::Element;

 public:
  TaskRunner(const AttentionTask& task, Scratch& scratch)
      : task_(task),
        rows_((task.tokens * task.group + kSubRows - 1) / kSubRows * kSubRows),
        depth_(Gemm::padded_depth(task.head_dim)),
        width_(Gemm::padded_columns(task.head_dim)),
        q_(scratch.take<E>(rows_ * depth_)),
        keys_(scratch.take<E>(Gemm::packed_elements(depth_, kBlockKeys))),
        values_(scratch.take<E>(Gemm::packed_elements(kBlockKeys, width_))),
        scores_(scratch.take<S>(kSubRows * kBlockKeys)),
        weights_(sizeof(E) == sizeof(S) ? reinterpret_cast<E*>(scores_)  // in place
                                        : scratch.take<E>(kSubRows * kBlockKeys)),
        out_(scratch.take<S>(rows_ * width_)),
        maximum_(scratch.take<S>(rows_)),
        sum_(scratch.take<S>(rows_)),
        limit_(scratch.take<int32_t>(rows_)),
        hidden_(scratch.take<S>(kSubRows * width_)) {}

  void run() {
    [[maybe_unused]] const typename Gemm::Session session;
    load_queries();
    for (int64_t s = 0; s < task_.num_segments; ++s) {
      const Segment& segment = task_.segments[s];
      int64_t keys = segment.keys;
      if (task_.causal) keys = min(keys, task_.past + task_.tokens);
      for (int64_t begin = 0; begin < keys; begin += kBlockKeys) {
        block(segment, begin, min(kBlockKeys, keys - begin));
      }
    }
    store_outputs();
  }

 private:
  int64_t num_rows() const { return task_.tokens * task_.group; }

  void load_queries() {
    // exp2 wants a positive factor; the sign of the scale goes into q, where it is exact.
    const double scale = task_.softmax_scale;
    const S sign = scale > 0 ? 1 : scale < 0 ? -1 : 0;
    factor_ = scale == 0 ? (S)1 : (S)((scale < 0 ? -scale : scale) * 1.4426950408889634074);
    const T* q = static_cast<const T*>(task_.q);
    for (int64_t r = 0; r < rows_; ++r) {
      E* row = q_ + r * depth_;
      memset(row, 0, depth_ * sizeof(E));
      if (r < num_rows())
        Gemm::template load_row<T>(q + r * task_.head_dim, task_.head_dim, sign, row);
      maximum_[r] = -__builtin_inf();
      sum_[r] = 0;
    }
    memset(out_, 0, rows_ * width_ * sizeof(S));
  }

  // Fills limit_ with the keys of the block that each row sees (a prefix); false if no row sees
  // any.
  bool find_limits(const Segment& segment, int64_t begin, int64_t n) {
    bool all_padding = task_.query_padding != nullptr;
    for (int64_t j = 0; j < n && all_padding; ++j) all_padding = task_.key_padding[begin + j];
    bool any = false;
    for (int64_t token = 0; token < task_.tokens; ++token) {
      int64_t limit = n;
      if (task_.causal) limit = max<int64_t>(0, min(n, task_.past + token + 1 - begin));
      if (segment.visible && !segment.visible[token * task_.visible_stride]) limit = 0;
      if (all_padding && task_.query_padding[token]) limit = 0;
      any |= limit > 0;
      for (int64_t g = 0; g < task_.group; ++g) limit_[token * task_.group + g] = (int32_t)limit;
    }
    for (int64_t r = num_rows(); r < rows_; ++r) limit_[r] = 0;
    return any;
  }

  void block(const Segment& segment, int64_t begin, int64_t n) {
    if (!find_limits(segment, begin, n)) return;
    // Rows lie a stride apart, which the hardware's own prefetching does not follow.
    const auto reader = [=, this](const KeyRows& rows) {
      return [=, this](int64_t j) {
        prefetch(rows.row(begin + min(j + kAhead, n - 1)), task_.head_dim * (int64_t)sizeof(T));
        return rows.row(begin + j);
      };
    };
    Gemm::template pack_transposed<T>(reader(segment.k), n, task_.head_dim, keys_);
    Gemm::template pack<T>(reader(segment.v), n, task_.head_dim, values_);
    for (int64_t first = 0; first < rows_; first += kSubRows) {
      int64_t longest = 0;
      for (int64_t r = 0; r < kSubRows; ++r) longest = max<int64_t>(longest, limit_[first + r]);
      if (longest > 0) sub_block(first, begin, longest, n);
    }
  }

  // The first n keys of a block of block_keys, for kSubRows rows.
  void sub_block(int64_t first, int64_t begin, int64_t n, int64_t block_keys) {
    constexpr int64_t stride = kBlockKeys;
    const typename Gemm::Packed keys = {keys_, depth_, block_keys},
                                values = {values_, block_keys, width_};
    Gemm::multiply(q_ + first * depth_, depth_, keys, kSubRows, n, depth_, scores_, stride, false);
    for (int64_t r = 0; r < kSubRows; ++r) {
      S* out = out_ + (first + r) * width_;
      if (limit_[first + r] > 0) {
        softmax(scores_ + r * stride, weights_ + r * stride, first + r, begin, n, out);
      } else {
        // Zero weights would still let a NaN of a hidden value through the product: undone below.
        memset(weights_ + r * stride, 0, round_up(n, kStep) * sizeof(E));
        memcpy(hidden_ + r * width_, out, width_ * sizeof(S));
      }
    }
    Gemm::multiply(weights_, stride, values, kSubRows, width_, Gemm::padded_depth(n),
                   out_ + first * width_, width_, true);
    for (int64_t r = 0; r < kSubRows; ++r) {
      if (limit_[first + r] == 0)
        memcpy(out_ + (first + r) * width_, hidden_ + r * width_, width_ * sizeof(S));
    }
  }

  // One row: scores to weights, with the row's maximum, sum and output brought up to date.
  void softmax(S* scores, E* weights, int64_t r, int64_t begin, int64_t n, S* out) {
    const int64_t limit = limit_[r], end = round_up(n, kStep);
    for (int64_t j = limit; j < end; ++j) scores[j] = -__builtin_inf();
    if (task_.query_padding && task_.query_padding[r / task_.group]) {
      for (int64_t j = 0; j < limit; ++j) {
        if (task_.key_padding[begin + j]) scores[j] = -__builtin_inf();
      }
    }
    Vec<S> largest[2] = {load(scores), load(scores + kLanes)};
    for (int64_t j = kStep; j < end; j += kStep) {
      largest[0] = max_vec(largest[0], load(scores + j));
      largest[1] = max_vec(largest[1], load(scores + j + kLanes));
    }
    const S maximum = max(maximum_[r], max_lanes(max_vec(largest[0], largest[1])));
    if (maximum == -__builtin_inf()) {
      memset(weights, 0, end * sizeof(E));
      return;
    }
    Vec<S> sums[2] = {};
    for (int64_t j = 0; j < end; j += kStep) {
      const Vec<S> low = Gemm::exp2((load(scores + j) - maximum) * factor_);
      const Vec<S> high = Gemm::exp2((load(scores + j + kLanes) - maximum) * factor_);
      Gemm::store_weights(weights + j, low, high);
      sums[0] += low;
      sums[1] += high;
    }
    if (maximum != maximum_[r]) {
      const S decay = exp2(splat((maximum_[r] - maximum) * factor_))[0];
      sum_[r] *= decay;
      for (int64_t d = 0; d < width_; d += kLanes) store(out + d, load(out + d) * decay);
      maximum_[r] = maximum;
    }
    sum_[r] += sum_lanes(sums[0] + sums[1]);
  }

  void store_outputs() {
    for (int64_t r = 0; r < num_rows(); ++r) {
      T* out = static_cast<T*>(task_.out) + r / task_.group * task_.out_token_stride +
               r % task_.group * task_.head_dim;
      const S* row = out_ + r * width_;
      const S inverse = sum_[r] == 0 ? (S)0 : 1 / sum_[r];
      for_vectors(task_.head_dim, [&](int64_t d, auto part) {
        store(out + d, load(row + d, part) * inverse, part);
      });
      if (task_.lse) {
        const double scale = task_.softmax_scale < 0 ? -task_.softmax_scale : task_.softmax_scale;
        store_lse<S>(task_, r, maximum_[r] * scale, sum_[r]);
      }
    }
  }

  const AttentionTask& task_;
  const int64_t rows_, depth_, width_;
  E *q_, *keys_, *values_;
  S* scores_;
  E* weights_;
  S *out_, *maximum_, *sum_;
  int32_t* limit_;
  S* hidden_;
  S factor_;
};

}  // namespace

template <typename T>
void attend(const AttentionTask& task, Scratch& scratch) {
  const Scratch::Mark mark(scratch);
#ifdef __AVX512BF16__
  if constexpr (__is_same(T, BF16)) {
    if (amx_available()) return TaskRunner<T, AmxGemm>(task, scratch).run();
    return TaskRunner<T, DotGemm>(task, scratch).run();
  }
#endif
  TaskRunner<T, FmaGemm<Scalar<T>>>(task, scratch).run();
}

template void attend<float>(const AttentionTask&, Scratch&);
template void attend<F16>(const AttentionTask&, Scratch&);
template void attend<BF16>(const AttentionTask&, Scratch&);
template void attend<double>(const AttentionTask&, Scratch&);

}  // namespace mllama::MLLAMA_ISA
