// quantized_linear: as skinny_linear, of a packed weight and any number of rows.
// Threads    tasks of neighbouring tiles of the weight; norm and re-encoding of x by rows.
// Products   float32: with the decoded weight, in chains that are the same for few rows and many
//            (quantized_float.h). 16 bits: with its integers as integers (quantized_quads.h), and
//            so with nf4 and fp4 where AVX2 or AVX-512 looks their table up and integers are exact
//            enough (quantized_integer_table.h); with what is left of these and fp8 as bfloat16
//            where the CPU has that (quantized_pairs.h), with fp8 as float16 on AVX2
//            (quantized_halves.h). One way for every number of rows. What these cannot, a row they
//            do not take or a sum that is not finite, is computed in float32.
// Precision  float32 sums, rounded to the dtype after the bias. A row has the same bits in any
//            batch and on any number of threads.
// Traffic    the weight once for every 256 rows, of one row as several readers of neighbouring
//            tiles; of many rows it is unpacked out of the cache for each 16. x once a tile from
//            the second cache.
// Memory     of these rows x in float32 and re-encoded, 9 bytes an element: 64 MB at k = 28672.
// Aliasing   out may be residual.
#include "../quantized_linear.h"

#include "common/dtypes.h"
#include "common/linear_end.h"
#include "common/machine.h"
#include "ops.h"
#include "quantized_float.h"
#include "quantized_halves.h"
#include "quantized_pairs.h"
#include "quantized_quads.h"

namespace mllama::MLLAMA_ISA {
namespace {

constexpr int64_t kTaskTiles = 3;  // a panel of FmaGemm, or several
constexpr int64_t kTaskBytes = 1 << 17;
// Rows that are multiplied together: what is made of x does not grow with a prompt, and the weight
// is decoded for enough rows to cost little.
constexpr int64_t kRowsTogether = 256;
// Columns may begin within a tile: those of `up` where n is not whole tiles.
constexpr int64_t kWidth = (kTaskTiles + 1) * kTileRows;

template <typename T>
class Linear {
 public:
  Linear(const QuantizedLinearParams& p, const PackedLayout& layout, const FloatProduct& floats,
         ReencodedProduct* reencoded)
      : p_(p), layout_(layout), end_(p, p.bias), floats_(floats), reencoded_(reencoded) {}

  void run() {
    take_x();
    const int64_t tasks = ceil_div(p_.n, kTaskTiles * kTileRows);
    const int64_t bytes = layout_.tile_bytes * kTaskTiles * (p_.swiglu ? 2 : 1);
    parallel_for(0, tasks, ceil_div(kTaskBytes, bytes), [&](int64_t begin, int64_t end) {
      Scratch scratch;
      float* y = scratch.take<float>(padded_rows(), kWidth);
      float* up = p_.swiglu ? scratch.take<float>(padded_rows(), kWidth) : nullptr;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * kTaskTiles * kTileRows;
        const int64_t columns = min(kTaskTiles * kTileRows, p_.n - first);
        multiply(first, columns, y, scratch);
        if (up) multiply(p_.n + first, columns, up, scratch);
        for (int64_t row = 0; row < p_.rows; ++row) {
          end_.finish(row, first, columns, y + row * kWidth + first % kTileRows,
                      up ? up + row * kWidth + (p_.n + first) % kTileRows : nullptr);
        }
      }
    });
  }

 private:
  // For the step of FmaGemm: more than one row is filled up to it.
  int64_t padded_rows() const {
    return p_.rows == 1 ? 1 : round_up<int64_t>(p_.rows, FmaGemm<float>::kRowsPerStep);
  }

  // x in float32, normalized if asked for, and what the product makes of it.
  void take_x() {
    if (reencoded_) {
      reencoded_->take(p_.rows, p_.dtype);
      in_floats_ = scratch_.take<bool>(p_.rows);
    }
    x_ = scratch_.take<float>(padded_rows(), layout_.columns);
    memset(x_ + p_.rows * layout_.columns, 0,
           (padded_rows() - p_.rows) * layout_.columns * sizeof(float));
    parallel_for(0, p_.rows, row_grain(p_.k), [&](int64_t begin, int64_t end) {
      Scratch scratch;
      T* normed = p_.norm_weight ? scratch.take<T>(p_.k) : nullptr;
      for (int64_t row = begin; row < end; ++row) {
        const T* h = static_cast<const T*>(p_.x) + row * p_.x_row_stride;
        if (normed) {
          rms_norm_row(h, static_cast<const T*>(p_.norm_weight), normed, p_.k, p_.eps);
          h = normed;
        }
        float* x = x_ + row * layout_.columns;
        for_vectors(p_.k, [&](int64_t i, auto part) { store(x + i, load(h + i, part), part); });
        memset(x + p_.k, 0, (layout_.columns - p_.k) * sizeof(float));
        if (reencoded_) in_floats_[row] = !reencoded_->take_row(row, x);
      }
    });
  }

