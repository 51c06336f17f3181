// Gradient of a tile of query rows: backward_sm80.cuh, kernel 3. A warp has 16 rows; keys and
// values arrive in blocks as in the forward (core_sm80.cuh).
#pragma once

#include "backward_sm80.cuh"
#include "keys_sm80.cuh"

namespace mllama {

// Adds up the gradients of a tile of query rows, without the softmax scale. All threads of the
// block call it; on sm_90a only threads that get sums return. Policies as in core_sm80.cuh.
template <typename Config, typename Keys, typename Mask>
  requires(!Config::kSm90)
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

  const int block = warp_uniform(mask.next());
  if (block != kNoBlock) copy(block, 0);
  float2 statistics[Config::kSlots];
  load_own_queries<Config>(rows, tiles, statistics);

  const float kept[Config::kSlots] = {1.0f, 1.0f};
  for_blocks(mask, block, copy, [&](int block, int stage) {
    typename Config::Scores weights, grad_scores;
    Products::scores(weights, tiles.own[0], tiles.first(stage));
    Products::scores(grad_scores, tiles.own[1], tiles.second(stage));
    const bool masked = warp_uniform(mask.enter(block));
    bool sees[Config::kSlots];
#pragma unroll
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      sees[slot] = !Config::kHidesRows || !masked || mask.sees(slot);
    }
    grade_rows<Config>(grad_scores, weights, statistics, scale_log2, masked, mask);
    Products::output(grad_q, grad_scores, kept, sees, tiles.first(stage), tiles.weights);
  });
}

}  // namespace mllama
