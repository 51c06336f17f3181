// The sums of backward_dk_dv.cuh and backward_dq.cuh on sm_90a, for 16-bit
// elements: same policies, same masks, products by wgmma (wgmma.cuh).
//
// Tiling     Two warpgroups have 64 of the block's rows each; a third copies. Scores come from two
//            products out of shared memory; P and dS stay in registers, where accumulators are
//            operands: of a block's four products (three for queries) two read but one operand from
//            shared memory, and nothing is written there.
// Copies     By cp.async, because rows are gathered: packed query heads, rows of several sequences,
//            rows that do not see a tile and read as zeros. The copying warps run two blocks ahead,
//            and publish a block when their copies have landed.
// Overlap    One warpgroup's products run during the other's exponentials, and its own dO V^T
//            during those of P.
// Hidden     Where a row may be blind to a block whose keys it must not touch (NaN), the block's
//            product is summed from zero and added to the rows that see it.
#pragma once

#include "../common/device.h"
#include "../common/dispatch.cuh"
#include "../common/sm90.cuh"
#include "../common/wgmma.cuh"
#include "backward_dk_dv.cuh"
#include "backward_dq.cuh"
#include "products_sm90.cuh"
#include "tile_sm90.cuh"

namespace mllama {

template <typename Element, int kHeadDimension, bool kHides = false>
struct AttentionBackwardSm90Config {
  using T = Element;
  static constexpr bool kSm90 = true;
#ifdef MLLAMA_SM90A_DEVICE
  static constexpr bool kCompiles = true;
#else
  static constexpr bool kCompiles = false;
#endif
  static constexpr int kHeadDim = kHeadDimension;
  static constexpr bool kHidesRows = kHides;
  static constexpr int kBlockM = kBackwardSm90Tile.rows;
  static constexpr int kBlockN = kBackwardSm90Tile.columns;
  static constexpr int kWarps = kBackwardSm90Tile.warps;  // that compute
  static constexpr int kCopyWarps = 4;
  static constexpr int kThreads = (kWarps + kCopyWarps) * kWarpSize;
  static constexpr int kRowsPerWarp = 16;
  static constexpr int kSlots = 2;
  static constexpr int kKeyTiles = kBlockN / 8;
  static constexpr int kDimTiles = kHeadDim / 8;
  static constexpr int kStages = 4;
  using QueryLayout = PanelLayout<T, kHeadDim, kBlockM>;
  using StageLayout = PanelLayout<T, kHeadDim, kBlockN>;
  static constexpr int kTileBytes = QueryLayout::kBytes;
  static constexpr int kStageTileBytes = StageLayout::kBytes;
  static constexpr int kWeightBytes = 0;
  // 64512 registers (168 for each of 384 threads) for 128 threads that copy and 256 that compute.
  static constexpr int kCopyRegisters = kHeadDim > 80 ? 56 : 88;
  static constexpr int kComputeRegisters = kHeadDim > 80 ? 224 : 208;
  static_assert(kBlockM == kWarps * kRowsPerWarp && kBlockN == 16 * kCopyWarps && sizeof(T) == 2);

  using Scores = float[1][kKeyTiles][4];
  using Sums = float[1][kDimTiles][4];

  __device__ static __forceinline__ int row_of_slot(int slot) {
    return static_cast<int>(threadIdx.x) / kWarpSize * kRowsPerWarp + slot * 8 +
           static_cast<int>(threadIdx.x) % kWarpSize / 4;
  }
  __device__ static __forceinline__ int first_column() {
    return static_cast<int>(threadIdx.x) % 4 * 2;
  }
  // The threads that compute meet.
  __device__ static __forceinline__ void sync() { named_barrier_sync(3, kWarps * kWarpSize); }
};

// The barriers of a ring of stages and who uses them.
template <typename Config>
class BackwardRing {
 public:
  using Position = RingPosition<Config::kStages>;

