// Attention of a few rows (a decode step) over one split of the keys, for some key heads at once.
//
// Order      Runs of kRun keys, all heads of a run before the next: where the heads of a token lie
//            side by side, as in the tiles of an image, memory is read from end to end. Head after
//            head would look up every page once for each head.
// Tiling     Up to kRowStep query rows share each key and value vector that is loaded. A step of
//            the scores is kLanes dot products, added up together.
// Traffic    keys and values once: 2 * keys * head_dim elements for each key head; all else is in
//            L1 and L2.
// Precision  float32 (float64 for float64), dot products as one chain for each vector lane. Where
//            the processor multiplies bfloat16, a lane takes two neighbours at a time.
#include "attention.h"

namespace mllama::MLLAMA_ISA {
namespace {

constexpr int kRowStep = 4;
constexpr int kColumnVectors = 4;  // 4 x 4 sums of the value product stay in registers
constexpr int64_t kRun = 16;       // keys: a page of a paged cache holds a multiple of them
static_assert(kSplitKeys % kRun == 0, "splits are whole runs");

MLLAMA_INLINE int64_t segment_keys(const AttentionTask& task, int64_t segment) {
  const int64_t keys = task.segments[segment].keys;
  return task.causal ? min(keys, task.past + task.tokens) : keys;
}

MLLAMA_INLINE int64_t segment_splits(const AttentionTask& task, int64_t segment) {
  return (segment_keys(task, segment) + kSplitKeys - 1) / kSplitKeys;
}

// How a query meets a key: vectors of kStep elements of both, multiplied and added lane by lane.
template <typename T>
struct KeyDot {
  using Query = Scalar<T>;
  using Operand = Vec<T>;
  static constexpr int64_t kStep = kLanes;

  MLLAMA_INLINE Operand key(const T* p) { return load(p); }
  MLLAMA_INLINE Operand key(const T* p, int64_t n) { return load(p, First{n}); }
  MLLAMA_INLINE Operand query(const Query* p) { return load(p); }
  MLLAMA_INLINE Vec<T> add(Vec<T> sum, Operand a, Operand b) { return sum + a * b; }
};

#ifdef __AVX512BF16__
// Pairs of neighbours, as they are stored (vdpbf16ps).
template <>
struct KeyDot<BF16> {
  using Query = BF16;
  using Operand = __m512bh;
  static constexpr int64_t kStep = 32;

  MLLAMA_INLINE Operand key(const BF16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  MLLAMA_INLINE Operand key(const BF16* p, int64_t n) {
    return (__m512bh)_mm512_maskz_loadu_epi16((1u << n) - 1, p);
  }
  MLLAMA_INLINE Operand query(const Query* p) { return key(p); }
  MLLAMA_INLINE FVec add(FVec sum, Operand a, Operand b) {
    return (FVec)_mm512_dpbf16_ps((__m512)sum, a, b);
  }
};
#endif

template <typename T>
class SplitRunner {
  using S = Scalar<T>;
  using Dot = KeyDot<T>;
  using Query = typename Dot::Query;

 public:
  // The n keys from `begin` on of a segment.
  SplitRunner(const AttentionTask* tasks, int64_t heads, int64_t segment, int64_t begin, int64_t n,
              Scratch& scratch)
      : tasks_(tasks),
        task_(tasks[0]),
        heads_(heads),
        segment_(segment),
        begin_(begin),
        n_(n),
        rows_(task_.tokens * task_.group),
        padded_rows_((rows_ + kRowStep - 1) / kRowStep * kRowStep),
        dim_(task_.head_dim),
        width_((dim_ + kLanes - 1) / kLanes * kLanes),
        depth_((dim_ + Dot::kStep - 1) / Dot::kStep * Dot::kStep),
        q_(scratch.take<Query>(heads * padded_rows_ * depth_)),
        weights_(scratch.take<S>(heads * padded_rows_ * kSplitKeys)),
        sums_(scratch.take<S>(heads * padded_rows_ * width_)) {}

