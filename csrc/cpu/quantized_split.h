// A row of a quantised weight between its parts and what the packed planes hold of it: one code per
// column, and its scales and extras as elements in order.
#pragma once

#include "quantized_layout.h"

namespace mllama::MLLAMA_ISA {

// Codes are bytes: as stored for 8 bits, 0 to 15 or 63 for fewer; those behind k stay as they are.
struct SplitRow {
  uint8_t* codes;
  uint8_t *scales, *extras;
};

// f(code, byte, count): the codes from `code` on are the low halves of `count` bytes from `byte`
// on, and as many more their high halves. Of q4_0 and q4_k.
template <typename F>
MLLAMA_INLINE void for_nibbles(Encoding encoding, const F& f) {
  switch (encoding) {
    case Encoding::kQ4_0:
      return f(0, 0, 16);
    case Encoding::kQ4_K:
      for (int i = 0; i < 4; ++i) f(64 * i, 32 * i, 32);
      return;
    default:
      return;
  }
}

MLLAMA_INLINE void split_ggml_block(Encoding encoding, const uint8_t* b, const SplitRow& out) {
  switch (encoding) {
    case Encoding::kQ8_0:
      memcpy(out.scales, b, 2);
      memcpy(out.codes, b + 2, 32);
      return;
    case Encoding::kQ4_0:
      memcpy(out.scales, b, 2);
      b += 2;
      break;
    case Encoding::kQ4_K:
      memcpy(out.scales, b, 4);
      memcpy(out.extras, b + 4, 12);
      b += 16;
      break;
    default:  // q6_k
      memcpy(out.extras, b + 192, 16);
      memcpy(out.scales, b + 208, 2);
      for (int half = 0; half < 2; ++half) {
        const uint8_t *low = b + 64 * half, *high = b + 128 + 32 * half;
        uint8_t* codes = out.codes + 128 * half;
        for (int i = 0; i < 64; ++i) {
          const int shift = i / 32 * 2;
          codes[i] = (uint8_t)((low[i] & 15) | ((high[i % 32] >> shift) & 3) << 4);
          codes[64 + i] = (uint8_t)((low[i] >> 4) | ((high[i % 32] >> (4 + shift)) & 3) << 4);
        }
      }
      return;
  }
  for_nibbles(encoding, [&](int code, int byte, int count) {
    for (int i = 0; i < count; ++i) {
      out.codes[code + i] = b[byte + i] & 15;
      out.codes[code + count + i] = b[byte + i] >> 4;
    }
  });
}

MLLAMA_INLINE void join_ggml_block(Encoding encoding, const SplitRow& row, uint8_t* b) {
  switch (encoding) {
    case Encoding::kQ8_0:
      memcpy(b, row.scales, 2);
      memcpy(b + 2, row.codes, 32);
      return;
    case Encoding::kQ4_0:
      memcpy(b, row.scales, 2);
      b += 2;
      break;
    case Encoding::kQ4_K:
      memcpy(b, row.scales, 4);
      memcpy(b + 4, row.extras, 12);
      b += 16;
      break;
    default:  // q6_k
      memcpy(b + 192, row.extras, 16);
      memcpy(b + 208, row.scales, 2);
      for (int half = 0; half < 2; ++half) {
        uint8_t *low = b + 64 * half, *high = b + 128 + 32 * half;
        const uint8_t* codes = row.codes + 128 * half;
        for (int i = 0; i < 64; ++i) low[i] = (uint8_t)((codes[i] & 15) | codes[64 + i] << 4);
        for (int i = 0; i < 32; ++i) {
          high[i] = (uint8_t)(codes[i] >> 4 | (codes[32 + i] >> 4) << 2 |
                              (codes[64 + i] >> 4) << 4 | (codes[96 + i] >> 4) << 6);
        }
      }
      return;
  }
  for_nibbles(encoding, [&](int code, int byte, int count) {
    for (int i = 0; i < count; ++i) {
      b[byte + i] = (uint8_t)(row.codes[code + i] | row.codes[code + count + i] << 4);
    }
  });
}

// f(block of the row, the row's place in codes, scales and extras) for a ggml encoding.
template <typename F>
MLLAMA_INLINE void for_ggml_blocks(const QuantizedWeight& w, SplitRow row, const F& f) {
  const PackedLayout layout(w);
  const int64_t width = ggml_block(w.encoding), blocks = w.k / width;
  const int64_t scales = layout.scales.row_bytes() / blocks;
  const int64_t extras = layout.extras.row_bytes() / blocks;
  for (int64_t i = 0; i < blocks; ++i) {
    f(i * ggml_block_bytes(w.encoding), row);
    row.codes += width;
    row.scales += scales;
    row.extras += extras;
  }
}

MLLAMA_INLINE const uint8_t* part_row(const QuantizedWeight& w, const void* const* parts, int i,
                                      int64_t row) {
  return static_cast<const uint8_t*>(parts[i]) + row * part_row_bytes(w, i);
}
MLLAMA_INLINE uint8_t* part_row(const QuantizedWeight& w, void* const* parts, int i, int64_t row) {
  return static_cast<uint8_t*>(parts[i]) + row * part_row_bytes(w, i);
}

MLLAMA_INLINE void split_row(const QuantizedWeight& w, const void* const* parts, int64_t row,
                             const SplitRow& out) {
  const uint8_t* first = part_row(w, parts, 0, row);
  if (ggml_block(w.encoding) > 0) {
    for_ggml_blocks(w, out, [&](int64_t at, const SplitRow& block) {
      split_ggml_block(w.encoding, first + at, block);
    });
    return;
  }
  if (PackedLayout::has_bytes(w.encoding)) {
    memcpy(out.codes, first, w.k);
  } else {
    for (int64_t i = 0; i < w.k / 2; ++i) {
      out.codes[2 * i] = first[i] & 15;
      out.codes[2 * i + 1] = first[i] >> 4;
    }
  }
  memcpy(out.scales, part_row(w, parts, 1, row), part_row_bytes(w, 1));
  if (part_row_bytes(w, 2) > 0) {
    memcpy(out.extras, part_row(w, parts, 2, row), part_row_bytes(w, 2));
  }
}

MLLAMA_INLINE void join_row(const QuantizedWeight& w, const SplitRow& row, void* const* parts,
                            int64_t index) {
  uint8_t* first = part_row(w, parts, 0, index);
  if (ggml_block(w.encoding) > 0) {
    for_ggml_blocks(w, row, [&](int64_t at, const SplitRow& block) {
      join_ggml_block(w.encoding, block, first + at);
    });
    return;
  }
  if (PackedLayout::has_bytes(w.encoding)) {
    memcpy(first, row.codes, w.k);
  } else {
    for (int64_t i = 0; i < w.k / 2; ++i) {
      first[i] = (uint8_t)(row.codes[2 * i] | row.codes[2 * i + 1] << 4);
    }
  }
  memcpy(part_row(w, parts, 1, index), row.scales, part_row_bytes(w, 1));
  if (part_row_bytes(w, 2) > 0) {
    memcpy(part_row(w, parts, 2, index), row.extras, part_row_bytes(w, 2));
  }
}

}  // namespace mllama::MLLAMA_ISA
