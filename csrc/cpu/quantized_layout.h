// Where the packed form of a quantised weight has what.
//
// Lanes are rows: a tile of 16 rows is contiguous, its planes one after the other, and in a plane
// the same element of all 16 rows stands together, in the order of the columns. So a vector holds
// one column, or a pair of neighbouring ones, of 16 rows (8 with AVX2), a product needs no sum
// across lanes, and the scales of 16 rows are unpacked at once. Rows and columns are filled up with
// zeros, to 16 and to 32.
//   codes   of 8 bits: 32-bit words of 4 columns; integers with 128 added, so that they are
//   unsigned
//           of 4 bits (of q6_k the low four): 32-bit words of 8 columns; nibbles j and 4 + j are
//           the columns 2j and 2j + 1, so that a shift by 4j has the pair in the halves of the
//           word, and the low nibbles of the bytes are the columns 0, 4, 1, 5, the high ones 2, 6,
//           3, 7
//   high    of q6_k, its upper two bits: 32-bit words of 16 columns; from bit 2t on, t below 4, the
//           bytes have the columns whose low bits are the t-th four bytes
//   scales  fp16 of each block (q4_k: d, then dmin), or the scales of rows or groups as they were
//   extras  q4_k: its 12 bytes of scales as three 32-bit words; q6_k: its 16 as four; int4: zeros
#pragma once

#include "../quantized_linear.h"
#include "common/simd.h"

namespace mllama::MLLAMA_ISA {

constexpr int64_t kTileRows = kQuantizedTileRowsCpu;

// The columns that a step of the kernels takes: a block or group is one of these or several.
constexpr int64_t kStepColumns = 32;

// How many elements of a plane a row has, and the bytes of one.
struct Elements {
  int64_t count, size;

  int64_t row_bytes() const { return count * size; }
};

// Of the 16 columns of a word of `high`: where the two bits of a column begin.
constexpr int high_shift(int column) {
  const int byte = column % 2 * 2 + column / 4 % 2, four = column / 8 * 2 + column / 2 % 2;
  return byte * 8 + four * 2;
}

struct PackedLayout {
  int64_t columns;  // k, filled up
  Elements codes, high, scales, extras;
  int64_t high_at, scales_at, extras_at;  // bytes from the tile's start
  int64_t tile_bytes, tiles, bytes;

  MLLAMA_INLINE bool has_bytes(Encoding encoding) {
    return encoding == Encoding::kQ8_0 || encoding == Encoding::kInt8 || encoding == Encoding::kFp8;
  }

  explicit PackedLayout(const QuantizedWeight& w)
      : columns(round_up(w.k, kStepColumns)), high{}, scales{}, extras{} {
    codes = has_bytes(w.encoding) ? Elements{columns / 4, 4} : Elements{columns / 8, 4};
    switch (w.encoding) {
      case Encoding::kQ8_0:
      case Encoding::kQ4_0:
        scales = {w.k / 32, 2};
        break;
      case Encoding::kQ4_K:
        scales = {w.k / 256 * 2, 2};
        extras = {w.k / 256 * 3, 4};
        break;
      case Encoding::kQ6_K:
        high = {w.k / 16, 4};
        scales = {w.k / 256, 2};
        extras = {w.k / 256 * 4, 4};
        break;
      case Encoding::kInt8:
      case Encoding::kFp8:
        scales = {1, 4};
        break;
      case Encoding::kInt4:
        scales = {w.k / w.group, plane_type_size(w.scale)};
        extras = {w.k / w.group, plane_type_size(w.zero)};
        break;
      case Encoding::kNf4:
      case Encoding::kFp4:
        scales = {w.k / w.group, 4};
        break;
    }
    high_at = plane_bytes(codes);
    scales_at = high_at + plane_bytes(high);
    extras_at = scales_at + plane_bytes(scales);
    tile_bytes = extras_at + plane_bytes(extras);
    tiles = ceil_div(w.n, kTileRows);
    bytes = tiles * tile_bytes;
  }

 private:
  MLLAMA_INLINE int64_t plane_bytes(const Elements& e) {
    return round_up<int64_t>(e.row_bytes() * kTileRows, 64);
  }
};

}  // namespace mllama::MLLAMA_ISA
