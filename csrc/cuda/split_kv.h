// Decode attention with the keys of a sequence split over thread blocks: geometry and launches. The
// geometry depends on capacities alone, never on lengths, batch size or the number of
// multiprocessors: a sequence's result is the same bit for bit in any batch and on any device, and
// a captured launch stays valid while sequences grow. Splits beyond a sequence's length, known to
// the device alone, exit at once.
#pragma once

#include <cstdint>

#include "../cross_attention.h"
#include "../rotary_attention.h"

namespace mllama {

// Query heads per key/value head that one block takes: the rows of one m16n8k16 product.
constexpr int64_t kSplitKvMaxGroup = 16;

struct SplitGeometry {
  int64_t splits;      // per sequence and key/value head
  int64_t split_size;  // keys; a multiple of 16
};

// Splits of a sequence that may grow to `capacity` keys. Small splits fill the device at batch 1;
// large ones keep the partial results (head_dim + 2 floats per query head, written and read back)
// at 1.6 % (512) and 0.4 % (2048) of the keys and values read, for 16 bits and groups of 4.
constexpr SplitGeometry paged_splits(int64_t capacity) {
  const int64_t size = capacity <= 4096 ? 256 : capacity <= 32768 ? 512 : 2048;
  return {ceil_div(capacity, size), size};
}

// Equal splits of one image tile of `tokens` keys. No split reaches into the next tile, so a hidden
// tile hides whole splits. 1601 tokens: 4 x 416, 128 blocks for 4 tiles and 8 heads, one wave.
constexpr SplitGeometry tile_splits(int64_t tokens) {
  const int64_t size = round_up(ceil_div(tokens, ceil_div(tokens, int64_t{512})), int64_t{16});
  return {ceil_div(tokens, size), size};
}

// Partial outputs and their statistics (maximum, sum), float32.
constexpr int64_t split_kv_workspace(int64_t batch, int64_t num_q_heads, int64_t splits,
                                     int64_t head_dim) {
  return batch * num_q_heads * splits * (head_dim + 2) * int64_t{4};
}

// Whether the launches below take a call; they need one query row per sequence.
constexpr bool uses_split_kv(const RotaryAttentionParams& p) {
  return p.page_table != nullptr && p.max_seqlen == 1 &&
         p.num_q_heads / p.num_kv_heads <= kSplitKvMaxGroup;
}
constexpr bool uses_split_kv(const CrossAttentionParams& p) {
  return p.max_seqlen == 1 && p.num_q_heads / p.num_kv_heads <= kSplitKvMaxGroup;
}

// Attention alone, over keys that are in the cache already; rows of `out` that belong to no
// sequence get zeros. The workspace is that of the geometry above. Both return a cudaError_t.
int64_t rotary_decode_workspace(const RotaryAttentionParams& p);
int rotary_decode_cuda(const RotaryAttentionParams& p, CUstream_st* stream);
int64_t cross_decode_workspace(const CrossAttentionParams& p);
int cross_decode_cuda(const CrossAttentionParams& p, CUstream_st* stream);

}  // namespace mllama
