// Host-side geometry of the attention cores: of the forward on sm_80 (core_sm80.cuh) and sm_90a
// (core_sm90.cuh), and of the gradients on both (backward_sm80.cuh). Plain C++: a test can call it.
#pragma once

#include <cstdint>

#include "../../common.h"

namespace mllama {

// What a mask's next() answers when no block of keys is left.
constexpr int kNoBlock = 0x7fffffff;

// Sequences are counted in int; this leaves room for the last block.
constexpr int64_t kMaxAttentionRows = INT32_MAX - 1024;

// ---- sm_80

// One thread block computes `rows` query rows and walks over blocks of `keys` keys.
struct AttentionTile {
  int rows, keys, warps;
};

// Two key blocks are in shared memory at a time: one in use, one arriving.
constexpr int kAttentionStages = 2;

// `hides_rows`: the mask may hide whole key blocks from single rows (core_sm80.cuh), which takes
// more registers.
//
//   bits  head dim  rows x keys  rejected
//   16    64, 80    128 x 64     64 rows (16 per warp): every key fragment feeds one product, not
//                                two, and ldmatrix takes as long as the products. 128 keys: spills
//   16    128       128 x 32     128 x 64: 3 to 13 registers spill
//   32    all       64 x 16      64 x 32: 110 KB at head dim 128; sm_86 and sm_89 allow 99 KB
constexpr AttentionTile attention_tile(int64_t head_dim, int64_t element_bytes, bool hides_rows) {
  if (element_bytes != 2) return {64, 16, 4};
  return head_dim > 80 || hides_rows ? AttentionTile{128, 32, 4} : AttentionTile{128, 64, 4};
}

// Bytes from one row of a tile in shared memory to the next. Rows of 128 and 256 bytes are
// swizzled; others get 16 bytes more, which puts eight rows on distinct 16-byte bank groups.
constexpr bool attention_tile_swizzled(int64_t head_dim, int64_t element_bytes) {
  return element_bytes == 2 && head_dim * element_bytes % 128 == 0;
}
constexpr int64_t attention_tile_stride(int64_t head_dim, int64_t element_bytes) {
  return head_dim * element_bytes + (attention_tile_swizzled(head_dim, element_bytes) ? 0 : 16);
}

// Shared memory of one thread block: query tile, stages of a key and a value tile each and, for
// float32, the weights.
constexpr int64_t attention_shared_bytes(int64_t head_dim, int64_t element_bytes, bool hides_rows) {
  const AttentionTile tile = attention_tile(head_dim, element_bytes, hides_rows);
  const int64_t weights = element_bytes == 2 ? 0 : tile.rows * (tile.keys + 8) * int64_t{4};
  return (tile.rows + 2 * kAttentionStages * tile.keys) *
             attention_tile_stride(head_dim, element_bytes) +
         weights;
}

// ---- sm_90a

// One thread block computes `rows` query rows, 64 per warpgroup, and walks over blocks of `keys`
// keys.
struct AttentionSm90Tile {
  int rows, keys;
};

constexpr int kAttentionSm90Stages = 2;  // of K, and of V

// Keys per block for paged and causal attention: a multiple of every tensor-copy box that a page
// allows, and little is masked on the diagonal.
//
//   keys  registers of scores, weights and output at head dim 128
//   128   64 + 32 + 64, of 232
//   176   88 + 44 + 64: a quarter more to mask on the diagonal, and boxes of 32 rows do not fit
constexpr AttentionSm90Tile kCausalSm90Tile{128, 128};

// Keys per block for dense attention.
//
//   head dim  keys  registers of scores, weights and output, of 232
//   80        176   88 + 44 + 40. 6432 tokens are 36.5 blocks
//   64, 128   128   64 + 32 + 32 or 64
constexpr AttentionSm90Tile dense_sm90_tile(int64_t head_dim) {
  return {128, head_dim == 80 ? 176 : 128};
}

// Keys per block for image tiles, whose last block reaches beyond the tile.
//
//   keys  1601 keys take       rejected
//   128   13 blocks, 3.9 % more
//   96    17 blocks, 1.9 % more  a third more rescaling, barriers and waits per key
//   176   10 blocks, 9.9 % more  no room for the totals of segments beside rings of such tiles
constexpr AttentionSm90Tile kCrossSm90Tile{128, 128};

// Bytes of a panel's rows: what one swizzle pattern spans. Operands lie in shared memory as panels
// of rows; a head dim of 80 (160 bytes) divides into no wider ones than 32 bytes.
constexpr int attention_sm90_panel_bytes(int64_t head_dim) {
  return head_dim * 2 % 128 == 0 ? 128 : 32;
}

// Rows of one tensor copy from pages: it must stay in its page and fill part of a block.
constexpr int64_t page_box_rows(int64_t page_size, int64_t block_keys) {
  const int64_t power = page_size & -page_size;
  return power < block_keys ? power : block_keys;
}

// ---- gradients

// One thread block holds `rows` rows of queries (or keys) and walks over blocks of `columns` keys
// (or queries); a warp has 16 rows.
struct AttentionBackwardTile {
  int rows, columns, warps;
};

// Shared memory stays below the 99 KB of sm_86 and sm_89.
//
//   bits  head dim  rows x columns  rejected
//   16    64, 80    128 x 64
//   16    128       128 x 32        128 x 64: 129 KB. 64 x 64: 4 warps are too few for a
//                                   multiprocessor that has room for one block
//   32    all       32 x 16         64 x 16: 105 KB at head dim 128
constexpr AttentionBackwardTile attention_backward_tile(int64_t head_dim, int64_t element_bytes) {
  if (element_bytes != 2) return {32, 16, 2};
  return {128, head_dim > 80 ? 32 : 64, 8};
}

// On sm_90a (backward_sm90.cuh); four warps more copy.
//
//   rows x columns  rejected
//   128 x 64        128 columns: 256 registers of sums and scores at head dim 128
constexpr AttentionBackwardTile kBackwardSm90Tile{128, 64, 8};

// Shared memory of one thread block: two tiles of its rows, stages of two tiles and the row
// statistics each and, for float32, the weights.
constexpr int64_t attention_backward_shared_bytes(int64_t head_dim, int64_t element_bytes) {
  const AttentionBackwardTile tile = attention_backward_tile(head_dim, element_bytes);
  const int64_t weights = element_bytes == 2 ? 0 : tile.rows * (tile.columns + 8) * int64_t{4};
  return 2 * (tile.rows + kAttentionStages * tile.columns) *
             attention_tile_stride(head_dim, element_bytes) +
         kAttentionStages * tile.columns * int64_t{8} + weights;
}

}  // namespace mllama