  // y[row][i] = x[row] . weight's row `first` + i, behind what the first tile has before that.
  void multiply(int64_t first, int64_t columns, float* y, Scratch& scratch) const {
    const int64_t tile = first / kTileRows;
    const int64_t count = ceil_div(first + columns, kTileRows) - tile;
    const uint8_t* tiles = p_.w.packed + tile * layout_.tile_bytes;
    if (!reencoded_) {
      return floats_.multiply(tiles, count, x_, layout_.columns, padded_rows(), y, kWidth, scratch);
    }
    reencoded_->multiply(tiles, count, y, kWidth);
    for (int64_t i = 0; i < count; ++i, y += kTileRows, tiles += layout_.tile_bytes) {
      for (int64_t row = 0; row < p_.rows; ++row) correct(tiles, row, y + row * kWidth, scratch);
    }
  }

  // In float32 what the other way could not.
  void correct(const uint8_t* tile, int64_t row, float* y, Scratch& scratch) const {
    bool finite = true;
    for (int i = 0; i < kTileRows; ++i) finite &= __builtin_isfinite(y[i]);
    if (finite && !in_floats_[row]) return;
    float exact[kTileRows];
    floats_.multiply(tile, 1, x_ + row * layout_.columns, layout_.columns, 1, exact, kTileRows,
                     scratch);
    for (int i = 0; i < kTileRows; ++i) {
      if (in_floats_[row] || !__builtin_isfinite(y[i])) y[i] = exact[i];
    }
  }

  const QuantizedLinearParams& p_;
  const PackedLayout& layout_;
  const LinearEnd<T> end_;
  const FloatProduct& floats_;
  ReencodedProduct* const reencoded_;  // null: there is none
  Scratch scratch_;
  float* x_ = nullptr;
  bool* in_floats_ = nullptr;
};

void run(const QuantizedLinearParams& p, const PackedLayout& layout, const FloatProduct& floats,
         ReencodedProduct* reencoded) {
  with_dtype(p.dtype, [&]<typename T>(Type<T>) {
    if constexpr (!__is_same(T, double)) Linear<T>(p, layout, floats, reencoded).run();
  });
}

// `count` of the rows, from `begin` on.
template <typename T>
QuantizedLinearParams rows_of(const QuantizedLinearParams& p, int64_t begin, int64_t count) {
  QuantizedLinearParams part = p;
  part.rows = count;
  part.x = static_cast<const T*>(p.x) + begin * p.x_row_stride;
  if (p.residual) {
    part.residual = static_cast<const T*>(p.residual) + begin * p.residual_row_stride;
  }
  if (p.row_mask) part.row_mask = p.row_mask + begin;
  part.out = static_cast<T*>(p.out) + begin * p.n;
  return part;
}

void multiply(const QuantizedLinearParams& p) {
  const PackedLayout layout(p.w);
  with_encoding(p.w.encoding, [&](auto encoding) {
    constexpr Encoding kEncoding = encoding.value;
    const DecodedProduct<kEncoding> floats(p.w, layout);
    const bool sixteen_bits = p.dtype != DType::kFloat32;
    if constexpr (kEncoding != Encoding::kFp8 && kEncoding != Encoding::kNf4) {
      if (sixteen_bits || p.int8_activations) {
        QuadProduct<kEncoding> quads(p.w, layout, p.int8_activations);
        return run(p, layout, floats, &quads);
      }
    } else {
#if defined(__AVX512BF16__) || defined(MLLAMA_QUAD_BLOCKS)
      if constexpr (kEncoding == Encoding::kNf4) {
        const IntegerTable table(p.w.table);
        if (sixteen_bits && table.is_enough(p.dtype)) {
          QuadProduct<kEncoding> quads(p.w, layout, false, &table);
          return run(p, layout, floats, &quads);
        }
      }
#endif
#ifdef __AVX512BF16__
      if (sixteen_bits && amx_available()) {
        PairProduct<kEncoding, true> pairs(p.w, layout);
        return run(p, layout, floats, &pairs);
      }
      if (sixteen_bits) {
        PairProduct<kEncoding, false> pairs(p.w, layout);
        return run(p, layout, floats, &pairs);
      }
#elif defined(MLLAMA_QUAD_BLOCKS)
      if constexpr (kEncoding == Encoding::kFp8) {
        if (sixteen_bits) {
          HalvesProduct halves(layout);
          return run(p, layout, floats, &halves);
        }
      }
#endif
    }
    run(p, layout, floats, nullptr);
  });
}

}  // namespace

void quantized_linear(const QuantizedLinearParams& p) {
  if (p.n == 0) return;
  with_dtype(p.dtype, [&]<typename T>(Type<T>) {
    for (int64_t row = 0; row < p.rows; row += kRowsTogether) {
      multiply(rows_of<T>(p, row, min(kRowsTogether, p.rows - row)));
    }
  });
}

}  // namespace mllama::MLLAMA_ISA
