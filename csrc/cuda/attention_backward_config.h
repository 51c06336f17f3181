// Host-side geometry of the attention gradients (attention_backward.cuh). Plain C++: a test can
// call it.
#pragma once

#include <cstdint>

#include "attention_config.h"

namespace mllama {

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

// On sm_90a (attention_backward_sm90.cuh); four warps more copy.
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
