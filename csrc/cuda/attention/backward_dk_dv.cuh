// Gradients of a tile of keys and values: backward_sm80.cuh, kernel 2. A warp has 16 keys; the
// query rows that see them arrive in blocks by cp.async, one block while the other is in use, with
// one barrier per block. The query heads of a group are rows of one sequence
// (queries.cuh), so a key's sums over heads are part of its sums over rows.
//
// Shared memory  ldmatrix brings 5 fragments of 16 x 16 for 8 products of m16n8k16 at head dim 128:
//                at 128 bytes a clock that takes as long as the products of an A100 at 80 % of
//                their peak.
#pragma once

#include "backward_sm80.cuh"
#include "keys_sm80.cuh"

namespace mllama {

// The block's keys: row i at base + i * stride for i < count.
template <typename T>
struct KeyTile {
  const T* k;
  const T* v;
  int64_t k_stride, v_stride;
  int count;
};

// The query rows of one sequence, in blocks (add_up_keys below).
template <typename Config>
struct SequenceQueries {
  using T = typename Config::T;
  const BackwardRows<T>& rows;

  __device__ __forceinline__ bool find(int block, int offset, const T*& q, const T*& grad_out,
                                       const float2*& statistics) const {
    const int row = block * Config::kBlockN + offset;
    if (!rows.valid(row)) return false;
    q = rows.q_row(row);
    grad_out = rows.grad_row(row);
    statistics = rows.statistics + row;
    return true;
  }
};

// Adds up the gradients of a tile of keys; all threads of the block call it. Sums of keys behind
// `count` are meaningless. On sm_90a only threads
// that get sums return. The policies:
//
//   Rows    bool find(int block, int row, const T*& q, const T*& grad_out, const float2*& stats):
//           where row `row` of the block that next() gave last lies; false: nowhere, and what the
//           pointers then say is not read. The lanes of a warp ask for different rows.
//   Mask    as in core_sm80.cuh, with keys as rows and query rows as columns: next(), enter(),
//           visible(). A row that find() did not find counts for nothing, masked or not.
template <typename Config, typename Rows, typename Mask>
  requires(!Config::kSm90)
__device__ __forceinline__ void add_up_keys(const KeyTile<typename Config::T>& keys,
                                            const Rows& rows, Mask& mask, float scale_log2,
                                            const BackwardTiles<Config>& tiles,
                                            typename Config::Sums& grad_k,
                                            typename Config::Sums& grad_v) {
  using T = typename Config::T;
  using Layout = typename Config::QueryLayout;
  using Products = AttentionProducts<Config>;
  const auto copy = [&](int block, int stage) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const uint32_t q_tile = shared_address(tiles.first(stage));
    const uint32_t grad_tile = shared_address(tiles.second(stage));
    const uint32_t statistics = shared_address(tiles.row_statistics(stage));
#pragma unroll
    for (int i = 0; i < Config::kKeyRun; i += 4) {
      const int row = warp * Config::kKeyRun + i + lane / 8;
      const T *q = nullptr, *grad = nullptr;
      const float2* from = nullptr;
      const bool found = rows.find(block, row, q, grad, from);
#pragma unroll
      for (int chunk = lane % 8; chunk < Layout::kChunks; chunk += 8) {
        cp_async_16(q_tile + Layout::offset(row, chunk), q + chunk * Layout::kChunkElements, found);
        cp_async_16(grad_tile + Layout::offset(row, chunk), grad + chunk * Layout::kChunkElements,
                    found);
      }
      if (lane % 8 == 0) cp_async_small<8>(statistics + row * sizeof(float2), from, found);
    }
  };

  const int block = warp_uniform(mask.next());
  if (block != kNoBlock) copy(block, 0);
  copy_own_rows<Config>(tiles.own[0], [&](int row) {
    return row < keys.count ? keys.k + row * keys.k_stride : nullptr;
  });
  copy_own_rows<Config>(tiles.own[1], [&](int row) {
    return row < keys.count ? keys.v + row * keys.v_stride : nullptr;
  });
  cp_async_commit();

  const float kept[Config::kSlots] = {1.0f, 1.0f};
  const bool takes_part[Config::kSlots] = {true, true};
  for_blocks(mask, block, copy, [&](int block, int stage) {
    typename Config::Scores weights, grad_scores;
    Products::scores(weights, tiles.own[0], tiles.first(stage));
    const bool masked = warp_uniform(mask.enter(block));
    const float2* const statistics = tiles.row_statistics(stage) + Config::first_column();
    weigh_columns<Config>(weights, statistics, scale_log2, masked, mask);
    Products::output(grad_v, weights, kept, takes_part, tiles.second(stage), tiles.weights);
    Products::scores(grad_scores, tiles.own[1], tiles.second(stage));
    grade_columns<Config>(grad_scores, weights, statistics);
    Products::output(grad_k, grad_scores, kept, takes_part, tiles.first(stage), tiles.weights);
  });
}

}  // namespace mllama
