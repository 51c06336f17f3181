// Attention of a few rows (a decode step) over one split of the keys.
//
// Tiling     up to kRowStep query rows at a time share each key and value vector that is loaded.
// Traffic    keys and values once: 2 * keys * head_dim elements for each key head; all else is in
//            L1.
// Precision  float32 (float64 for float64), dot products as one chain for each vector lane.
#include "attention.h"

namespace mllama::MLLAMA_ISA {
namespace {

constexpr int kRowStep = 4;
constexpr int kColumnVectors = 4;  // 4 x 4 sums of the value product stay in registers
constexpr int64_t kPrefetchRows = 8;

MLLAMA_INLINE int64_t segment_keys(const AttentionTask& task, int64_t segment) {
  const int64_t keys = task.segments[segment].keys;
  return task.causal ? min(keys, task.past + task.tokens) : keys;
}

MLLAMA_INLINE int64_t segment_splits(const AttentionTask& task, int64_t segment) {
  return (segment_keys(task, segment) + kSplitKeys - 1) / kSplitKeys;
}

MLLAMA_INLINE void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
}

template <typename T>
class SplitRunner {
  using S = Scalar<T>;

 public:
  SplitRunner(const AttentionTask& task, const Segment& segment, int64_t begin, int64_t n,
              Scratch& scratch)
      : task_(task),
        segment_(segment),
        begin_(begin),
        n_(n),
        rows_(task.tokens * task.group),
        width_((task.head_dim + kLanes - 1) / kLanes * kLanes),
        q_(scratch.take<S>(kFewRows * width_)),
        weights_(scratch.take<S>(kFewRows * kSplitKeys)) {}

  void run(S* maxima, S* sums, S* out) {
    bool any = false;
    for (int64_t r = 0; r < rows_; ++r) any |= limit(r) > 0;
    if (any) {
      load_queries();
      for (int64_t r = 0; r < rows_; r += kRowStep) {
        if (rows_ - r == 1) {
          scores<1>(r);
        } else if (rows_ - r == 2) {
          scores<2>(r);
        } else {
          scores<kRowStep>(r);
        }
      }
    }
    for (int64_t r = 0; r < rows_; ++r) softmax(r, maxima[r], sums[r]);
    if (!any) return;
    for (int64_t r = 0; r < rows_; r += kRowStep) {
      if (rows_ - r == 1) {
        values<1>(r, out);
      } else if (rows_ - r == 2) {
        values<2>(r, out);
      } else {
        values<kRowStep>(r, out);
      }
    }
  }

 private:
  // The keys of the split that row r sees: a prefix.
  int64_t limit(int64_t r) const {
    const int64_t token = r / task_.group;
    if (segment_.visible && !segment_.visible[token * task_.visible_stride]) return 0;
    return task_.causal ? max<int64_t>(0, min(n_, task_.past + token + 1 - begin_)) : n_;
  }

  // In the compute type, rows and lanes padded with zeros.
  void load_queries() {
    memset(q_, 0, kFewRows * width_ * sizeof(S));
    const T* q = static_cast<const T*>(task_.q);
    for (int64_t r = 0; r < rows_; ++r) {
      for_vectors(task_.head_dim, [&](int64_t d, auto part) {
        store(q_ + r * width_ + d, load(q + r * task_.head_dim + d, part));
      });
    }
  }

  template <int kRows>
  void scores(int64_t r) {
    const int64_t dim = task_.head_dim;
    for (int64_t j = 0; j < n_; ++j) {
      const T* key = reinterpret_cast<const T*>(segment_.k.row(begin_ + j));
      if (j + kPrefetchRows < n_)
        prefetch_row(segment_.k.row(begin_ + j + kPrefetchRows), dim * sizeof(T));
      Vec<S> products[kRows] = {};
      const S* q = q_ + r * width_;
      for_vectors(dim, [&](int64_t d, auto part) {
        const Vec<S> x = load(key + d, part);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) products[i] += x * load(q + i * width_ + d);
      });
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
        weights_[(r + i) * kSplitKeys + j] = sum_lanes(products[i]) * scale_;
    }
  }