  // All threads of the block call it.
  __device__ __forceinline__ explicit BackwardRing(const BackwardTiles<Config>& tiles)
      : full_(tiles.barriers()), empty_(full_ + Config::kStages) {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < Config::kStages; ++stage) {
        mbarrier_init(&full_[stage], Config::kCopyWarps);
        mbarrier_init(&empty_[stage], Config::kWarps);
      }
      fence_mbarrier_init();
    }
    __syncthreads();
  }

  // The copying warps' part: copy(block, stage) starts a thread's copies.
  template <typename Mask, typename Copy>
  __device__ __forceinline__ void fill(Mask& mask, const Copy& copy) const {
    Position next, last;
    bool first = true;
    for (int block = mask.next(); block != kNoBlock; block = mask.next()) {
      mbarrier_wait(&empty_[next.stage], next.parity ^ 1);
      copy(block, next.stage);
      cp_async_commit();
      next.advance();
      if (!first) {
        cp_async_wait<1>();
        publish(last);
      }
      first = false;
    }
    cp_async_wait<0>();
    if (!first) publish(last);
  }

  __device__ __forceinline__ void wait(const Position& position) const {
    mbarrier_wait(&full_[position.stage], position.parity);
  }
  __device__ __forceinline__ void release(Position& position) const {
    if (threadIdx.x % kWarpSize == 0) mbarrier_arrive(&empty_[position.stage]);
    position.advance();
  }

 private:
  __device__ __forceinline__ void publish(Position& position) const {
    fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) mbarrier_arrive(&full_[position.stage]);
    position.advance();
  }

  uint64_t* const full_;
  uint64_t* const empty_;
};

// Products of a warpgroup's 64 rows.
template <typename Config>
struct BackwardProducts {
  using T = typename Config::T;
  using Operand = uint32_t[Config::kBlockN / 16][4];
  static constexpr int kSpan = Config::QueryLayout::kPanelBytes;
  static constexpr int kWarpgroupThreads = 4 * kWarpSize;

  // Behind the copies of own rows: the warpgroup's have landed, for products too.
  __device__ static __forceinline__ void own_rows_landed() {
    cp_async_wait<0>();
    fence_proxy_async();
    meet();
  }
  // The warpgroup's threads meet.
  __device__ static __forceinline__ void meet() {
    named_barrier_sync(1 + threadIdx.x / kWarpgroupThreads, kWarpgroupThreads);
  }

  // scores = own rows * rows of the stage, transposed.
  __device__ static __forceinline__ void scores(typename Config::Scores& scores, const char* own,
                                                const char* stage) {
    const int warpgroup = warp_uniform(threadIdx.x / kWarpgroupThreads);
    issue_scores<Config, typename Config::QueryLayout, typename Config::StageLayout>(
        scores[0], shared_address(own) + warpgroup * 64 * kSpan, shared_address(stage));
  }

  // sums (+)= weights * rows of the stage.
  template <bool kAccumulate>
  __device__ static __forceinline__ void sums(typename Config::Sums& sums, const Operand& weights,
                                              const char* stage) {
    const uint64_t rows =
        wgmma_descriptor_mn<kSpan>(shared_address(stage), Config::StageLayout::kPanelPitch);
#pragma unroll
    for (int step = 0; step < Config::kBlockN / 16; ++step) {
      const uint64_t b = rows + wgmma_step(step * 16 * kSpan);
      using Product = Wgmma<T, Config::kHeadDim>;
      if (step == 0 && !kAccumulate) {
        Product::template rs<WgmmaMajor::kMN, false>(sums[0], weights[step], b);
      } else {
        Product::template rs<WgmmaMajor::kMN, true>(sums[0], weights[step], b);
      }
    }
    wgmma_commit();
  }

  // Two neighbouring n8 tiles of weights are one k16 operand.
  __device__ static __forceinline__ void pack(Operand& operand,
                                              const typename Config::Scores& weights) {
#pragma unroll
    for (int step = 0; step < Config::kBlockN / 16; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&w)[4] = weights[0][2 * step + i / 2];
        operand[step][i] = pack_pair<T>(w[i % 2 * 2], w[i % 2 * 2 + 1]);
      }
    }
  }
};

// The copying warps' way through a block: f(row, lane of kRowLanes) for each of the warp's 16 rows.
template <typename Config, typename F>
__device__ __forceinline__ void for_copied_rows(const F& f) {
  constexpr int kLanes = Config::StageLayout::kRowLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize - Config::kWarps;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll 1  // registers are few
  for (int i = 0; i < 16; i += kWarpSize / kLanes) {
    f(warp * 16 + i + lane / kLanes, lane % kLanes);
  }
}

