// Gradient of a tile of query rows: attention_backward.cuh, kernel 3. A warp has 16 rows; keys and
// values arrive in blocks as in the forward (attention.cuh).
#pragma once

#include "attention_backward.cuh"
#include "attention_keys.cuh"

namespace mllama {

// Adds up the gradients of a tile of query rows, without the softmax scale. All threads of the
// block call it; policies as in attention.cuh.
template <typename Config, typename Keys, typename Mask>
__device__ __forceinline__ void add_up_queries(const BackwardRows<typename Config::T>& rows,
                                               Keys& keys, Mask& mask, float scale_log2,
                                               const BackwardTiles<Config>& tiles,
                                               typename Config::Sums& grad_q) {
  using T = typename Config::T;
  using Products = AttentionProducts<Config>;
  static_assert(Config::kHidesRows == Mask::kHidesRows, "the tile must suit the mask");
  const auto copy = [&](int block, int stage) {
    const int run = threadIdx.x / kWarpSize * Config::kKeyRun;
    copy_run_async<Config::kKeyRun, T, Config::kHeadDim>(shared_address(tiles.first(stage)), run,
                                                         keys.k_run(block, run));
    copy_run_async<Config::kKeyRun, T, Config::kHeadDim>(shared_address(tiles.second(stage)), run,
                                                         keys.v_run(block, run));
  };

  int block = warp_uniform(mask.next());
  if (block != kNoBlock) copy(block, 0);
  copy_own_rows<Config>(tiles.own[0], rows.q,
                        [&](int row) { return rows.valid(row) ? rows.q_row(row) : nullptr; });
  copy_own_rows<Config>(tiles.own[1], rows.grad_out,
                        [&](int row) { return rows.valid(row) ? rows.grad_row(row) : nullptr; });
  cp_async_commit();
  float2 statistics[Config::kSlots];
#pragma unroll
  for (int slot = 0; slot < Config::kSlots; ++slot) {
    const int row = Config::row_of_slot(slot);
    statistics[slot] =
        rows.valid(row) ? rows.statistics[rows.first + row] : make_float2(INFINITY, 0.0f);
  }

  const float kept[Config::kSlots] = {1.0f, 1.0f};
  int stage = 0;
  while (block != kNoBlock) {
    const int next = warp_uniform(mask.next());
    cp_async_wait<0>();
    __syncthreads();  // the block has landed for all; all are done with the other stage
    if (next != kNoBlock) copy(next, stage ^ 1);
    cp_async_commit();

    typename Config::Scores weights, grad_scores;
    Products::scores(weights, tiles.own[0], tiles.first(stage));
    Products::scores(grad_scores, tiles.own[1], tiles.second(stage));
    const bool masked = warp_uniform(mask.enter(block));
    bool sees[Config::kSlots];
#pragma unroll
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      sees[slot] = !Config::kHidesRows || !masked || mask.sees(slot);
    }
#pragma unroll
    for (int n = 0; n < Config::kKeyTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2& s = statistics[i / 2];
        grad_scores[0][n][i] =
            recomputed_weight<T>(weights[0][n][i], scale_log2, s.x) * (grad_scores[0][n][i] - s.y);
      }
    }
    if (masked) {
#pragma unroll
      for (int n = 0; n < Config::kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // a select: what is hidden may be NaN
          grad_scores[0][n][i] = mask.visible(i / 2, n * 8 + i % 2) ? grad_scores[0][n][i] : 0.0f;
        }
      }
    }
    Products::output(grad_q, grad_scores, kept, sees, tiles.first(stage), tiles.weights);
    block = next;
    stage ^= 1;
  }
  cp_async_wait<0>();  // the rows of a tile that sees nothing
}

}  // namespace mllama
