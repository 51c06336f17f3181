// What the gradient kernels of the attentions share. FlashAttention-2's recomputation (Dao 2023,
// arXiv 2307.08691): with S = scale Q K^T, P = exp(S - lse), delta = rowsum(dO * O),
//
//   dV = P^T dO,   dS = P * (dO V^T - delta),   dQ = scale dS K,   dK = scale dS^T Q.
//
// Kernels    1. Statistics: lse and delta of every row, and what a row of q or k becomes before the
//               product (rotated, normalised), into the workspace (backward_delta.cuh).
//            2. Keys (backward_dk_dv.cuh): one block per tile of keys, over the query rows
//               that see it: S^T, dO V^T transposed, dV, dK.
//            3. Queries (backward_dq.cuh): one block per tile of query rows, over
//               the keys that it sees: S, dO V^T, dQ.
//            Products are mma.sync or, for 16 bits on sm_90a, wgmma (backward_sm90.cuh),
//            on the same rows with the same masks.
// Order      Two passes make 7 products where one pass that adds dQ up in memory makes 5. The sums
//            of a pass stay in one block's registers, in an order that depends on the sequence
//            alone: the same bits every time and in any batch. One pass would move a float32 tile
//            of dQ through L2 for each of its blocks, 64 KB (128 rows of 128) for 21 MFLOP, and in
//            a fixed order only if blocks wait for each other or if partial sums are kept for a
//            second stage: at 4096 keys 32 of them, 2 GB for 32 heads, 1 ms of bandwidth where the
//            products take 0.6.
// Rotation   Rows are rotated (or normalised) once, into the workspace: 2 * tokens * Hq * D
//            elements, 67 MB or 16 us for 4096 tokens of 32 heads of 128. Rotating where tiles are
//            loaded would rotate a query row once per tile of keys.
// Precision  Scores, P, dS and all sums in float32; P and dS of 16-bit elements are rounded before
//            their products. One rounding at the store.
// Registers  A warp has 16 rows. Scores come as accumulators, and P and dS go from there to the
//            operands of the next products: only inputs pass through shared memory.
#pragma once

#include <cstdint>

#include "../common/sm90.cuh"
#include "../common/softmax.cuh"
#include "products_sm80.cuh"
#include "queries.cuh"
#include "tile_size.h"

namespace mllama {

// Compile-time side of tile_size.h, with the names of AttentionConfig: M are the
// block's own rows, N the columns it walks over.
template <typename Element, int kHeadDimension, bool kHides = false>
struct AttentionBackwardConfig {
  using T = Element;
  using QueryLayout = TileLayout<T, kHeadDimension>;
  static constexpr bool kSm90 = false;
#ifdef MLLAMA_SM90A_DEVICE
  static constexpr bool kCompiles = sizeof(T) != 2;  // 16 bits: backward_sm90.cuh
#else
  static constexpr bool kCompiles = true;
#endif
  static constexpr int kHeadDim = kHeadDimension;
  static constexpr bool kHidesRows = kHides;
  static constexpr AttentionBackwardTile kTile = attention_backward_tile(kHeadDim, sizeof(T));
  static constexpr int kBlockM = kTile.rows;
  static constexpr int kBlockN = kTile.columns;
  static constexpr int kWarps = kTile.warps;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRowsPerWarp = 16;
  static constexpr int kRowTiles = 1;
  static constexpr int kSlots = 2;
  static constexpr int kKeyTiles = kBlockN / 8;
  static constexpr int kDimTiles = kHeadDim / 8;
  static constexpr int kKeyRun = kBlockN / kWarps;  // columns that one warp copies
  static constexpr int kStages = kAttentionStages;
  static constexpr int kTileBytes = kBlockM * QueryLayout::kStride;
  static constexpr int kStageTileBytes = kBlockN * QueryLayout::kStride;
  static constexpr int kWeightBytes = sizeof(T) == 2 ? 0 : kBlockM * (kBlockN + 8) * 4;
  static_assert(kBlockM == kWarps * kRowsPerWarp && kKeyRun % 4 == 0 && kBlockN % 16 == 0);

  using Scores = float[kRowTiles][kKeyTiles][4];
  using Sums = float[kRowTiles][kDimTiles][4];

  __device__ static __forceinline__ int row_of_slot(int slot) {
    return static_cast<int>(threadIdx.x) / kWarpSize * kRowsPerWarp + slot * 8 +
           static_cast<int>(threadIdx.x) % kWarpSize / 4;
  }
  __device__ static __forceinline__ int first_column() {
    return static_cast<int>(threadIdx.x) % 4 * 2;
  }
  // The threads that compute meet.
  __device__ static __forceinline__ void sync() { __syncthreads(); }
};

// Where a block's tiles lie in shared memory: two of its own rows, then the stages. Room for what a
// kernel needs besides starts at `rest`.
template <typename Config>
struct BackwardTiles {
  char* const own[2];
  char* const stages;
  char* const statistics;
  char* const weights;  // float32
  char* const rest;

