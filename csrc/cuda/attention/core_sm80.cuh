// The attention main loop for sm_80 and newer, after FlashAttention-2 (Dao 2023, arXiv 2307.08691).
//
// Tiling     One thread block computes kBlockM query rows (tile_size.h) and walks over key
//            blocks of kBlockN. Q stays in shared memory; K and V of one block are in use while
//            those of the next one arrive by cp.async: one barrier per key block.
// Precision  Scores, softmax and output in float32; 16-bit weights are rounded before the product
//            with V, float32 ones are not. One rounding at the store.
// Geometry   The order of summation over keys depends on the sequence alone, never on the batch,
//            the grid or the other rows: a skipped block and a fully masked one leave the same
//            bits.
// Alignment  Every row of q, k, v and out starts on 16 bytes (alignment.h).
#pragma once

#include "../common/dispatch.cuh"
#include "../common/launch.h"
#include "../common/softmax.cuh"
#include "products_sm80.cuh"
#include "queries.cuh"

namespace mllama {

// Computes one block of query rows. All threads of the block call it; `shared` is
// Config::kSharedBytes of dynamic shared memory, 16-byte aligned. `rows` is best kept in shared
// memory: it is needed before and after the loop, and in between registers are short. The policies:
//
//   Query   load<Config>(tile, rows): see queries.cuh.
//   Keys    k_run, v_run: see keys_sm80.cuh.
//   Mask    int next(): the next block to visit, or kNoBlock; numbers are opaque to the loop. The
//           same in all threads, and without a loop inside: work of unknown length belongs into the
//           mask's constructor.
//           bool enter(int block): prepares the block's mask; true if it hides anything from any
//           row. Keys behind a run's `count` must be hidden. Uniform in a warp.
//           bool visible(int slot, int offset): whether query row row_of_slot(slot) sees the
//           entered block's key Config::first_column() + offset; offset is a constant.
//           kHidesRows, bool sees(int slot): whether a row may be blind to a whole block whose
//           values it must not touch, and whether this one sees any of it.
template <typename Config, typename Query, typename Keys, typename Mask>
__device__ __forceinline__ void attend(const QueryRows<typename Config::T>& rows,
                                       const Query& query, Keys& keys, Mask& mask,
                                       float softmax_scale_log2, char* shared) {
  using T = typename Config::T;
  using Layout = TileLayout<T, Config::kHeadDim>;
  using Products = AttentionProducts<Config>;
  static_assert(Config::kHidesRows == Mask::kHidesRows, "the tile must suit the mask");
  constexpr int kKeyTileBytes = Config::kBlockN * Layout::kStride;
  char* const q_tile = shared;
  char* const stages = q_tile + Config::kBlockM * Layout::kStride;  // K then V, twice
  char* const weight_tile = stages + 2 * kAttentionStages * kKeyTileBytes;
  const auto copy = [&](int block, char* stage) {
    const int run = threadIdx.x / kWarpSize * Config::kKeyRun;
    const uint32_t target = shared_address(stage);
    copy_run_async<Config::kKeyRun, T, Config::kHeadDim>(target, run, keys.k_run(block, run));
    copy_run_async<Config::kKeyRun, T, Config::kHeadDim>(target + kKeyTileBytes, run,
                                                         keys.v_run(block, run));
  };

  int block = warp_uniform(mask.next());
  if (block != kNoBlock) copy(block, stages);
  query.template load<Config>(q_tile, rows);
  cp_async_commit();

  float scores[Config::kRowTiles][Config::kKeyTiles][4];
  float out[Config::kRowTiles][Config::kDimTiles][4] = {};
  OnlineSoftmax<T, Config::kSlots> softmax;
  int stage = 0;
  while (block != kNoBlock) {
    const int next = warp_uniform(mask.next());
    cp_async_wait<0>();
    __syncthreads();  // the block has landed for all; all are done with the other stage
    if (next != kNoBlock) copy(next, stages + (stage ^ 1) * 2 * kKeyTileBytes);
    cp_async_commit();

    const char* const k_tile = stages + stage * 2 * kKeyTileBytes;
    Products::scores(scores, q_tile, k_tile);
    const bool masked = warp_uniform(mask.enter(block));
    bool sees[Config::kSlots];
#pragma unroll
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      sees[slot] = !Config::kHidesRows || !masked || mask.sees(slot);
    }
    if (masked) {
#pragma unroll
      for (int n = 0; n < Config::kKeyTiles; ++n) {
#pragma unroll
        for (int slot = 0; slot < Config::kSlots; ++slot) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {  // a select: a hidden score may be NaN
            float& score = scores[slot / 2][n][slot % 2 * 2 + i];
            score = mask.visible(slot, n * 8 + i) ? score : -INFINITY;
          }
        }
      }
    }
    float factor[Config::kSlots];
    softmax.update(scores, softmax_scale_log2, factor);
    Products::output(out, scores, factor, sees, k_tile + kKeyTileBytes, weight_tile);
    block = next;
    stage ^= 1;
  }

  // Through the warp's own rows of the query tile, so that global stores are whole 16-byte vectors.
  cp_async_wait<0>();  // the query copy of a block that visited nothing
  __syncwarp();
#pragma unroll
  for (int slot = 0; slot < Config::kSlots; ++slot) {
    const float total = softmax.total(slot), inverse = total == 0.0f ? 0.0f : 1.0f / total;
    // A row that saw nothing has 0 to store. A quotient for float32: one rounding less.
    const auto normalize = [&](float x) {
      return sizeof(T) == 2 ? x * inverse : total == 0.0f ? 0.0f : x / total;
    };
    const int row = Config::row_of_slot(slot);
    if (rows.lse != nullptr && Config::first_column() == 0 && rows.valid(row)) {
      rows.store_lse(row, log_sum_exp<T>(softmax.maximum[slot], total, softmax_scale_log2));
    }
#pragma unroll
    for (int n = 0; n < Config::kDimTiles; ++n) {
      const float (&o)[4] = out[slot / 2][n];
      const int element = n * 8 + Config::first_column();
      char* const target = q_tile + Layout::offset(row, element / Layout::kChunkElements) +
                           element % Layout::kChunkElements * sizeof(T);
      const float low = normalize(o[slot % 2 * 2]), high = normalize(o[slot % 2 * 2 + 1]);
      if constexpr (sizeof(T) == 2) {
        *reinterpret_cast<uint32_t*>(target) = pack_pair<T>(low, high);
      } else {
        *reinterpret_cast<float2*>(target) = make_float2(low, high);
      }
    }
  }
  __syncwarp();
  for_own_rows<Config>([&](int row, int lane) {
    if (!rows.valid(row)) return;
    T* const target = rows.out_row(row);
#pragma unroll
    for (int chunk = lane; chunk < Layout::kChunks; chunk += 8) {
      store_vec_if(true, target + chunk * Layout::kChunkElements,
                   load_vec(reinterpret_cast<const T*>(q_tile + Layout::offset(row, chunk))));
    }
  });
}

// Calls f(AttentionConfig<T, D, kHidesRows>{}) for the head dims Mllama needs.
template <typename T, bool kHidesRows = false, typename F>
cudaError_t dispatch_config(int64_t head_dim, const F& f) {
  return dispatch_head_dim(head_dim, [&](auto dim) {
    return f(AttentionConfig<T, decltype(dim)::value, kHidesRows>{});
  });
}

}  // namespace mllama