  // Of head h, at result + h * head_stride: maxima, sums, outputs.
  void run(S* result, int64_t head_stride) {
    bool any = false;
    for (int64_t r = 0; r < rows_; ++r) any |= limit(r) > 0;
    if (any) {
      load_queries();
      for (int64_t j = 0; j < n_; j += kRun) {
        for (int64_t h = 0; h < heads_; ++h) {
          if (j + kRun < n_) {
            fetch(&Segment::k, j + kRun, h);
          } else {
            fetch(&Segment::v, 0, h);
          }
          for_row_steps([&](int64_t r, auto rows) { scores<rows.value>(h, r, j); });
        }
      }
    }
    for (int64_t h = 0; h < heads_; ++h) {
      S* maxima = result + h * head_stride;
      for (int64_t r = 0; r < rows_; ++r) softmax(h, r, maxima[r], maxima[rows_ + r]);
    }
    if (!any) return;
    memset(sums_, 0, heads_ * padded_rows_ * width_ * sizeof(S));
    for (int64_t j = 0; j < n_; j += kRun) {
      for (int64_t h = 0; h < heads_; ++h) {
        if (j + kRun < n_) {
          fetch(&Segment::v, j + kRun, h);
        } else {
          fetch(&Segment::k, n_, h);
        }
        for_row_steps([&](int64_t r, auto rows) { values<rows.value>(h, r, j); });
      }
    }
    for (int64_t h = 0; h < heads_; ++h) {
      S* out = result + h * head_stride + 2 * rows_;
      for (int64_t r = 0; r < rows_; ++r) {
        memcpy(out + r * dim_, sums_ + (h * padded_rows_ + r) * width_, dim_ * sizeof(S));
      }
    }
  }

 private:
  template <int kValue>
  struct Constant {
    static constexpr int value = kValue;
  };

  template <typename F>
  void for_row_steps(const F& f) const {
    for (int64_t r = 0; r < rows_; r += kRowStep) {
      if (rows_ - r == 1) {
        f(r, Constant<1>{});
      } else if (rows_ - r == 2) {
        f(r, Constant<2>{});
      } else {
        f(r, Constant<kRowStep>{});
      }
    }
  }

  const Segment& segment(int64_t h) const { return tasks_[h].segments[segment_]; }

  // The keys of the split that row r sees, of every head: a prefix.
  int64_t limit(int64_t r) const {
    const int64_t token = r / task_.group;
    const bool* visible = segment(0).visible;
    if (visible && !visible[token * task_.visible_stride]) return 0;
    return task_.causal ? max<int64_t>(0, min(n_, task_.past + token + 1 - begin_)) : n_;
  }

  // Rows and steps padded with zeros.
  void load_queries() {
    memset(q_, 0, heads_ * padded_rows_ * depth_ * sizeof(Query));
    for (int64_t h = 0; h < heads_; ++h) {
      const T* q = static_cast<const T*>(tasks_[h].q);
      for (int64_t r = 0; r < rows_; ++r, q += dim_) {
        Query* row = q_ + (h * padded_rows_ + r) * depth_;
        if constexpr (__is_same(Query, T)) {
          memcpy(row, q, dim_ * sizeof(T));
        } else {
          for_vectors(dim_, [&](int64_t d, auto part) { store(row + d, load(q + d, part)); });
        }
      }
    }
  }

  // The h-th share of the run from `first` on, into the second cache: more can be under way to it
  // than to the first. Always inline: a function that only fetches counts as one without effect.
  __attribute__((always_inline)) void fetch(KeyRows Segment::* rows, int64_t first,
                                            int64_t h) const {
    const int64_t keys = min(kRun, segment_keys(task_, segment_) - begin_ - first);
    const int64_t bytes = dim_ * (int64_t)sizeof(T);
    for (int64_t j = keys * h / heads_; j < keys * (h + 1) / heads_; ++j) {
      for (int64_t g = 0; g < heads_; ++g) {
        prefetch((segment(g).*rows).row(begin_ + first + j), bytes);
      }
    }
  }

