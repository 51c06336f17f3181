// quantized_pack, quantized_unpack: the parts of a quantised weight to the planes of
// quantized_layout.h, and back.
// Threads    tiles of 16 rows.
// Steps      rows to codes and scales, in cache; these, 16 rows together, to the planes.
// Traffic    parts once, packed once.
#include "common/scratch.h"
#include "ops.h"
#include "quantized_split.h"

namespace mllama::MLLAMA_ISA {
namespace {

// One word of a plane out of the codes of its columns, and these out of the word.
template <uint32_t kAdded>  // to each, without a carry
struct Bytes {
  using Word = uint32_t;
  static constexpr int64_t kColumns = 4;
  static Word join(const uint8_t* codes) {
    Word word;
    memcpy(&word, codes, sizeof(word));
    return word ^ kAdded;
  }
  static void split(Word word, uint8_t* codes) {
    word ^= kAdded;
    memcpy(codes, &word, sizeof(word));
  }
};
using Integers = Bytes<0x80808080>;  // 128 more or less of 8 bits: the highest turned over
using Floats = Bytes<0>;

struct Nibbles {
  using Word = uint32_t;
  static constexpr int64_t kColumns = 8;
  static Word join(const uint8_t* codes) {
    Word word = 0;
    for (int i = 0; i < 8; ++i) word |= (Word)(codes[i] & 15) << shift(i);
    return word;
  }
  static void split(Word word, uint8_t* codes) {
    for (int i = 0; i < 8; ++i) codes[i] = (uint8_t)((word >> shift(i)) & 15);
  }

 private:
  static constexpr int shift(int i) { return i % 2 * 16 + i / 2 * 4; }
};

// Of 6 bits the upper two. split() comes after that of the nibbles.
struct UpperBits {
  using Word = uint32_t;
  static constexpr int64_t kColumns = 16;
  static Word join(const uint8_t* codes) {
    Word word = 0;
    for (int i = 0; i < 16; ++i) word |= (Word)(codes[i] >> 4) << high_shift(i);
    return word;
  }
  static void split(Word word, uint8_t* codes) {
    for (int i = 0; i < 16; ++i) codes[i] |= (uint8_t)(((word >> high_shift(i)) & 3) << 4);
  }
};

// The codes, scales and extras of a tile's rows, row by row.
class TileRows {
 public:
  explicit TileRows(const PackedLayout& layout)
      : layout_(layout),
        codes_(scratch_.take<uint8_t>(kTileRows * layout.columns)),
        scales_(scratch_.take<uint8_t>(kTileRows * layout.scales.row_bytes())),
        extras_(scratch_.take<uint8_t>(kTileRows * layout.extras.row_bytes())) {}

  SplitRow row(int64_t i) const {
    return {codes_ + i * layout_.columns, scales_ + i * layout_.scales.row_bytes(),
            extras_ + i * layout_.extras.row_bytes()};
  }

  void clear(int64_t i) const {
    memset(row(i).codes, 0, layout_.columns);
    memset(row(i).scales, 0, layout_.scales.row_bytes());
    memset(row(i).extras, 0, layout_.extras.row_bytes());
  }

  void to_planes(Encoding encoding, uint8_t* tile) const {
    if (encoding == Encoding::kFp8) {
      join_codes<Floats>(tile);
    } else if (PackedLayout::has_bytes(encoding)) {
      join_codes<Integers>(tile);
    } else {
      join_codes<Nibbles>(tile);
      if (layout_.high.count > 0) join_codes<UpperBits>(tile + layout_.high_at);
    }
    for_elements(
        [&](uint8_t* element, int64_t at, int64_t size) { memcpy(tile + at, element, size); });
  }

  void from_planes(Encoding encoding, const uint8_t* tile) const {
    if (encoding == Encoding::kFp8) {
      split_codes<Floats>(tile);
    } else if (PackedLayout::has_bytes(encoding)) {
      split_codes<Integers>(tile);
    } else {
      split_codes<Nibbles>(tile);
      if (layout_.high.count > 0) split_codes<UpperBits>(tile + layout_.high_at);
    }
    for_elements(
        [&](uint8_t* element, int64_t at, int64_t size) { memcpy(element, tile + at, size); });
  }

 private:
  template <typename Plane>
  void join_codes(uint8_t* plane) const {
    typename Plane::Word words[kTileRows];
    for (int64_t c = 0; c < layout_.columns; c += Plane::kColumns) {
      for (int64_t r = 0; r < kTileRows; ++r) words[r] = Plane::join(row(r).codes + c);
      memcpy(plane, words, sizeof(words));
      plane += sizeof(words);
    }
  }

  template <typename Plane>
  void split_codes(const uint8_t* plane) const {
    typename Plane::Word words[kTileRows];
    for (int64_t c = 0; c < layout_.columns; c += Plane::kColumns) {
      memcpy(words, plane, sizeof(words));
      for (int64_t r = 0; r < kTileRows; ++r) Plane::split(words[r], row(r).codes + c);
      plane += sizeof(words);
    }
  }

  // f(an element of a row, its place in the tile, its size) for all scales and extras.
  template <typename F>
  void for_elements(const F& f) const {
    for (int64_t r = 0; r < kTileRows; ++r) {
      for (int64_t i = 0; i < layout_.scales.count; ++i) {
        const int64_t size = layout_.scales.size;
        f(row(r).scales + i * size, layout_.scales_at + (i * kTileRows + r) * size, size);
      }
      for (int64_t i = 0; i < layout_.extras.count; ++i) {
        const int64_t size = layout_.extras.size;
        f(row(r).extras + i * size, layout_.extras_at + (i * kTileRows + r) * size, size);
      }
    }
  }

  const PackedLayout& layout_;
  Scratch scratch_;
  uint8_t *codes_, *scales_, *extras_;
};

}  // namespace

void quantized_pack(const QuantizedPackParams& p) {
  const PackedLayout layout(p.w);
  parallel_for(0, layout.tiles, 1, [&](int64_t begin, int64_t end) {
    const TileRows rows(layout);
    for (int64_t tile = begin; tile < end; ++tile) {
      uint8_t* packed = p.packed + tile * layout.tile_bytes;
      memset(packed, 0, layout.tile_bytes);  // planes may end before a line does
      for (int64_t r = 0; r < kTileRows; ++r) {
        const int64_t row = tile * kTileRows + r;
        if (row >= p.w.n || layout.columns > p.w.k) rows.clear(r);
        if (row < p.w.n) split_row(p.w, p.parts, row, rows.row(r));
      }
      rows.to_planes(p.w.encoding, packed);
    }
  });
}

void quantized_unpack(const QuantizedUnpackParams& p) {
  const PackedLayout layout(p.w);
  parallel_for(0, layout.tiles, 1, [&](int64_t begin, int64_t end) {
    const TileRows rows(layout);
    for (int64_t tile = begin; tile < end; ++tile) {
      rows.from_planes(p.w.encoding, p.w.packed + tile * layout.tile_bytes);
      for (int64_t r = 0; r < kTileRows && tile * kTileRows + r < p.w.n; ++r) {
        join_row(p.w, rows.row(r), p.parts, tile * kTileRows + r);
      }
    }
  });
}

}  // namespace mllama::MLLAMA_ISA
