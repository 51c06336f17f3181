// Split-KV decode: one query row per sequence against many keys, for any source of keys.
// Flash-Decoding (Dao et al. 2023); online softmax after Milakov, Gimelshein (arXiv 1805.02867).
//
// Tiling     One block per (sequence, key/value head, split); the query heads of the group are the
//            rows of one m16n8k16 tile, so keys and values are read once for all of them. Four
//            warps walk over tiles of 16 keys (8 in float32) independently, each with its own
//            two-stage cp.async ring and softmax state: no block barrier between the first tile and
//            the end, where the states are merged in warp order. A second kernel merges the splits
//            in a fixed order. 74 KB of shared memory at head dim 128: 2 blocks per SM on sm_80, 3
//            on sm_90, fits 99 KB (sm_86, sm_89); a third stage would not.
// Precision  Scores, softmax and sums in float32; 16-bit weights are rounded before the product
//            with v.
// Traffic    Keys and values once, 2 * length * Hkv * D elements, plus D + 2 floats per split and
//            query head written and read. Batch 1, 8 heads of 128, bf16: 1k keys 4.2 MB, 1 us at
//            4.3 TB/s; 8k 33.5 MB, 7.8 us; 6404 image keys 26.2 MB, 6.1 us.
// Order      Fixed by the geometry (decode.h): bit-identical in every run, batch and device.
// Aliasing   out and workspace overlap neither each other nor any input.
//
// A source is a plain struct passed by value:
//   T, kSharedInts          the element type; how many ints of shared memory it needs
//   Keys open(b, kv_head, split, shared)
//                           called by all threads; Keys::length is the number of keys in the split,
//                           0 if nothing is to be seen
//   KeyRun<T> run(keys, first, shared)
//                           the keys of the split from `first` on, a multiple of the tile
//   void load_query(b, kv_head, query, row_elements)
//                           called by all threads; writes the group's query rows
#pragma once

#include <type_traits>

#include "../common/launch.h"
#include "../common/ragged.cuh"
#include "decode_tile.cuh"

namespace mllama {

constexpr int kSplitKvWarps = 4;
constexpr int kSplitKvThreads = kSplitKvWarps * kWarpSize;
constexpr int kSplitKvStages = 2;
constexpr int kSplitKvMinBlocks = 3;  // what shared memory allows at head dim 128 on sm_90

// `count` rows (none if not positive) at k + i * k_stride and v + i * v_stride. Addresses are valid
// in any case.
template <typename T>
struct KeyRun {
  const T* k;
  const T* v;
  int64_t k_stride, v_stride;
  int count;
};

struct SplitKvParams {
  void* out;                  // (tokens, num_q_heads, head_dim)
  float* partial;             // (batch, num_q_heads, splits, head_dim), not normalised
  float2* statistics;         // (batch, num_q_heads, splits): maximum in the exp2 domain, sum
  const int32_t* cu_seqlens;  // (batch + 1,), or null: sequence b is row b
  int64_t tokens, batch;
  int num_q_heads, num_kv_heads, splits;
  float scale_log2;  // softmax_scale * log2(e)
};

// Copies one tile of keys and one of values to shared memory; rows from run.count on become zero.
template <typename T, int kHeadDim, int kKeys>
__device__ __forceinline__ void copy_split_tile(T* k, T* v, const KeyRun<T>& run) {
  using Tile = SplitTile<T, kHeadDim>;
  constexpr int kPieces = kKeys * Tile::kChunks;
  static_assert(kPieces % kWarpSize == 0, "every lane copies the same number of chunks");
#pragma unroll
  for (int i = 0; i < kPieces; i += kWarpSize) {
    const int piece = i + threadIdx.x % kWarpSize;
    const int row = piece / Tile::kChunks, column = piece % Tile::kChunks * Vec<T>::kSize;
    const bool valid = row < run.count;
    const int source_row = valid ? row : 0;
    cp_async_16(shared_address(k + row * Tile::kRowElements + column),
                run.k + source_row * run.k_stride + column, valid);
    cp_async_16(shared_address(v + row * Tile::kRowElements + column),
                run.v + source_row * run.v_stride + column, valid);
  }
}

template <typename T, int kHeadDim>
struct SplitKvShared {
  using Tile = SplitTile<T, kHeadDim>;
  static constexpr int kKeys = SplitWarp<T, kHeadDim>::kKeys;