  static constexpr int64_t kStageBytes = int64_t{2} * Config::kStages * Config::kStageTileBytes;
  static constexpr int64_t kStatisticsBytes =
      int64_t{Config::kStages} * Config::kBlockN * sizeof(float2);
  static constexpr int64_t kBarrierBytes = Config::kSm90 ? 2 * Config::kStages * 8 : 0;
  static constexpr int64_t kBytes = int64_t{2} * Config::kTileBytes + kStageBytes +
                                    kStatisticsBytes + kBarrierBytes + Config::kWeightBytes;
  static_assert(Config::kSm90 ||
                kBytes ==
                    attention_backward_shared_bytes(Config::kHeadDim, sizeof(typename Config::T)));

  __device__ __forceinline__ explicit BackwardTiles(char* shared)
      : own{shared, shared + Config::kTileBytes},
        stages(shared + 2 * Config::kTileBytes),
        statistics(stages + kStageBytes),
        weights(statistics + kStatisticsBytes + kBarrierBytes),
        rest(shared + kBytes) {}

  __device__ __forceinline__ char* first(int stage) const {
    return stages + 2 * stage * Config::kStageTileBytes;
  }
  __device__ __forceinline__ char* second(int stage) const {
    return first(stage) + Config::kStageTileBytes;
  }
  __device__ __forceinline__ float2* row_statistics(int stage) const {
    return reinterpret_cast<float2*>(statistics) + stage * Config::kBlockN;
  }
  __device__ __forceinline__ uint64_t* barriers() const {  // sm_90a
    return reinterpret_cast<uint64_t*>(statistics + kStatisticsBytes);
  }
};

// Statistics of a query row: x is its log-sum-exp, times log2(e) for 16-bit elements, y its delta.
constexpr float kLog2E = 1.44269504f;
template <typename T>
__device__ __forceinline__ float stored_lse(float lse) {
  return sizeof(T) == 2 ? lse * kLog2E : lse;
}

// The weight of a score. float32: what rounding takes from the two products goes into the
// difference, where it would otherwise be the largest error.
template <typename T>
__device__ __forceinline__ float recomputed_weight(float score, float scale_log2, float lse) {
  if constexpr (sizeof(T) == 2) {
    return exp2_approx(fmaf(score, scale_log2, -lse));
  } else {
    constexpr float kLost = 1.92596303e-8f;  // log2(e) - kLog2E
    const float scaled = score * scale_log2, lost = fmaf(score, scale_log2, -scaled);
    return exp2f(fmaf(-lse, kLog2E, scaled) + fmaf(-lse, kLost, lost));
  }
}

// Query rows (queries.cuh) with what their gradients need; `out` is that of q.
template <typename T>
struct BackwardRows : QueryRows<T> {
  const T* grad_out;  // first token of the sequence, first head of the group
  int64_t grad_token_stride, grad_head_stride;
  const float2* statistics;  // of the sequence's rows, in their order

  __device__ __forceinline__ const T* grad_row(int row) const {
    return grad_out + this->token(row) * grad_token_stride + this->head(row) * grad_head_stride;
  }
};

// Scores to weights, in place, where columns are query rows; `statistics` are those of the thread's
// first column on.
template <typename Config, typename Mask>
__device__ __forceinline__ void weigh_columns(typename Config::Scores& scores,
                                              const float2* statistics, float scale_log2,
                                              bool masked, const Mask& mask) {
#pragma unroll
  for (int n = 0; n < Config::kKeyTiles; ++n) {
    const float4 s = *reinterpret_cast<const float4*>(statistics + n * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[0][n][i] = recomputed_weight<typename Config::T>(scores[0][n][i], scale_log2,
                                                              i % 2 == 0 ? s.x : s.z);
    }
  }
  if (!masked) return;
#pragma unroll
  for (int n = 0; n < Config::kKeyTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // a select: what is hidden may be infinite
      scores[0][n][i] = mask.visible(i / 2, n * 8 + i % 2) ? scores[0][n][i] : 0.0f;
    }
  }
}

// dS from dO V^T, in place, where columns are query rows.
template <typename Config>
__device__ __forceinline__ void grade_columns(typename Config::Scores& grads,
                                              const typename Config::Scores& weights,
                                              const float2* statistics) {
#pragma unroll
  for (int n = 0; n < Config::kKeyTiles; ++n) {
    const float4 s = *reinterpret_cast<const float4*>(statistics + n * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      grads[0][n][i] = weights[0][n][i] * (grads[0][n][i] - (i % 2 == 0 ? s.y : s.w));
    }
  }
}

