#include "../skinny_linear.h"

#ifndef KCHAIN
#define KCHAIN 64
#endif
#ifndef WR
#define WR 4
#endif
#ifndef XT
#define XT 6
#endif
#ifndef ORDER
#define ORDER 1
#endif
#ifndef STRIP
#define STRIP 8
#endif
#ifndef PF
#define PF 2
#endif
#include <type_traits>

#include "dtypes.h"
#include "kernels.h"
#include "rows.h"
#include "scratch.h"

namespace mllama::MLLAMA_ISA {
namespace {

// Rows of the weight that one step reads.
constexpr int kWeightRows = WR;
constexpr int kStrip = STRIP;
// Rows of x per pass over a block of the weight: kWeightRows times as many sums stay in registers.
constexpr int kMaxTile = kLanes == 16 ? XT : kLanes == 8 ? 3 : 2;
// Vectors per chain of additions.
constexpr int64_t kChain = KCHAIN;
// Bytes of the weight that one task should read at least: below, threads cost more.
constexpr int64_t kTaskBytes = 1 << 16;
// Columns whose sums are kept until they are rounded and stored, many at a time.
constexpr int64_t kColumns = 128;

template <typename T>
struct FmaDot {
  using Element = Scalar<T>;  // of packed x
  using Operand = Vec<T>;
  static constexpr int kStep = kLanes;

  static Operand weight(const T* p) { return load(p); }
  static Operand weight(const T* p, First part) { return load(p, part); }
  static Operand packed(const Element* p) { return load(p); }
  static Vec<T> multiply_add(Operand w, Operand x, Vec<T> sum) { return sum + w * x; }
  static void pack(const T* x, Element* out) { store(out, load(x)); }
  static void pack(const T* x, First part, Element* out) { store(out, load(x, part)); }
};

#ifdef __AVX512BF16__
struct Bf16Dot {
  using Element = BF16;
  using Operand = __m512bh;
  static constexpr int kStep = 32;