// As in backward_dk_dv.cuh. Warps that copy do not return.
template <typename Config, typename Rows, typename Mask>
  requires(Config::kSm90)
__device__ __forceinline__ void add_up_keys(const KeyTile<typename Config::T>& keys,
                                            const Rows& rows, Mask& mask, float scale_log2,
                                            const BackwardTiles<Config>& tiles,
                                            typename Config::Sums& grad_k,
                                            typename Config::Sums& grad_v) {
#ifdef MLLAMA_SM90A_DEVICE
  using T = typename Config::T;
  using Products = BackwardProducts<Config>;
  const BackwardRing<Config> ring(tiles);
  if (warp_uniform(threadIdx.x / kWarpSize) >= Config::kWarps) {
    registers_release<Config::kCopyRegisters>();
    ring.fill(mask, [&](int block, int stage) {
      using Layout = typename Config::StageLayout;
      const uint32_t q_tile = shared_address(tiles.first(stage));
      const uint32_t grad_tile = shared_address(tiles.second(stage));
      const uint32_t statistics = shared_address(tiles.row_statistics(stage));
      for_copied_rows<Config>([&](int row, int lane) {
        const T *q = nullptr, *grad = nullptr;
        const float2* from = nullptr;
        const bool found = rows.find(block, row, q, grad, from);
#pragma unroll
        for (int chunk = lane; chunk < Layout::kChunks; chunk += Layout::kRowLanes) {
          const int place = Layout::offset(row, chunk), element = chunk * Layout::kChunkElements;
          cp_async_16(q_tile + place, q + element, found);
          cp_async_16(grad_tile + place, grad + element, found);
        }
        if (lane == 0) cp_async_small<8>(statistics + row * sizeof(float2), from, found);
      });
    });
    exit_thread();
  }
  registers_acquire<Config::kComputeRegisters>();
  copy_own_rows<Config>(tiles.own[0], [&](int row) {
    return row < keys.count ? keys.k + row * keys.k_stride : nullptr;
  });
  copy_own_rows<Config>(tiles.own[1], [&](int row) {
    return row < keys.count ? keys.v + row * keys.v_stride : nullptr;
  });
  cp_async_commit();
  Products::own_rows_landed();

  typename BackwardRing<Config>::Position position;
  for (int block = warp_uniform(mask.next()); block != kNoBlock;
       block = warp_uniform(mask.next())) {
    const char *const q_tile = tiles.first(position.stage), *const grad_tile =
                                                                tiles.second(position.stage);
    typename Config::Scores weights, grad_scores;
    typename Products::Operand weight_operand, grad_operand;
    ring.wait(position);
    wgmma_fence(weights[0], grad_scores[0]);
    Products::scores(weights, tiles.own[0], q_tile);
    Products::scores(grad_scores, tiles.own[1], grad_tile);
    const bool masked = warp_uniform(mask.enter(block));
    const float2* const statistics = tiles.row_statistics(position.stage) + Config::first_column();
    wgmma_wait<1>(weights[0]);
    weigh_columns<Config>(weights, statistics, scale_log2, masked, mask);
    Products::pack(weight_operand, weights);
    wgmma_wait<0>(grad_scores[0]);
    grade_columns<Config>(grad_scores, weights, statistics);
    Products::pack(grad_operand, grad_scores);
    wgmma_fence(grad_v[0], grad_k[0]);
    Products::template sums<true>(grad_v, weight_operand, grad_tile);
    Products::template sums<true>(grad_k, grad_operand, q_tile);
    wgmma_wait<0>(grad_v[0], grad_k[0]);
    ring.release(position);
  }
  Products::meet();  // no product reads the warpgroup's rows any more
#endif
}

// As in backward_dq.cuh. Warps that copy do not return.
template <typename Config, typename Keys, typename Mask>
  requires(Config::kSm90)
