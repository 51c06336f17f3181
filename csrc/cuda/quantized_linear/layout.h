// Where a packed weight has what. Rows are packed by eights, since a half of m16n8k16's A operand
// has eight, and each half of a tile may be another eight (SwiGLU: of the gate and of the up rows).
//
//   packed   [eight of rows][block of columns], then the eight's scales of rows (int8, fp8)
//   block    [part of 64 columns] codes, then scales of the whole block: 64 columns, or 256 where
//   64
//            would not make whole 16 bytes of scales. Missing rows and columns are zeros.
//   part     [lane][16 codes] for 4 and 8 bits, what a warp's 32 lanes multiply by one load each:
//            lane l has row l / 4 and, of each 32 columns g, the columns 4 j + {0..3} and
//            16 + 4 j + {0..3}, j = l % 4: the first four belong to one product of 16 columns, the
//            others to the next, so that a product never crosses q6_k's scales of 16.
//
// Element (g, h, i) of a lane, column 32 g + 16 h + 4 j + i, pair p = 2 h + i / 2, e = i % 2:
//   8 bits   byte i / 2 + 2 e of word 2 g + h: a mask leaves a pair as two 16-bit halves
//   4 bits   bits 4 p + 16 e of word g, likewise; with a table bits 8 p + 4 e: a byte is a pair
//   6 bits   4 bits as above, then [lane] one word: bits 4 p + 2 g + 16 e
// Scales of a block: q8_0, q4_0 [row][32 columns] fp16; nf4, fp4 [row] float32; int4
// [part, or two of 128 columns][row][group] scales, then likewise zeros; q6_k [part][row][16
// columns] int8, then [row] fp16; q4_k [part][row] low 16 and [part][row] high 8 bits of (scale,
// minimum) of two 32 columns, 6 bits each, then [row] the pair of fp16. int8, fp8 [row] float32
// behind the eight's blocks; fp8 once more, NaN in place of the scale of a row that holds a NaN.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../../quantized_linear.h"

namespace mllama {

constexpr int kEight = kQuantizedTileRowsCuda;  // rows packed together
static_assert(kEight == 8, "half of a product's A operand");
constexpr int kPartColumns = 64;  // columns of a part

constexpr int kLowBytes = kEight * kPartColumns / 2;  // of a part's 4-bit codes

constexpr bool has_table(Encoding e) { return e == Encoding::kNf4 || e == Encoding::kFp4; }
constexpr bool has_row_scale(Encoding e) { return e == Encoding::kInt8 || e == Encoding::kFp8; }

// What a kernel is compiled for: q4_0, q4_k and int4 differ in their scales alone, nf4 and fp4 not
// at all.
enum class Family { kInt8, kFp8, kQ8_0, kQ6_K, kInt4, kTable4 };

constexpr Family family_of(Encoding e) {
  switch (e) {
    case Encoding::kInt8:
      return Family::kInt8;
    case Encoding::kFp8:
      return Family::kFp8;
    case Encoding::kQ8_0:
      return Family::kQ8_0;
    case Encoding::kQ6_K:
      return Family::kQ6_K;
    case Encoding::kQ4_0:
    case Encoding::kQ4_K:
    case Encoding::kInt4:
      return Family::kInt4;
    default:
      return Family::kTable4;
  }
}

constexpr bool has_integer_codes(Family family) {
  for (int32_t e = 0; e <= static_cast<int32_t>(Encoding::kFp4); ++e) {
    if (family_of(static_cast<Encoding>(e)) == family) {
      return has_integer_codes(static_cast<Encoding>(e));
    }
  }
  return false;
}

// Bits of a code: 8, 6 or 4.
constexpr int code_bits(Encoding e) {
  return has_row_scale(e) || e == Encoding::kQ8_0 ? 8 : e == Encoding::kQ6_K ? 6 : 4;
}
constexpr int block_columns(Encoding e) {
  return e == Encoding::kQ6_K || e == Encoding::kQ4_K || e == Encoding::kInt4 ? 256 : kPartColumns;
}
constexpr int block_parts(Encoding e) { return block_columns(e) / kPartColumns; }
// Bytes of codes of eight rows x 64 columns.
constexpr int part_bytes(Encoding e) { return kEight * kPartColumns / 8 * code_bits(e); }
constexpr int code_bytes(Encoding e) { return block_parts(e) * part_bytes(e); }

// int4: scales of a row of a block.
constexpr int int4_row_scales(int group) { return 256 / group; }
// int4: where the scale of a row's group, counted within the block, is among those of the block.
constexpr int int4_scale_index(int group, int row, int index) {
  const int pairs = group == 32 ? 1 : 0;  // a part has two
  return (((index >> pairs) * kEight + row) << pairs) + (index & pairs);
}

constexpr int64_t block_bytes(const QuantizedWeight& w) {
  const int codes = code_bytes(w.encoding);
  switch (w.encoding) {
    case Encoding::kInt4:
      return codes + kEight * int4_row_scales(w.group) *
                         (plane_type_size(w.scale) + plane_type_size(w.zero));
    case Encoding::kQ6_K:
      return codes + kEight * 18;
    case Encoding::kQ4_K:
      return codes + kEight * 16;
    case Encoding::kInt8:
    case Encoding::kFp8:
      return codes;
    default:
      return codes + kEight * 4;
  }
}

constexpr int64_t row_scale_bytes(Encoding e) {
  return e == Encoding::kFp8 ? kEight * 8 : e == Encoding::kInt8 ? kEight * 4 : 0;
}
constexpr int64_t blocks_of_row(const QuantizedWeight& w) {
  return ceil_div<int64_t>(w.k, block_columns(w.encoding));
}
constexpr int64_t eight_bytes(const QuantizedWeight& w) {
  return blocks_of_row(w) * block_bytes(w) + row_scale_bytes(w.encoding);
}

// Where column 4 j + c, c = 32 g + 16 h + i, of a lane is: the byte of its words and the bit of
// that.
struct CodePlace {
  int byte, bit;
};
constexpr CodePlace code_place(Encoding e, int row, int column) {
  const int g = column / 32, h = column / 16 % 2, i = column % 4, lane = row * 4 + column / 4 % 4;
  if (code_bits(e) == 8) return {lane * 16 + (2 * g + h) * 4 + i / 2 + i % 2 * 2, 0};
  const int pair = 2 * h + i / 2;
  const int bit = has_table(e) ? 8 * pair + i % 2 * 4 : 4 * pair + i % 2 * 16;
  return {lane * 8 + g * 4 + bit / 8, bit % 8};
}
// Of q6_k: of the two high bits.
constexpr CodePlace high_place(int row, int column) {
  const int g = column / 32, h = column / 16 % 2, i = column % 4, lane = row * 4 + column / 4 % 4;
  const int bit = 4 * (2 * h + i / 2) + 2 * g + i % 2 * 16;
  return {kLowBytes + lane * 4 + bit / 8, bit % 8};
}

}  // namespace mllama
