// Blocked attention with online softmax.     Milakov, Gimelshein 2018 (arXiv 1805.02867), FlashAttention-2
//                                            order of loops inside a task (arXiv 2307.08691)
// Tiling     a task of up to kTaskRows rows walks its keys in blocks of kBlockKeys, packed once per task for
//            the matrix products; rows go through in sub-blocks of kSubRows, whose scores stay in cache.
// Mask       one visible prefix per (row, block); padding keys one by one, for padding queries alone.
//            A block that no row of a sub-block sees is skipped; if no row at all sees it, it is not read.
// Empty      a row that sees nothing keeps sum 0 and stores 0; exp2(-inf - -inf) is never formed.
// Precision  scores, softmax and sums in float32 (float64 for float64).
#include "attention.h"

#include "gemm_fma.h"

namespace mllama::MLLAMA_ISA {
namespace {

constexpr int64_t kBlockKeys = 384;
constexpr int64_t kSubRows = 32;

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
        out_(scratch.take<S>(rows_ * width_)),
        maximum_(scratch.take<S>(rows_)),
        sum_(scratch.take<S>(rows_)),
        limit_(scratch.take<int32_t>(rows_)),
        hidden_(scratch.take<S>(kSubRows * width_)) {}

  void run() {
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
      if (r < num_rows()) Gemm::template load_row<T>(q + r * task_.head_dim, task_.head_dim, sign, row);
      maximum_[r] = -__builtin_inf();
      sum_[r] = 0;
    }
    memset(out_, 0, rows_ * width_ * sizeof(S));
  }

  // Fills limit_ with the keys of the block that each row sees (a prefix); false if no row sees any.
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
    const auto key = [&](int64_t j) { return segment.k.row(begin + j); };
    const auto value = [&](int64_t j) { return segment.v.row(begin + j); };
    Gemm::template pack_transposed<T>(key, n, task_.head_dim, keys_);
    Gemm::template pack<T>(value, n, task_.head_dim, values_);
    for (int64_t first = 0; first < rows_; first += kSubRows) {
      bool any = false;
      for (int64_t r = 0; r < kSubRows; ++r) any |= limit_[first + r] > 0;
      if (any) sub_block(first, begin, n);
    }
  }

  void sub_block(int64_t first, int64_t begin, int64_t n) {
    constexpr int64_t stride = kBlockKeys;
    Gemm::multiply(q_ + first * depth_, depth_, keys_, kSubRows, n, depth_, scores_, stride, false);
    for (int64_t r = 0; r < kSubRows; ++r) {
      S* row = scores_ + r * stride;
      S* out = out_ + (first + r) * width_;
      if (limit_[first + r] > 0) {
        softmax(row, first + r, begin, n, out);
      } else {
        // Zero probabilities would still let a NaN of a hidden value through the product: undone below.
        memset(row, 0, n * sizeof(S));
        memcpy(hidden_ + r * width_, out, width_ * sizeof(S));
      }
    }
    Gemm::multiply(scores_, stride, values_, kSubRows, width_, n, out_ + first * width_, width_, true);
    for (int64_t r = 0; r < kSubRows; ++r) {
      if (limit_[first + r] == 0) memcpy(out_ + (first + r) * width_, hidden_ + r * width_, width_ * sizeof(S));
    }
  }

  void softmax(S* scores, int64_t r, int64_t begin, int64_t n, S* out) {
    const int64_t limit = limit_[r], end = Gemm::padded_columns(n);
    for (int64_t j = limit; j < end; ++j) scores[j] = -__builtin_inf();
    if (task_.query_padding && task_.query_padding[r / task_.group]) {
      for (int64_t j = 0; j < limit; ++j) {
        if (task_.key_padding[begin + j]) scores[j] = -__builtin_inf();
      }
    }
    Vec<S> largest = load(scores);
    for (int64_t j = kLanes; j < end; j += kLanes) largest = max_vec(largest, load(scores + j));
    const S maximum = max(maximum_[r], max_lanes(largest));
    if (maximum == -__builtin_inf()) {
      memset(scores, 0, n * sizeof(S));
      return;
    }
    Vec<S> sums = {};
    for (int64_t j = 0; j < end; j += kLanes) {
      const Vec<S> weight = exp2((load(scores + j) - maximum) * factor_);
      store(scores + j, weight);
      sums += weight;
    }
    if (maximum != maximum_[r]) {
      const S decay = exp2(splat((maximum_[r] - maximum) * factor_))[0];
      sum_[r] *= decay;
      for (int64_t d = 0; d < width_; d += kLanes) store(out + d, load(out + d) * decay);
      maximum_[r] = maximum;
    }
    sum_[r] += sum_lanes(sums);
  }

  void store_outputs() {
    for (int64_t r = 0; r < num_rows(); ++r) {
      T* out = static_cast<T*>(task_.out) + r / task_.group * task_.out_token_stride +
               r % task_.group * task_.head_dim;
      const S* row = out_ + r * width_;
      const S inverse = sum_[r] == 0 ? (S)0 : 1 / sum_[r];
      for_vectors(task_.head_dim, [&](int64_t d, auto part) { store(out + d, load(row + d, part) * inverse, part); });
    }
  }

  const AttentionTask& task_;
  const int64_t rows_, depth_, width_;
  E *q_, *keys_, *values_;
  S *scores_, *out_, *maximum_, *sum_;
  int32_t* limit_;
  S* hidden_;
  S factor_;
};

}  // namespace

template <typename T>
void attend(const AttentionTask& task, Scratch& scratch) {
  const Scratch::Mark mark(scratch);
  TaskRunner<T, FmaGemm<Scalar<T>>>(task, scratch).run();
}

template void attend<float>(const AttentionTask&, Scratch&);
template void attend<F16>(const AttentionTask&, Scratch&);
template void attend<BF16>(const AttentionTask&, Scratch&);
template void attend<double>(const AttentionTask&, Scratch&);

}  // namespace mllama::MLLAMA_ISA