  // Of kRows rows of head h with the run of keys from `first` on.
  template <int kRows>
  void scores(int64_t h, int64_t r, int64_t first) {
    constexpr int kKeys = kLanes / kRows;
    static_assert(kRun % kKeys == 0, "runs are whole steps");
    const KeyRows& keys = segment(h).k;
    const char* run = keys.row(begin_ + first);
    const Query* q = q_ + (h * padded_rows_ + r) * depth_;
    S* weights = weights_ + (h * padded_rows_ + r) * kSplitKeys + first;
    const int64_t last = min(kRun, n_ - first) - 1;  // past it, that key once more
    for (int64_t j = 0; j <= last; j += kKeys) {
      Vec<S> products[kLanes] = {};
      const auto step = [&](int64_t d, auto... n) __attribute__((always_inline)) {
        typename Dot::Operand x[kKeys];
#pragma GCC unroll 16
        for (int i = 0; i < kKeys; ++i) {
          const char* key = run + min(j + i, last) * keys.stride;
          x[i] = Dot::key(reinterpret_cast<const T*>(key) + d, n...);
        }
#pragma GCC unroll 4
        for (int k = 0; k < kRows; ++k) {
          const auto row = Dot::query(q + k * depth_ + d);
#pragma GCC unroll 16
          for (int i = 0; i < kKeys; ++i) {
            products[k * kKeys + i] = Dot::add(products[k * kKeys + i], x[i], row);
          }
        }
      };
      int64_t d = 0;
      for (; d + Dot::kStep <= dim_; d += Dot::kStep) step(d);
      if (d < dim_) step(d, dim_ - d);
      const Vec<S> sums = sum_each(products) * scale_;
      for (int k = 0; k < kRows; ++k) {
        memcpy(weights + k * kSplitKeys + j, reinterpret_cast<const S*>(&sums) + k * kKeys,
               kKeys * sizeof(S));
      }
    }
  }

  // Scores of row r, times scale, become weights.
  void softmax(int64_t h, int64_t r, S& maximum, S& sum) {
    const int64_t visible = limit(r), end = (n_ + kLanes - 1) / kLanes * kLanes;
    S* row = weights_ + (h * padded_rows_ + r) * kSplitKeys;
    maximum = -__builtin_inf();
    sum = 0;
    for (int64_t j = visible; j < end; ++j) row[j] = -__builtin_inf();
    Vec<S> largest = load(row);
    for (int64_t j = kLanes; j < end; j += kLanes) largest = max_vec(largest, load(row + j));
    maximum = max_lanes(largest);
    if (maximum == -__builtin_inf()) {
      memset(row, 0, end * sizeof(S));
      return;
    }
    Vec<S> sums = {};
    for (int64_t j = 0; j < end; j += kLanes) {
      const Vec<S> weight = exp(load(row + j) - maximum);
      store(row + j, weight);
      sums += weight;
    }
    sum = sum_lanes(sums);
  }

  // Of kRows rows of head h with the run of keys from `first` on, added to sums_.
  template <int kRows>
  void values(int64_t h, int64_t r, int64_t first) {
    int64_t d = 0;
    for (; d + kColumnVectors * kLanes <= dim_; d += kColumnVectors * kLanes) {
      columns<kRows, kColumnVectors>(h, r, first, d, Whole{});
    }
    for (; d + kLanes <= dim_; d += kLanes) columns<kRows, 1>(h, r, first, d, Whole{});
    if (d < dim_) columns<kRows, 1>(h, r, first, d, First{dim_ - d});
  }

  template <int kRows, int kVectors, typename Part>
  void columns(int64_t h, int64_t r, int64_t first, int64_t d, Part part) {
    const KeyRows& rows = segment(h).v;
    const char* value = rows.row(begin_ + first) + d * sizeof(T);
    const S* weights = weights_ + (h * padded_rows_ + r) * kSplitKeys + first;
    S* out = sums_ + (h * padded_rows_ + r) * width_ + d;
    Vec<S> sums[kRows][kVectors];
#pragma GCC unroll 4
    for (int k = 0; k < kRows; ++k) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) sums[k][i] = load(out + k * width_ + i * kLanes);
    }
    const int64_t keys = min(kRun, n_ - first);
    for (int64_t j = 0; j < keys; ++j, value += rows.stride) {
      Vec<S> x[kVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        x[i] = load(reinterpret_cast<const T*>(value) + i * kLanes, part);
      }
#pragma GCC unroll 4
      for (int k = 0; k < kRows; ++k) {
        const Vec<S> weight = splat(weights[k * kSplitKeys + j]);
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) sums[k][i] += weight * x[i];
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kRows; ++k) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) store(out + k * width_ + i * kLanes, sums[k][i]);
    }
  }

  const AttentionTask* tasks_;
  const AttentionTask& task_;  // what all heads share
  const int64_t heads_, segment_, begin_, n_, rows_, padded_rows_, dim_, width_, depth_;
  const S scale_ = (S)task_.softmax_scale;
  Query* q_;
  S *weights_, *sums_;
};

