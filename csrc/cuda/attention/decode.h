// Decode attention with the keys of a sequence split over thread blocks: geometry. How
// keys are summed up depends on capacities alone, never on lengths, batch size or the number of
// multiprocessors: a sequence's result is the same bit for bit in any batch, and a captured launch
// stays valid while sequences grow. Splits beyond a sequence's length, known to the device alone,
// exit at once.
//
// Two implementations: splits merged by a second kernel (decode_split.cuh; any device and dtype),
// and clusters of blocks that merge in one launch (decode_cluster.cuh; sm_90a and 16 bits).
#pragma once

#include <cstdint>

#include "../../common.h"

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

// ---- clusters

// The chunks of kChunkKeys keys of a sequence are dealt to strands: chunk i is of strand i mod
// kStrands. A strand is one warp's work, its chunks in order, and the strands are merged in a fixed
// order. Which block computes which strand has no influence on the result, so the number of blocks
// may follow the batch.
constexpr int kChunkKeys = 16;
constexpr int kStrands = 64;
// Query heads per key/value head: more would leave room for one block per multiprocessor only.
constexpr int64_t kClusterMaxGroup = 8;
// A block lists the image tiles that its row sees in shared memory.
constexpr int64_t kClusterMaxTiles = 8192;

// Blocks of the cluster that serves one sequence and key/value head, given how many of these pairs
// there are: as many as an H100 or H200 (132 multiprocessors) runs at a time, two to each, but 4 at
// least (8 for groups over 4), because each keeps its part of all strands' results. A device that
// cannot hold such clusters gets smaller ones.
//
//   batch  heads  keys   blocks              chunks per warp
//   1      8      1k     8 x 16 = 128        1
//   1      8      8k     8 x 16 = 128        8
//   1      8      32k    8 x 16 = 128        32
//   32     8      4k     256 x 4 = 1024      16
//   1      8      6404 (4 image tiles)  128  6 or 7
constexpr int64_t cluster_blocks(int64_t pairs, int64_t group) {
  constexpr int64_t kResident = 2 * 132;
  const int64_t least = group <= 4 ? 4 : 8;
  int64_t blocks = 16;
  while (blocks > least && pairs * blocks > kResident) blocks /= 2;
  return blocks;
}

// Every block of the cluster merges and stores this many quads of the group's output elements, a
// power of two so that finding the block of a quad is a shift.
constexpr int64_t cluster_slice_log2(int64_t group, int64_t head_dim, int64_t blocks) {
  int64_t log2 = 0;
  while ((blocks << log2) < group * head_dim / 4) ++log2;
  return log2;
}

// Shared memory that the results of all strands take in one block; the odd pitches keep banks
// apart.
constexpr int64_t cluster_merge_bytes(int64_t group, int64_t slice_log2) {
  const int64_t quads = (int64_t{1} << slice_log2) | 1;
  return kStrands * quads * 16 + group * (kStrands + 1) * 8;
}

constexpr bool fits_cluster(DType dtype, int64_t num_q_heads, int64_t num_kv_heads) {
  return element_size(dtype) == 2 && num_q_heads / num_kv_heads <= kClusterMaxGroup;
}

}  // namespace mllama