  static Operand weight(const BF16* p) { return (Operand)_mm512_loadu_si512(p); }
  static Operand weight(const BF16* p, First part) {
    return (Operand)_mm512_maskz_loadu_epi16(((__mmask32)1 << part.n) - 1, p);
  }
  static Operand packed(const BF16* p) { return weight(p); }
  static FVec multiply_add(Operand w, Operand x, FVec sum) {
    return (FVec)_mm512_dpbf16_ps((__m512)sum, w, x);
  }
  static void pack(const BF16* x, BF16* out) { memcpy(out, x, kStep * sizeof(BF16)); }
  static void pack(const BF16* x, First part, BF16* out) {
    const Operand padded = weight(x, part);
    memcpy(out, &padded, sizeof(padded));
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
        for (int64_t s = 0; s < whole_; ++s) Dot::pack(x + s * Dot::kStep, out + s * x_stride_);
        if (tail_) Dot::pack(x + whole_ * Dot::kStep, First{tail_}, out + whole_ * x_stride_);
      }
    });
  }

  void multiply() const {
    const int64_t group_bytes = (p_.swiglu ? 2 : 1) * kStrip * p_.k * (int64_t)sizeof(T);
    const int64_t grain = max<int64_t>(1, kTaskBytes / group_bytes);
    parallel_for(0, ceil_div<int64_t>(p_.n, kStrip), grain, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      Vec<T>* sums = scratch.take<Vec<T>>(p_.rows * kStrip);
      S* y = scratch.take<S>(p_.rows * kColumns);
      S* up = p_.swiglu ? scratch.take<S>(p_.rows * kColumns) : nullptr;
      const int64_t last = min(end * kStrip, p_.n);
      for (int64_t first = begin * kStrip; first < last; first += kColumns) {
        const int64_t columns = min(kColumns, last - first);
        multiply_columns(first, columns, sums, y);
        if (up) multiply_columns(p_.n + first, columns, sums, up);
        for (int64_t row = 0; row < p_.rows; ++row) {
          finish_row(row, first, columns, y + row * kColumns, up ? up + row * kColumns : nullptr);
        }
      }
    });
  }

 private:
  // y[row][i] = x[row] . weight[first + i]
  void multiply_columns(int64_t first, int64_t columns, Vec<T>* sums, S* y) const {
    const int64_t tiles = ceil_div<int64_t>(p_.rows, kMaxTile);
    for (int64_t c = 0; c < columns; c += kStrip) {
      const int64_t groups = ceil_div<int64_t>(min<int64_t>(kStrip, columns - c), kWeightRows);
      const T* weight[kStrip];
      for (int j = 0; j < kStrip; ++j) {  // past the last column, that column again
        weight[j] = static_cast<const T*>(p_.weight) +
                    (first + min(c + j, columns - 1)) * p_.weight_row_stride;
      }
      const int64_t next_strip = c + kStrip < columns ? kStrip * p_.weight_row_stride : 0;
      for (int64_t s = 0; s * Dot::kStep < p_.k; s += kChain) {
        const bool last = (s + kChain) * Dot::kStep >= p_.k;
        Block block = {};
        block.whole = min(kChain, whole_ - s);
        block.tail = last ? tail_ : 0;
        const int64_t next = last ? next_strip - s * Dot::kStep : kChain * Dot::kStep;
        block.starts = s == 0;
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t row = t * p_.rows / tiles, end = (t + 1) * p_.rows / tiles;
          for (int64_t g = 0; g < groups; ++g) {
            block.next = ORDER ? ((tiles - 1 - g % tiles) == t ? next : 0) : next;
            for (int j = 0; j < kWeightRows; ++j)
              block.weight[j] = weight[g * kWeightRows + j] + s * Dot::kStep;
            multiply_block<kMaxTile>(end - row, block, x_ + s * x_stride_ + row * Dot::kStep,
                                     sums + (row * kStrip) + g * kWeightRows);
          }
        }
      }
      for (int64_t row = 0; row < p_.rows; ++row) {
        for (int j = 0; j < kStrip; ++j) {
          y[row * kColumns + c + j] = sum_lanes(sums[row * kStrip + j]);
        }
      }
    }
  }

  // Up to kChain vectors of kWeightRows rows of the weight.
  struct Block {
    const T* weight[kWeightRows];
    int64_t whole, tail;  // vectors, and elements after them
    int64_t next;         // elements from here to what will be read after this block
    bool starts;          // the rows
  };

  template <int kRows>
  void multiply_block(int64_t rows, const Block& block, const E* x, Vec<T>* sums) const {
    if constexpr (kRows > 1) {
      if (rows < kRows) return multiply_block<kRows - 1>(rows, block, x, sums);
    }
    Vec<T> chains[kRows][kWeightRows] = {};
    const T* weight[kWeightRows];
    for (int j = 0; j < kWeightRows; ++j) weight[j] = block.weight[j];
    const int64_t next = block.next;
    const auto step = [&](const Operand(&w)[kWeightRows], const E* x) {
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const Operand value = Dot::packed(x + r * Dot::kStep);
#pragma GCC unroll 8
        for (int j = 0; j < kWeightRows; ++j) {
          chains[r][j] = Dot::multiply_add(w[j], value, chains[r][j]);
        }
      }
    };
    Operand w[kWeightRows];
    for (int64_t s = 0; s < block.whole; ++s, x += x_stride_) {
#pragma GCC unroll 8
      for (int j = 0; j < kWeightRows; ++j) {
        const T* here = weight[j] + s * Dot::kStep;
        if constexpr (PF < 4) __builtin_prefetch(here + next, 0, PF);
        w[j] = Dot::weight(here);
      }
      step(w, x);
    }
    if (block.tail) {
      for (int j = 0; j < kWeightRows; ++j) {
        w[j] = Dot::weight(weight[j] + block.whole * Dot::kStep, First{block.tail});
      }
      step(w, x);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kWeightRows; ++j) {
        Vec<T>& sum = sums[r * kStrip + j];
        sum = block.starts ? chains[r][j] : sum + chains[r][j];
      }
    }
  }

  // From float32 sums of columns first, ... to elements of out.
  void finish_row(int64_t row, int64_t first, int64_t columns, const S* y, const S* up) const {
    const bool visible = !p_.row_mask || p_.row_mask[row];
    const T* residual = p_.residual ? static_cast<const T*>(p_.residual) +
                                          row * p_.residual_row_stride + first
                                    : nullptr;
    T* out = static_cast<T*>(p_.out) + row * p_.n + first;
    for_vectors(columns, [&](int64_t i, auto part) {
      Vec<T> value = round_to<T>(load(y + i));
      if (up) value = round_to<T>(swiglu_product<T>(value, round_to<T>(load(up + i))));
      if (p_.gate) value = visible ? round_to<T>(value * gate_) : Vec<T>{} * gate_;
      if (residual) value += load(residual + i, part);
      store(out + i, value, part);
    });
  }

  const SkinnyLinearParams& p_;
  const S gate_;
  const int64_t whole_, tail_, x_stride_;
  Scratch scratch_;
  E* x_;
};

template <typename T>
void run(const SkinnyLinearParams& p) {
#ifdef __AVX512BF16__
  using Dot = std::conditional_t<__is_same(T, BF16), Bf16Dot, FmaDot<T>>;
#else
  using Dot = FmaDot<T>;
#endif
  Linear<T, Dot> linear(p);
  linear.pack_x();
  linear.multiply();
}

}  // namespace

void skinny_linear(const SkinnyLinearParams& p) {
  if (p.rows * p.n == 0) return;
  with_dtype(p.dtype, [&]<typename T>(Type<T>) { run<T>(p); });
}

}  // namespace mllama::MLLAMA_ISA
