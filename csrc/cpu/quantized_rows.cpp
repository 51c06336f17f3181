// quantized_rows: rows of a quantised weight, decoded and rounded to the dtype.
// Threads    rows by id, or tiles of 16 neighbouring rows.
// Traffic    neighbouring rows: packed once, out once; a row alone costs the reading of its tile.
#include "common/dtypes.h"
#include "common/scratch.h"
#include "ops.h"
#include "quantized_decode.h"

namespace mllama::MLLAMA_ISA {
namespace {

template <typename T, Encoding kEncoding>
class Rows {
 public:
  explicit Rows(const QuantizedRowsParams& p) : p_(p), layout_(p.w), decoder_(p.w, layout_) {}

  void by_id() const {
    parallel_for(0, p_.rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) decode(p_.ids[i], p_.ids[i] + 1, i);
    });
  }

  void neighbours() const {
    const int64_t first = p_.begin / kTileRows, last = p_.begin + p_.rows;
    parallel_for(first, ceil_div(last, kTileRows), 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t row = max(tile * kTileRows, p_.begin);
        decode(row, min((tile + 1) * kTileRows, last), row - p_.begin);
      }
    });
  }

 private:
  // Rows begin to end, of one tile, to the rows of out from `to` on.
  void decode(int64_t begin, int64_t end, int64_t to) const {
    const uint8_t* tile = p_.w.packed + begin / kTileRows * layout_.tile_bytes;
    const int64_t tile_row = begin / kTileRows * kTileRows;
    float values[kStepColumns][kTileRows], row[kStepColumns];
    const int first = (int)((begin - tile_row) / kLanes * kLanes);
    for (int64_t column = 0; column < p_.w.k; column += kStepColumns) {
      for (int lane = first; lane < end - tile_row; lane += kLanes) {
        decoder_.columns(tile, column / kStepColumns, lane,
                         [&](int k, FVec v) { store(values[k] + lane, v); });
      }
      const int64_t count = min(kStepColumns, p_.w.k - column);
      for (int64_t r = begin; r < end; ++r) {
        T* out = static_cast<T*>(p_.out) + (to + r - begin) * p_.w.k + column;
        for (int64_t k = 0; k < kStepColumns; ++k) row[k] = values[k][r - tile_row];
        for_vectors(count, [&](int64_t i, auto part) { store(out + i, load(row + i), part); });
      }
    }
  }

  const QuantizedRowsParams& p_;
  const PackedLayout layout_;
  const Decoder<kEncoding> decoder_;
};

}  // namespace

void quantized_rows(const QuantizedRowsParams& p) {
  with_dtype(p.dtype, [&]<typename T>(Type<T>) {
    if constexpr (!__is_same(T, double)) {
      with_encoding(p.w.encoding, [&](auto encoding) {
        const Rows<T, encoding.value> rows(p);
        p.ids ? rows.by_id() : rows.neighbours();
      });
    }
  });
}

}  // namespace mllama::MLLAMA_ISA