__device__ __forceinline__ void add_up_queries(const BackwardRows<typename Config::T>& rows,
                                               Keys& keys, Mask& mask, float scale_log2,
                                               const BackwardTiles<Config>& tiles,
                                               typename Config::Sums& grad_q) {
#ifdef MLLAMA_SM90A_DEVICE
  using T = typename Config::T;
  using Products = BackwardProducts<Config>;
  static_assert(Config::kHidesRows == Mask::kHidesRows, "the tile must suit the mask");
  const BackwardRing<Config> ring(tiles);
  const int warp = warp_uniform(threadIdx.x / kWarpSize);
  if (warp >= Config::kWarps) {
    registers_release<Config::kCopyRegisters>();
    ring.fill(mask, [&](int block, int stage) {
      using Layout = typename Config::StageLayout;
      const auto copy = [&](char* tile, const RowRun<T>& run, int first) {
        const uint32_t address = shared_address(tile);
        for_copied_rows<Config>([&](int row, int lane) {
          const bool valid = row - first < run.count;
          const T* const source = valid ? run.base + (row - first) * run.stride : rows.q;
#pragma unroll
          for (int chunk = lane; chunk < Layout::kChunks; chunk += Layout::kRowLanes) {
            cp_async_16(address + Layout::offset(row, chunk),
                        source + chunk * Layout::kChunkElements, valid);
          }
        });
      };
      const int first = (warp - Config::kWarps) * 16;
      copy(tiles.first(stage), keys.k_run(block, first), first);
      copy(tiles.second(stage), keys.v_run(block, first), first);
    });
    exit_thread();
  }
  registers_acquire<Config::kComputeRegisters>();
  float2 statistics[Config::kSlots];
  load_own_queries<Config>(rows, tiles, statistics);
  Products::own_rows_landed();

  typename BackwardRing<Config>::Position position;
  for (int block = warp_uniform(mask.next()); block != kNoBlock;
       block = warp_uniform(mask.next())) {
    const char *const k_tile = tiles.first(position.stage), *const v_tile =
                                                                tiles.second(position.stage);
    typename Config::Scores weights, grad_scores;
    typename Products::Operand grad_operand;
    ring.wait(position);
    wgmma_fence(weights[0], grad_scores[0]);
    Products::scores(weights, tiles.own[0], k_tile);
    Products::scores(grad_scores, tiles.own[1], v_tile);
    const bool masked = warp_uniform(mask.enter(block));
    wgmma_wait<0>(weights[0], grad_scores[0]);
    grade_rows<Config>(grad_scores, weights, statistics, scale_log2, masked, mask);
    Products::pack(grad_operand, grad_scores);
    if constexpr (Config::kHidesRows) {
      typename Config::Sums product;
      wgmma_fence(product[0]);
      Products::template sums<false>(product, grad_operand, k_tile);
      wgmma_wait<0>(product[0]);
#pragma unroll
      for (int slot = 0; slot < Config::kSlots; ++slot) {
        if (masked && !mask.sees(slot)) continue;
#pragma unroll
        for (int n = 0; n < Config::kDimTiles; ++n) {
#pragma unroll
          for (int i = slot * 2; i < slot * 2 + 2; ++i) grad_q[0][n][i] += product[0][n][i];
        }
      }
    } else {
      wgmma_fence(grad_q[0]);
      Products::template sums<true>(grad_q, grad_operand, k_tile);
      wgmma_wait<0>(grad_q[0]);
    }
    ring.release(position);
  }
  Products::meet();  // no product reads the warpgroup's rows any more
#endif
}

// f(Config, hiding Config), as types, for the element type, the head dim and the device: of the two
// the second is for rows that may be blind to a block.
template <typename F>
cudaError_t dispatch_attention_backward(DType dtype, int64_t head_dim, const F& f) {
  return dispatch_dtype(dtype, [&](auto element) {
    return dispatch_head_dim(head_dim, [&](auto dim) {
      using T = decltype(element);
      constexpr int kHeadDim = decltype(dim)::value;
      if constexpr (sizeof(T) == 2) {
        if (runs_sm90a()) {
          return f(std::type_identity<AttentionBackwardSm90Config<T, kHeadDim>>{},
                   std::type_identity<AttentionBackwardSm90Config<T, kHeadDim, true>>{});
        }
      }
      return f(std::type_identity<AttentionBackwardConfig<T, kHeadDim>>{},
               std::type_identity<AttentionBackwardConfig<T, kHeadDim, true>>{});
    });
  });
}

}  // namespace mllama