  struct Stage {
    T k[kKeys * Tile::kRowElements];
    T v[kKeys * Tile::kRowElements];
  };
  struct Merge {
    float out[kSplitKvWarps][Tile::kRows * Tile::kOutStride];
    float maximum[kSplitKvWarps][Tile::kRows];
    float sum[kSplitKvWarps][Tile::kRows];
  };
  union {
    Stage stages[kSplitKvWarps][kSplitKvStages];
    Merge merge;  // after the last tile
  };
  alignas(16) T query[Tile::kRows * Tile::kRowElements];
};

template <int kHeadDim, typename Source>
__global__ void __launch_bounds__(kSplitKvThreads, kSplitKvMinBlocks)
    split_kv_kernel(const Source source, const SplitKvParams p) {
  using T = typename Source::T;
  using Shared = SplitKvShared<T, kHeadDim>;
  using Tile = typename Shared::Tile;
  using Warp = SplitWarp<T, kHeadDim>;
  extern __shared__ uint4 shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  __shared__ int source_ints[Source::kSharedInts];

  const int split = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.splits));
  const unsigned pair = blockIdx.x / static_cast<unsigned>(p.splits);
  const int kv_head = static_cast<int>(pair % static_cast<unsigned>(p.num_kv_heads));
  const int64_t b = pair / static_cast<unsigned>(p.num_kv_heads);
  const int group = p.num_q_heads / p.num_kv_heads;
  // Of the group's first query head; the next one is p.splits further.
  const int64_t result =
      (b * p.num_q_heads + static_cast<int64_t>(kv_head) * group) * p.splits + split;

  const typename Source::Keys keys = source.open(b, kv_head, split, source_ints);
  if (keys.length <= 0) {
    if (static_cast<int>(threadIdx.x) < group) {
      p.statistics[result + static_cast<int64_t>(threadIdx.x) * p.splits] =
          make_float2(-INFINITY, 0);
    }
    return;
  }

  const int warp = threadIdx.x / kWarpSize;
  const int tiles = (keys.length + Warp::kKeys - 1) / Warp::kKeys;
  const auto copy = [&](int tile) {
    if (tile < tiles) {
      auto& stage = shared.stages[warp][tile / kSplitKvWarps % kSplitKvStages];
      copy_split_tile<T, kHeadDim, Warp::kKeys>(stage.k, stage.v,
                                                source.run(keys, tile * Warp::kKeys, source_ints));
    }
    cp_async_commit();  // one group per tile, empty behind the last, so that the waits count alike
  };
#pragma unroll
  for (int i = 0; i < kSplitKvStages; ++i) copy(warp + i * kSplitKvWarps);

  source.load_query(b, kv_head, shared.query, Tile::kRowElements);
  for (int i = group * Tile::kRowElements + threadIdx.x; i < Tile::kRows * Tile::kRowElements;
       i += kSplitKvThreads) {
    shared.query[i] = from_f32<T>(0.0f);
  }
  __syncthreads();
  Warp state;
  state.init(shared.query);
  for (int tile = warp; tile < tiles; tile += kSplitKvWarps) {
    cp_async_wait<kSplitKvStages - 1>();
    __syncwarp();  // the tile was copied by all lanes
    const auto& stage = shared.stages[warp][tile / kSplitKvWarps % kSplitKvStages];
    const KeyRun<T> run = source.run(keys, tile * Warp::kKeys, source_ints);
    state.step(stage.k, stage.v, run.count, p.scale_log2, group);
    __syncwarp();  // every lane has read the stage that is filled next
    copy(tile + kSplitKvStages * kSplitKvWarps);
  }
  cp_async_wait<0>();
  __syncthreads();
  state.store(shared.merge.out[warp], shared.merge.maximum[warp], shared.merge.sum[warp], group);
  __syncthreads();

  constexpr int kQuads = kHeadDim / 4;
  const float unit = Warp::unit(p.scale_log2);
  for (int i = threadIdx.x; i < group * kQuads; i += kSplitKvThreads) {
    const int row = i / kQuads, column = i % kQuads * 4;
    float maximum = -INFINITY;
#pragma unroll
    for (int w = 0; w < kSplitKvWarps; ++w) maximum = fmaxf(maximum, shared.merge.maximum[w][row]);
    const float shift = maximum == -INFINITY ? 0.0f : maximum;
    float sum = 0.0f;
    float4 out = {};
#pragma unroll
    for (int w = 0; w < kSplitKvWarps; ++w) {
      const float weight = exp2f((shared.merge.maximum[w][row] - shift) * unit);
      const float4 part =
          *reinterpret_cast<const float4*>(&shared.merge.out[w][row * Tile::kOutStride + column]);
      sum = fmaf(weight, shared.merge.sum[w][row], sum);
      out = {fmaf(weight, part.x, out.x), fmaf(weight, part.y, out.y), fmaf(weight, part.z, out.z),
             fmaf(weight, part.w, out.w)};
    }
    const int64_t to = result + static_cast<int64_t>(row) * p.splits;
    *reinterpret_cast<float4*>(p.partial + to * kHeadDim + column) = out;
    if (column == 0) p.statistics[to] = make_float2(maximum, sum);
  }
}

