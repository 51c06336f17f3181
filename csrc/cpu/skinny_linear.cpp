// skinny_linear: few rows of x, so the time is that of reading the weight.
// Threads    contiguous ranges of the weight's rows; norm and packing of x once, by rows of x.
// Tiling     a range is cut into eight or four streams of rows, each read from its beginning to its
//            end. A row of every stream goes through k together, kChain vectors at a time, so that
//            this part of them stays in L1 for all rows of x: up to max_tile() of those at once,
//            with all sums in registers, 24 of the 32 (12 of 16).
// Prefetch   what each stream reads kChain vectors later, to L2: the hardware's own prefetching
//            stops at the end of each 4 KB page, which neighbouring rows would reach together.
// Precision  each lane adds chains of kChain products in float32 (float64 for float64); chains and
//            then lanes are added in order. That order depends on k alone, so a row has the same
//            bits in any batch. With AVX512-BF16, bfloat16 products are added in pairs and
//            subnormals count as zero.
// Traffic    the weight once. Up to about 8 rows its reading is the longest part; from there on the
//            products are: 16 rows need 8 multiply-adds per byte of a bfloat16 weight.
// Aliasing   out may be x or residual.
#include "../skinny_linear.h"

#include "common/dtypes.h"
#include "common/linear_end.h"
#include "common/rows.h"
#include "common/scratch.h"
#include "ops.h"

namespace mllama::MLLAMA_ISA {
namespace {

// Rows of x whose sums fit into registers beside those of four rows of the weight; half as many
// beside those of eight. More streams cover more of the memory's latency, so few rows take eight.
constexpr int kMaxTile = kLanes == 16 ? 6 : kLanes == 8 ? 3 : 2;
constexpr int max_tile(int streams) { return streams == 8 ? kMaxTile / 2 : kMaxTile; }
constexpr int64_t kChain = 32;
// Columns of each stream that are finished together: rounded, activated, added to the residual and
// stored.
constexpr int64_t kColumns = 32;
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
        end_(p),
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
    if (p_.rows <= max_tile(8)) return multiply<8>();
    multiply<4>();
  }

 private:
  // Rows first to last of the weight, `length` to each stream; the last streams may have fewer.
  struct Range {
    int64_t first, last, length;
  };

  // Some vectors of k.
  struct Part {
    int64_t first;        // element
    int64_t whole, tail;  // vectors, and the elements of one more
    int64_t ahead;        // elements from here to what is read next
  };

  template <int64_t kStreams>
  void multiply() const {
    const int64_t strip_bytes = (p_.swiglu ? 2 : 1) * kStreams * p_.k * (int64_t)sizeof(T);
    const int64_t grain = ceil_div(kTaskBytes, strip_bytes);
    parallel_for(0, ceil_div<int64_t>(p_.n, kStreams), grain, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      Vec<T>* sums = scratch.take<Vec<T>>(p_.rows * kStreams);
      S* y = scratch.take<S>(p_.rows * kStreams * kColumns);
      S* up = p_.swiglu ? scratch.take<S>(p_.rows * kStreams * kColumns) : nullptr;
      const int64_t last = min(end * kStreams, p_.n);
      const Range range = {begin * kStreams, last, ceil_div(last - begin * kStreams, kStreams)};
      for (int64_t c = 0; c < range.length; c += kColumns) {
        const int64_t columns = min(kColumns, range.length - c);
        multiply_columns<kStreams>(0, range, c, columns, sums, y);
        if (up) multiply_columns<kStreams>(p_.n, range, c, columns, sums, up);
        for (int64_t row = 0; row < p_.rows; ++row) {
          for (int64_t j = 0; j < kStreams; ++j) {
            const int64_t first = range.first + j * range.length + c;
            const int64_t at = (row * kStreams + j) * kColumns;
            if (first >= last) break;
            end_.finish(row, first, min(columns, last - first), y + at, up ? up + at : nullptr);
          }
        }
      }
    });
  }

  // y[row][j][i] = x[row] . weight[row c + i of stream j], the streams `offset` rows further down.
  template <int64_t kStreams>
  void multiply_columns(int64_t offset, const Range& range, int64_t c, int64_t columns,
                        Vec<T>* sums, S* y) const {
    const int64_t tiles = ceil_div<int64_t>(p_.rows, max_tile(kStreams));
    for (int64_t i = 0; i < columns; ++i) {
      const T* weight[kStreams];
      for (int j = 0; j < kStreams; ++j) {  // past the last row, that row again
        const int64_t row = min(range.first + j * range.length + c + i, range.last - 1);
        weight[j] = static_cast<const T*>(p_.weight) + (offset + row) * p_.weight_row_stride;
      }
      for (int64_t v = 0; v * Dot::kStep < p_.k; v += kChain) {
        const bool ends = (v + kChain) * Dot::kStep >= p_.k;
        const Part part = {v * Dot::kStep, min(kChain, whole_ - v), ends ? tail_ : 0,
                           ends ? p_.weight_row_stride - v * Dot::kStep : kChain * Dot::kStep};
        for (int64_t row = 0, t = tiles; row < p_.rows; --t) {
          const int64_t rows = t == 1 ? p_.rows - row : (p_.rows - row) / t;
          multiply_tiles<kStreams>(rows, weight, part, x_ + v * x_stride_ + row * Dot::kStep,
                                   sums + row * kStreams);
          row += rows;
        }
      }
      for (int64_t row = 0; row < p_.rows * kStreams; ++row) {
        y[row * kColumns + i] = sum_lanes(sums[row]);
      }
    }
  }

  // `rows` rows of x times a row of each stream.
  template <int kStreams, int kRows = 1>
  void multiply_tiles(int64_t rows, const T* const* weight, const Part& part, const E* x,
                      Vec<T>* sums) const {
    if constexpr (kRows < max_tile(kStreams)) {
      if (rows > kRows) return multiply_tiles<kStreams, kRows + 1>(rows, weight, part, x, sums);
    }
    multiply_tile<kStreams, kRows>(weight, part, x, sums);
  }

  template <int kStreams, int kRows>
  void multiply_tile(const T* const* first, const Part& part, const E* x, Vec<T>* sums) const {
    const T* weight[kStreams];
    for (int j = 0; j < kStreams; ++j) weight[j] = first[j] + part.first;
    const int64_t ahead = part.ahead, x_stride = x_stride_;
    Vec<T> chains[kRows][kStreams] = {};
    const auto multiply = [&](const E* x, auto load_weight) {
      Operand w[kStreams];
#pragma GCC unroll 8
      for (int j = 0; j < kStreams; ++j) w[j] = load_weight(j);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const Operand value = Dot::load_x(x + r * Dot::kStep);
#pragma GCC unroll 8
        for (int j = 0; j < kStreams; ++j) {
          chains[r][j] = Dot::multiply_add(w[j], value, chains[r][j]);
        }
      }
    };
    for (int64_t v = 0; v < part.whole; ++v) {
      multiply(x + v * x_stride, [&](int j) {
        const T* place = weight[j] + v * Dot::kStep;
        __builtin_prefetch(place + ahead, 0, 2);
        return Dot::load_weight(place);
      });
    }
    if (part.tail) {
      multiply(x + part.whole * x_stride, [&](int j) {
        return Dot::load_weight(weight[j] + part.whole * Dot::kStep, First{part.tail});
      });
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kStreams; ++j) {
        Vec<T>& sum = sums[r * kStreams + j];
        sum = part.first == 0 ? chains[r][j] : sum + chains[r][j];
      }
    }
  }

  const SkinnyLinearParams& p_;
  const LinearEnd<T> end_;
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
