// Host-side geometry of the attention main loop (attention.cuh). Plain C++: a test can call it.
#pragma once

#include <cstdint>

#include "../common.h"

namespace mllama {

// One thread block computes `rows` query rows and walks over blocks of `keys` keys.
struct AttentionTile {
  int rows, keys, warps;
};

// Two key blocks are in shared memory at a time: one in use, one arriving.
constexpr int kAttentionStages = 2;

// `hides_rows`: the mask may hide whole key blocks from single rows (attention.cuh), which takes
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

}  // namespace mllama