int64_t count_splits(const AttentionTask& task) {
  int64_t count = 0;
  for (int64_t s = 0; s < task.num_segments; ++s) count += segment_splits(task, s);
  return count;
}

}  // namespace

template <typename T>
void attend_splits(const AttentionTask* tasks, int64_t heads, int64_t first, int64_t last,
                   Scalar<T>* result, int64_t stride, int64_t head_stride, Scratch& scratch) {
  int64_t before = 0;  // splits of the segments before s
  for (int64_t s = 0; s < tasks[0].num_segments && before < last; ++s) {
    const int64_t end = before + segment_splits(tasks[0], s);
    for (int64_t i = max(first, before); i < min(last, end); ++i) {
      const Scratch::Mark mark(scratch);
      const int64_t begin = (i - before) * kSplitKeys,
                    n = min(kSplitKeys, segment_keys(tasks[0], s) - begin);
      SplitRunner<T>(tasks, heads, s, begin, n, scratch).run(result + i * stride, head_stride);
    }
    before = end;
  }
}

template <typename T>
void merge_splits(const AttentionTask& task, const Scalar<T>* results, int64_t stride,
                  Scratch& scratch) {
  using S = Scalar<T>;
  const Scratch::Mark mark(scratch);
  const int64_t rows = task.tokens * task.group, dim = task.head_dim, splits = count_splits(task);
  const int64_t padded = (splits + kLanes - 1) / kLanes * kLanes;
  S* factors = scratch.take<S>(padded);
  for (int64_t r = 0; r < rows; ++r) {
    S maximum = -__builtin_inf(), sum = 0;
    for (int64_t s = 0; s < padded; ++s) {
      factors[s] = s < splits ? results[s * stride + r] : -__builtin_inf();
      maximum = max(maximum, factors[s]);
    }
    // Nobody has seen anything: no difference of infinities.
    const S finite = maximum == -__builtin_inf() ? 0 : maximum;
    for (int64_t s = 0; s < padded; s += kLanes) {
      store(factors + s, exp(load(factors + s) - finite));
    }
    // A split that the row does not see has no output, and may hold anything.
    const auto seen = [&](int64_t s) { return results[s * stride + r] != -__builtin_inf(); };
    for (int64_t s = 0; s < splits; ++s) {
      if (seen(s)) sum += results[s * stride + rows + r] * factors[s];
    }
    T* out =
        static_cast<T*>(task.out) + r / task.group * task.out_token_stride + r % task.group * dim;
    for_vectors(dim, [&](int64_t d, auto part) {
      Vec<T> total = {};
      for (int64_t s = 0; s < splits; ++s) {
        if (seen(s))
          total += load(results + s * stride + 2 * rows + r * dim + d, part) * factors[s];
      }
      store(out + d, sum == 0 ? Vec<T>{} : total / sum, part);
    });
    if (task.lse) store_lse<S>(task, r, maximum, sum);
  }
}

#define MLLAMA_INSTANTIATE(T)                                                                 \
  template void attend_splits<T>(const AttentionTask*, int64_t, int64_t, int64_t, Scalar<T>*, \
                                 int64_t, int64_t, Scratch&);                                 \
  template void merge_splits<T>(const AttentionTask&, const Scalar<T>*, int64_t, Scratch&);
MLLAMA_INSTANTIATE(float)
MLLAMA_INSTANTIATE(F16)
MLLAMA_INSTANTIATE(BF16)
MLLAMA_INSTANTIATE(double)
#undef MLLAMA_INSTANTIATE

}  // namespace mllama::MLLAMA_ISA
