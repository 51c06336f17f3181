// Host-side geometry of the attention main loop (attention.cuh). Plain C++, so that a test can call
// it.
#pragma once

#include <cstdint>

#include "../common.h"

namespace mllama {

// One thread block computes `rows` query rows and walks over blocks of `keys` keys.
struct AttentionTile {
  int rows, keys, warps;
};

// Rejected for 16 bits: 16 rows per warp (every key fragment then feeds one mma instead of two, and
// ldmatrix alone takes as long as the products), 128 keys (the scores would spill at head dim 128).
// float32 multiplies on the ordinary units; 32 keys keep head dim 128 under 99 KB of shared memory.
constexpr AttentionTile attention_tile(int64_t element_bytes) {
  return element_bytes == 2 ? AttentionTile{128, 64, 4} : AttentionTile{64, 32, 4};
}

// Bytes from one row of a tile in shared memory to the next. Rows of 128 and 256 bytes are
// swizzled; others get 16 bytes more, which puts eight rows on distinct 16-byte bank groups.
constexpr bool attention_tile_swizzled(int64_t head_dim, int64_t element_bytes) {
  return element_bytes == 2 && head_dim * element_bytes % 128 == 0;
}
constexpr int64_t attention_tile_stride(int64_t head_dim, int64_t element_bytes) {
  return head_dim * element_bytes + (attention_tile_swizzled(head_dim, element_bytes) ? 0 : 16);
}

// Shared memory of one thread block: query tile, key tile, value tile and, for float32, the
// weights.
constexpr int64_t attention_shared_bytes(int64_t head_dim, int64_t element_bytes) {
  const AttentionTile tile = attention_tile(element_bytes);
  const int64_t weights = element_bytes == 2 ? 0 : tile.rows * (tile.keys + 4) * int64_t{4};
  return (tile.rows + 2 * tile.keys) * attention_tile_stride(head_dim, element_bytes) + weights;
}

}  // namespace mllama