// One block per (row, query head). Warp w merges splits w, w + 4, ... in order, then the warps are
// merged in order. Splits that saw nothing are not read.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kSplitKvThreads) combine_splits_kernel(const SplitKvParams p) {
  __shared__ alignas(16) float warp_out[kSplitKvWarps][kHeadDim];
  __shared__ float warp_sum_of[kSplitKvWarps];
  const int64_t token = blockIdx.x / static_cast<unsigned>(p.num_q_heads);
  const int64_t head = blockIdx.x % static_cast<unsigned>(p.num_q_heads);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  T* out = static_cast<T*>(p.out) + (token * p.num_q_heads + head) * kHeadDim;

  const int64_t b = find_sequence(p.cu_seqlens, p.batch, 1, token, p.tokens);
  if (b < 0) {
    for (int d = threadIdx.x; d < kHeadDim; d += kSplitKvThreads) out[d] = from_f32<T>(0.0f);
    return;
  }
  const int64_t first = (b * p.num_q_heads + head) * p.splits;
  float maximum = -INFINITY;
  for (int s = lane; s < p.splits; s += kWarpSize)
    maximum = fmaxf(maximum, p.statistics[first + s].x);
  maximum = warp_max(maximum);
  const float shift = maximum == -INFINITY ? 0.0f : maximum;

  const float unit = SplitWarp<T, kHeadDim>::unit(p.scale_log2);
  const int column = lane * 4;
  float sum = 0.0f;
  float4 total = {};
#pragma unroll 4
  for (int s = warp; s < p.splits; s += kSplitKvWarps) {
    const float2 statistics = p.statistics[first + s];
    float4 part = {};
    if (statistics.y != 0.0f && column < kHeadDim) {
      part = *reinterpret_cast<const float4*>(p.partial + (first + s) * kHeadDim + column);
    }
    const float weight = exp2f((statistics.x - shift) * unit);
    sum = fmaf(weight, statistics.y, sum);
    total = {fmaf(weight, part.x, total.x), fmaf(weight, part.y, total.y),
             fmaf(weight, part.z, total.z), fmaf(weight, part.w, total.w)};
  }
  if (lane == 0) warp_sum_of[warp] = sum;
  if (column < kHeadDim) *reinterpret_cast<float4*>(&warp_out[warp][column]) = total;
  __syncthreads();
  for (int d = threadIdx.x; d < kHeadDim; d += kSplitKvThreads) {
    float value = 0.0f, divisor = 0.0f;
#pragma unroll
    for (int w = 0; w < kSplitKvWarps; ++w) {
      value += warp_out[w][d];
      divisor += warp_sum_of[w];
    }
    out[d] = from_f32<T>(divisor == 0.0f ? 0.0f : value / divisor);
  }
}

template <int kHeadDim, typename Source>
cudaError_t launch_split_kv(const Source& source, const SplitKvParams& p, cudaStream_t stream) {
  using T = typename Source::T;
  constexpr int kSharedBytes = sizeof(SplitKvShared<T, kHeadDim>);
  static_assert(kSharedBytes <= 98 * 1024, "sm_86 and sm_89 allow a block 99 KB");
  static_assert(kHeadDim <= 4 * kWarpSize, "the combine gives every lane four dimensions");
  const int64_t blocks = p.batch * p.num_kv_heads * p.splits;
  const int64_t rows = p.tokens * p.num_q_heads;
  if (blocks > INT32_MAX || rows > INT32_MAX) return cudaErrorInvalidValue;
  if (blocks > 0) {
    const cudaError_t status = launch(split_kv_kernel<kHeadDim, Source>, blocks, kSplitKvThreads,
                                      kSharedBytes, stream, {}, source, p);
    if (status != cudaSuccess) return status;
  }
  if (rows == 0) return cudaSuccess;
  return launch(combine_splits_kernel<T, kHeadDim>, rows, kSplitKvThreads, 0, stream, {}, p);
}

// The part of SplitKvParams that rotary and cross attention fill alike.
template <typename Params>
SplitKvParams split_kv_params(const Params& p, int64_t splits) {
  SplitKvParams s{};
  s.out = p.out;
  s.partial = static_cast<float*>(p.workspace);
  s.statistics =
      reinterpret_cast<float2*>(s.partial + p.batch * p.num_q_heads * splits * p.head_dim);
  s.cu_seqlens = p.cu_seqlens;
  s.tokens = p.tokens;
  s.batch = p.batch;
  s.num_q_heads = static_cast<int>(p.num_q_heads);
  s.num_kv_heads = static_cast<int>(p.num_kv_heads);
  s.splits = static_cast<int>(splits);
  s.scale_log2 = static_cast<float>(p.softmax_scale * 1.4426950408889634);
  return s;
}

}  // namespace mllama
