// skinny_linear: few rows of x, so the time is that of reading the weight.
// Threads    contiguous ranges of the weight's rows; norm and packing of x once, by rows of x.
// Tiling     kStripRows rows of the weight go through k together, kChain vectors at a time, so that
//            this part of x stays in L1 for all of them. weight_rows() of them meet up to kMaxTile
//            rows of x with all sums in registers: 24 of the 32 (12 of 16) vector registers. More
//            rows of x read the part of the weight again, from L1.
// Prefetch   what the strip reads next, to L2, while it multiplies: the hardware's own prefetching
//            stops at the end of each 4 KB page, which is where rows of the weight end, too.
// Precision  each lane adds chains of kChain products in float32 (float64 for float64); chains and
//            then lanes are added in order. That order depends on k alone, so a row has the same
//            bits in any batch. With AVX512-BF16, bfloat16 products are added in pairs and
//            subnormals count as zero.
// Traffic    the weight once. Up to about 8 rows its reading is the longest part; from there on the
//            products are: 16 rows need 8 multiply-adds per byte of a bfloat16 weight.
// Aliasing   out may be x or residual.
#include "../skinny_linear.h"

#include "dtypes.h"
#include "kernels.h"
#include "rows.h"
#include "scratch.h"

namespace mllama::MLLAMA_ISA {
namespace {

constexpr int kStripRows = 8;
constexpr int kMaxTile = kLanes == 16 ? 6 : kLanes == 8 ? 3 : 2;
// Rows of the weight that meet `rows` rows of x at a time. Eight streams with read-ahead cover more
// of the memory's latency than four: a fifth faster on one core of an EPYC with AVX512-BF16.
constexpr int weight_rows(int rows) { return 2 * rows <= kMaxTile ? 8 : 4; }
constexpr int64_t kChain = 32;
// Columns that are finished together: rounded, activated, added to the residual and stored.
constexpr int64_t kColumns = 128;
static_assert(kColumns % kStripRows == 0 && kStripRows % weight_rows(1) == 0);
// Bytes of the weight that one task should read at least: below, threads cost more.
constexpr int64_t kTaskBytes = 1 << 17;

// Products of vectors of kStep elements of the weight with as many of x, which is packed.
template <typename T>
struct FmaDot {
  using Element = Scalar<T>;  // of packed x
  using Operand = Vec<T>;
  static constexpr int kStep = kLanes;

  static Operand load_weight(const T* p) { return load(p); }
  static Operand load_weight(const T* p, First part) { return load(p, part); }
  static Operand load_x(const Element* p) { return load(p); }
  static void pack(const T* x, Element* out) { store(out, load(x)); }
  static void pack(const T* x, First part, Element* out) { store(out, load(x, part)); }
  static Vec<T> multiply_add(Operand w, Operand x, Vec<T> sum) { return sum + w * x; }
};

#ifdef __AVX512BF16__
struct Bf16Dot {
  using Element = BF16;
  using Operand = __m512bh;
  static constexpr int kStep = 32;

  static Operand load_weight(const BF16* p) { return (Operand)_mm512_loadu_si512(p); }
  static Operand load_weight(const BF16* p, First part) {
    return (Operand)_mm512_maskz_loadu_epi16(((__mmask32)1 << part.n) - 1, p);
  }
  static Operand load_x(const BF16* p) { return load_weight(p); }
  static void pack(const BF16* x, BF16* out) { memcpy(out, x, sizeof(Operand)); }
  static void pack(const BF16* x, First part, BF16* out) {
    const Operand padded = load_weight(x, part);
    memcpy(out, &padded, sizeof(padded));
  }
  static FVec multiply_add(Operand w, Operand x, FVec sum) {
    return (FVec)_mm512_dpbf16_ps((__m512)sum, w, x);
  }
};
#endif

template <typename T, typename Dot>
class Linear {
  using S = Scalar<T>;
  using E = typename Dot::Element;
  using Operand = typename Dot::Operand;