// dS from scores and dO V^T, in place of the latter, where rows are query rows.
template <typename Config, typename Mask>
__device__ __forceinline__ void grade_rows(typename Config::Scores& grads,
                                           const typename Config::Scores& scores,
                                           const float2 (&statistics)[Config::kSlots],
                                           float scale_log2, bool masked, const Mask& mask) {
#pragma unroll
  for (int n = 0; n < Config::kKeyTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2& s = statistics[i / 2];
      grads[0][n][i] = recomputed_weight<typename Config::T>(scores[0][n][i], scale_log2, s.x) *
                       (grads[0][n][i] - s.y);
    }
  }
  if (!masked) return;
#pragma unroll
  for (int n = 0; n < Config::kKeyTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // a select: what is hidden may be NaN
      grads[0][n][i] = mask.visible(i / 2, n * 8 + i % 2) ? grads[0][n][i] : 0.0f;
    }
  }
}

// Every warp starts the copies of its own rows; source(row) is null for rows that are zero.
template <typename Config, typename Source>
__device__ __forceinline__ void copy_own_rows(char* tile, const Source& source) {
  using Layout = typename Config::QueryLayout;
  const uint32_t address = shared_address(tile);
  for_own_rows<Config, 1, Layout::kRowLanes>([&](int row, int lane) {
    const typename Config::T* const from = source(row);
#pragma unroll
    for (int chunk = lane; chunk < Layout::kChunks; chunk += Layout::kRowLanes) {
      cp_async_16(address + Layout::offset(row, chunk), from + chunk * Layout::kChunkElements,
                  from != nullptr);
    }
  });
}

// Starts the copies of the block's query rows and of their gradients, and reads the statistics of
// the thread's rows.
template <typename Config>
__device__ __forceinline__ void load_own_queries(const BackwardRows<typename Config::T>& rows,
                                                 const BackwardTiles<Config>& tiles,
                                                 float2 (&statistics)[Config::kSlots]) {
  copy_own_rows<Config>(tiles.own[0],
                        [&](int row) { return rows.valid(row) ? rows.q_row(row) : nullptr; });
  copy_own_rows<Config>(tiles.own[1],
                        [&](int row) { return rows.valid(row) ? rows.grad_row(row) : nullptr; });
  cp_async_commit();
#pragma unroll
  for (int slot = 0; slot < Config::kSlots; ++slot) {
    const int row = Config::row_of_slot(slot);
    statistics[slot] =
        rows.valid(row) ? rows.statistics[rows.first + row] : make_float2(INFINITY, 0.0f);
  }
}

// Sums times `scale` to global memory, through the warp's own rows of `tile`, so that stores are
// whole 16-byte vectors. target(row) is null for rows that are not stored.
template <typename Config, typename Target>
__device__ __forceinline__ void store_sums(const typename Config::Sums& sums, float scale,
                                           char* tile, const Target& target) {
  using T = typename Config::T;
  using Layout = typename Config::QueryLayout;
  __syncwarp();
#pragma unroll
  for (int slot = 0; slot < Config::kSlots; ++slot) {
    const int row = Config::row_of_slot(slot);
#pragma unroll
    for (int n = 0; n < Config::kDimTiles; ++n) {
      const int element = n * 8 + Config::first_column();
      char* const place = tile + Layout::offset(row, element / Layout::kChunkElements) +
                          element % Layout::kChunkElements * sizeof(T);
      const float low = sums[0][n][slot * 2] * scale, high = sums[0][n][slot * 2 + 1] * scale;
      if constexpr (sizeof(T) == 2) {
        *reinterpret_cast<uint32_t*>(place) = pack_pair<T>(low, high);
      } else {
        *reinterpret_cast<float2*>(place) = make_float2(low, high);
      }
    }
  }
  __syncwarp();
  for_own_rows<Config, 1, Layout::kRowLanes>([&](int row, int lane) {
    T* const to = target(row);
    if (to == nullptr) return;
#pragma unroll
    for (int chunk = lane; chunk < Layout::kChunks; chunk += Layout::kRowLanes) {
      store_vec_if(true, to + chunk * Layout::kChunkElements,
                   load_vec(reinterpret_cast<const T*>(tile + Layout::offset(row, chunk))));
    }
  });
}

// Walks over a mask's blocks, the first of which has been copied: copy(block, stage) fetches the
// next one while use(block, stage) works on this one. All threads of the block call it.
template <typename Mask, typename Copy, typename Use>
__device__ __forceinline__ void for_blocks(Mask& mask, int block, const Copy& copy,
                                           const Use& use) {
  int stage = 0;
  while (block != kNoBlock) {
    const int next = warp_uniform(mask.next());
    cp_async_wait<0>();
    __syncthreads();  // the block has landed for all; all are done with the other stage
    if (next != kNoBlock) copy(next, stage ^ 1);
    cp_async_commit();
    use(block, stage);
    block = next;
    stage ^= 1;
  }
  cp_async_wait<0>();  // own rows for which there was no block
}

}  // namespace mllama