  // Scores of row r, times scale, become weights.
  void softmax(int64_t r, S& maximum, S& sum) {
    const int64_t visible = limit(r), end = (n_ + kLanes - 1) / kLanes * kLanes;
    S* row = weights_ + r * kSplitKeys;
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

  template <int kRows>
  void values(int64_t r, S* out) {
    const int64_t dim = task_.head_dim;
    int64_t d = 0;
    for (; d + kColumnVectors * kLanes <= dim; d += kColumnVectors * kLanes) {
      columns<kRows, kColumnVectors>(r, d, out, Whole{});
    }
    for (; d + kLanes <= dim; d += kLanes) columns<kRows, 1>(r, d, out, Whole{});
    if (d < dim) columns<kRows, 1>(r, d, out, First{dim - d});
  }

  template <int kRows, int kVectors, typename Part>
  void columns(int64_t r, int64_t d, S* out, Part part) {
    Vec<S> sums[kRows][kVectors] = {};
    for (int64_t j = 0; j < n_; ++j) {
      const T* value = reinterpret_cast<const T*>(segment_.v.row(begin_ + j)) + d;
      if (j + kPrefetchRows < n_) {
        prefetch_row(segment_.v.row(begin_ + j + kPrefetchRows) + d * sizeof(T),
                     kVectors * kLanes * sizeof(T));
      }
      Vec<S> x[kVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) x[i] = load(value + i * kLanes, part);
#pragma GCC unroll 4
      for (int k = 0; k < kRows; ++k) {
        const Vec<S> weight = splat(weights_[(r + k) * kSplitKeys + j]);
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) sums[k][i] += weight * x[i];
      }
    }
    for (int k = 0; k < kRows && r + k < rows_; ++k) {
      for (int i = 0; i < kVectors; ++i)
        store(out + (r + k) * task_.head_dim + d + i * kLanes, sums[k][i], part);
    }
  }

  const AttentionTask& task_;
  const Segment& segment_;
  const int64_t begin_, n_, rows_, width_;
  const S scale_ = (S)task_.softmax_scale;
  S *q_, *weights_;
};

}  // namespace

int64_t count_splits(const AttentionTask& task) {
  int64_t count = 0;
  for (int64_t s = 0; s < task.num_segments; ++s) count += segment_splits(task, s);
  return count;
}

template <typename T>
void attend_split(const AttentionTask& task, int64_t split, Scalar<T>* result, Scratch& scratch) {
  const Scratch::Mark mark(scratch);
  int64_t s = 0;
  for (; split >= segment_splits(task, s); ++s) split -= segment_splits(task, s);
  const int64_t rows = task.tokens * task.group, begin = split * kSplitKeys;
  SplitRunner<T>(task, task.segments[s], begin, min(kSplitKeys, segment_keys(task, s) - begin),
                 scratch)
      .run(result, result + rows, result + 2 * rows);
}

template <typename T>
void merge_splits(const AttentionTask& task, const Scalar<T>* results, int64_t stride) {
  using S = Scalar<T>;
  const int64_t rows = task.tokens * task.group, dim = task.head_dim, splits = count_splits(task);
  for (int64_t r = 0; r < rows; ++r) {
    S maximum = -__builtin_inf(), sum = 0;
    for (int64_t s = 0; s < splits; ++s) maximum = max(maximum, results[s * stride + r]);
    T* out =
        static_cast<T*>(task.out) + r / task.group * task.out_token_stride + r % task.group * dim;
    for (int64_t s = 0; s < splits; ++s) {
      const S* split = results + s * stride;
      // A split that the row does not see has no output, and may hold anything.
      if (split[r] != -__builtin_inf()) sum += split[rows + r] * exp(splat(split[r] - maximum))[0];
    }
    for_vectors(dim, [&](int64_t d, auto part) {
      Vec<T> total = {};
      for (int64_t s = 0; s < splits; ++s) {
        const S* split = results + s * stride;
        if (split[r] == -__builtin_inf()) continue;
        total += load(split + 2 * rows + r * dim + d, part) * exp(splat(split[r] - maximum))[0];
      }
      store(out + d, sum == 0 ? Vec<T>{} : total / sum, part);
    });
    if (task.lse) store_lse<S>(task, r, maximum, sum);
  }
}

#define MLLAMA_INSTANTIATE(T)                                                         \
  template void attend_split<T>(const AttentionTask&, int64_t, Scalar<T>*, Scratch&); \
  template void merge_splits<T>(const AttentionTask&, const Scalar<T>*, int64_t);
MLLAMA_INSTANTIATE(float)
MLLAMA_INSTANTIATE(F16)
MLLAMA_INSTANTIATE(BF16)
MLLAMA_INSTANTIATE(double)
#undef MLLAMA_INSTANTIATE

}  // namespace mllama::MLLAMA_ISA