 public:
  explicit Linear(const SkinnyLinearParams& p)
      : p_(p),
        gate_(p.gate ? tanh_gate<T>(p.gate) : S{}),
        whole_(p.k / Dot::kStep),
        tail_(p.k % Dot::kStep),
        x_stride_(p.rows * Dot::kStep),
        x_(scratch_.take<E>((whole_ + 1) * x_stride_)) {}

  // Normalizes x if asked to. Packed x is [vector of k][row].
  void pack_x() {
    T* normed = p_.norm_weight ? scratch_.take<T>(p_.rows * p_.k) : nullptr;
    parallel_for(0, p_.rows, row_grain(p_.k), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(p_.x) + row * p_.x_row_stride;
        if (normed) {
          T* y = normed + row * p_.k;
          rms_norm_row(x, static_cast<const T*>(p_.norm_weight), y, p_.k, p_.eps);
          x = y;
        }
        E* out = x_ + row * Dot::kStep;
        for (int64_t v = 0; v < whole_; ++v) Dot::pack(x + v * Dot::kStep, out + v * x_stride_);
        if (tail_) Dot::pack(x + whole_ * Dot::kStep, First{tail_}, out + whole_ * x_stride_);
      }
    });
  }

  void multiply() const {
    const int64_t strip_bytes = (p_.swiglu ? 2 : 1) * kStripRows * p_.k * (int64_t)sizeof(T);
    const int64_t grain = ceil_div(kTaskBytes, strip_bytes);
    parallel_for(0, ceil_div<int64_t>(p_.n, kStripRows), grain, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      Vec<T>* sums = scratch.take<Vec<T>>(p_.rows * kStripRows);
      S* y = scratch.take<S>(p_.rows * kColumns);
      S* up = p_.swiglu ? scratch.take<S>(p_.rows * kColumns) : nullptr;
      const int64_t last = min(end * kStripRows, p_.n);
      for (int64_t first = begin * kStripRows; first < last; first += kColumns) {
        const int64_t columns = min(kColumns, last - first);
        const int64_t next = min(first + kColumns, last - 1);
        multiply_columns(first, columns, up ? p_.n + first : next, sums, y);
        if (up) multiply_columns(p_.n + first, columns, next, sums, up);
        for (int64_t row = 0; row < p_.rows; ++row) {
          finish_row(row, first, columns, y + row * kColumns, up ? up + row * kColumns : nullptr);
        }
      }
    });
  }

 private:
  // Some vectors of k.
  struct Part {
    int64_t first;        // element
    int64_t whole, tail;  // vectors, and the elements of one more
    int64_t ahead;        // elements from here to what is read next
  };

  // y[row][i] = x[row] . weight[first + i]. `next`: the row of the weight that is read after these.
  void multiply_columns(int64_t first, int64_t columns, int64_t next, Vec<T>* sums, S* y) const {
    const int64_t tiles = ceil_div<int64_t>(p_.rows, kMaxTile);
    for (int64_t c = 0; c < columns; c += kStripRows) {
      const int64_t count = min<int64_t>(kStripRows, columns - c);
      const T* weight[kStripRows];
      for (int i = 0; i < kStripRows; ++i) {  // past the last row, that row again
        weight[i] = static_cast<const T*>(p_.weight) +
                    (first + c + min<int64_t>(i, count - 1)) * p_.weight_row_stride;
      }
      const int64_t next_strip = c + kStripRows < columns ? first + c + kStripRows : next;
      const int64_t to_next_strip = (next_strip - (first + c)) * p_.weight_row_stride;
      for (int64_t v = 0; v * Dot::kStep < p_.k; v += kChain) {
        const bool ends = (v + kChain) * Dot::kStep >= p_.k;
        const Part part = {v * Dot::kStep, min(kChain, whole_ - v), ends ? tail_ : 0,
                           ends ? to_next_strip - v * Dot::kStep : kChain * Dot::kStep};
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t row = t * p_.rows / tiles, rows = (t + 1) * p_.rows / tiles - row;
          const E* x = x_ + v * x_stride_ + row * Dot::kStep;
          multiply_tiles(rows, weight, count, part, x, sums + row * kStripRows);
        }
      }
      for (int64_t row = 0; row < p_.rows; ++row) {
        for (int64_t i = 0; i < count; ++i) {
          y[row * kColumns + c + i] = sum_lanes(sums[row * kStripRows + i]);
        }
      }
    }
  }

  // `rows` rows of x times `count` rows of the weight.
  template <int kRows = 1>
  void multiply_tiles(int64_t rows, const T* const* weight, int64_t count, const Part& part,
                      const E* x, Vec<T>* sums) const {
    if constexpr (kRows < kMaxTile) {
      if (rows > kRows) return multiply_tiles<kRows + 1>(rows, weight, count, part, x, sums);
    }
    for (int64_t i = 0; i < count; i += weight_rows(kRows)) {
      multiply_tile<kRows>(weight + i, part, x, sums + i);
    }
  }

  template <int kRows>
  void multiply_tile(const T* const* first, const Part& part, const E* x, Vec<T>* sums) const {
    constexpr int kWeightRows = weight_rows(kRows);
    const T* weight[kWeightRows];
    for (int j = 0; j < kWeightRows; ++j) weight[j] = first[j] + part.first;
    const int64_t ahead = part.ahead, x_stride = x_stride_;
    Vec<T> chains[kRows][kWeightRows] = {};
    Operand w[kWeightRows];
    const auto multiply = [&](const E* x) {
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const Operand value = Dot::load_x(x + r * Dot::kStep);
#pragma GCC unroll 8
        for (int j = 0; j < kWeightRows; ++j) {
          chains[r][j] = Dot::multiply_add(w[j], value, chains[r][j]);
        }
      }
    };
    for (int64_t v = 0; v < part.whole; ++v) {
#pragma GCC unroll 8
      for (int j = 0; j < kWeightRows; ++j) {
        const T* place = weight[j] + v * Dot::kStep;
        __builtin_prefetch(place + ahead, 0, 2);
        w[j] = Dot::load_weight(place);
      }
      multiply(x + v * x_stride);
    }
    if (part.tail) {
      for (int j = 0; j < kWeightRows; ++j) {
        w[j] = Dot::load_weight(weight[j] + part.whole * Dot::kStep, First{part.tail});
      }
      multiply(x + part.whole * x_stride);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kWeightRows; ++j) {
        Vec<T>& sum = sums[r * kStripRows + j];
        sum = part.first == 0 ? chains[r][j] : sum + chains[r][j];
      }
    }
  }

  // Columns first, ... of a row of out, from their sums.
  void finish_row(int64_t row, int64_t first, int64_t columns, const S* y, const S* up) const {
    const bool visible = !p_.row_mask || p_.row_mask[row];
    const T* residual = static_cast<const T*>(p_.residual);
    if (residual) residual += row * p_.residual_row_stride + first;
    T* out = static_cast<T*>(p_.out) + row * p_.n + first;
    for_vectors(columns, [&](int64_t i, auto part) {
      Vec<T> value = round_to<T>(load(y + i));
      if (up) value = round_to<T>(swiglu_product<T>(value, round_to<T>(load(up + i))));
      if (p_.gate) {
        value = gated_sum<T>(value, load(residual + i, part), gate_, visible);
      } else if (residual) {
        value += load(residual + i, part);
      }
      store(out + i, value, part);
    });
  }

  const SkinnyLinearParams& p_;
  const S gate_;
  const int64_t whole_, tail_;  // vectors of k, and the elements of one more
  const int64_t x_stride_;
  Scratch scratch_;
  E* x_;
};

template <typename T, typename Dot>
void run_with(const SkinnyLinearParams& p) {
  Linear<T, Dot> linear(p);
  linear.pack_x();
  linear.multiply();
}

template <typename T>
void run(const SkinnyLinearParams& p) {
#ifdef __AVX512BF16__
  if constexpr (__is_same(T, BF16)) return run_with<T, Bf16Dot>(p);
#endif
  run_with<T, FmaDot<T>>(p);
}

}  // namespace

void skinny_linear(const SkinnyLinearParams& p) {
  if (p.rows * p.n == 0) return;
  with_dtype(p.dtype, [&]<typename T>(Type<T>) { run<T>(p); });
}

}  // namespace mllama::MLLAMA_ISA
