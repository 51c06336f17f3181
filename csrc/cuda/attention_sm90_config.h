// Host-side geometry of the sm_90a attention core (attention_sm90.cuh). Plain C++: a test can call
// it.
#pragma once

#include <cstdint>

#include "../common.h"

namespace mllama {

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
//   176   10 blocks, 9.9 % more  no room for the totals of parts beside rings of such tiles
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

}  // namespace mllama
