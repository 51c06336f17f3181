// Decode attention in one launch on sm_90a: one query row per sequence against many keys, for any
// source of keys, 16-bit types. Flash-Decoding (Dao et al. 2023) whose splits are merged through
// distributed shared memory; online softmax after Milakov, Gimelshein (arXiv 1805.02867).
//
// Tiling     A cluster of 4, 8 or 16 blocks per (sequence, key/value head), see decode.h, fewer
//            where a device does not hold such clusters. Chunks
//            of 16 keys are dealt to 64 strands; a warp takes whole strands, one after the other,
//            and keeps the softmax state of one in registers. The query heads of the group are the
//            columns of m16n8k16 products (decode_heads.cuh), so keys and values are read once
//            for all of them. Warps share nothing until the end: each has its own two-stage ring
//            of chunks, which runs on from one strand into the next.
// Merge      A finished strand is pushed to the blocks of the cluster, to each its slice of the
//            output, and one cluster barrier later every block merges the strands of its slice: no
//            partial result in global memory, no atomics, no second kernel. Blocks without keys
//            only join the barrier and merge. A push goes to other blocks row by row, at the same
//            offsets in each: bank conflicts that a counter sees there are between blocks.
// In flight  4 warps x 2 chunks x (K + V) x 16 keys: 64 KB per block at head dim 128, 32 KB while
//            every warp computes. 4.3 TB/s at a latency of 0.75 us need 24.5 KB per
//            multiprocessor. Up to 108 KB of shared memory, two blocks per multiprocessor.
//            Rows go by cp.async: 16 of 445 PTX instructions per warp and chunk, and a chunk per
//            440 clocks feeds a multiprocessor its share of the bandwidth, so issue slots are not
//            the limit; unlike a tensor copy it pads rows against bank conflicts, takes any
//            strides, and zeroes rows behind the last key.
// Precision  Scores, softmax and sums in float32; weights are rounded to 16 bits before the product
//            with v.
// Traffic    Keys and values once, 2 * length * Hkv * D elements, and nothing else of size. Floors
//            at 4.3 TB/s, 8 heads of 128, bf16: 1k keys 4.2 MB, 1 us; 8k 33.5 MB, 7.8 us; 32k
//            134 MB, 31 us; batch 32 of 4k 537 MB, 125 us; 6404 image keys 26.2 MB, 6.1 us. At 1k
//            every warp has one chunk and the time is that of a chain: launch, lengths and pages,
//            keys, two products, barrier, merge. Batch 32 runs in 3.9 waves of two blocks per
//            multiprocessor; a block's first loads and its merge hide behind the other block.
// Order      Within a strand ascending keys; 8 groups of strands (index mod 8) each in ascending
//            order, then a tree over the groups. Nothing else has an influence: bit-identical in
//            every run, batch and cluster size.
// Launch     Overlaps the end of the kernel before (sm90.cuh); all it reads may come from there,
//            so before the wait a block only tells its cluster that it is there.
// Aliasing   out overlaps no input.
//
// A source is a plain struct passed by value:
//   T, shared_ints()        the element type; how many ints of shared memory it needs (host)
//   Keys                    chunks: how many there are, 0 if nothing is to be seen; appended: the
//                           chunk whose last key the launch itself appends, or -1
//   Reader(source, b, kv_head, first, next_strand)
//                           of one warp, whose strands are first, first + next_strand, ...; may
//                           start loads of its own
//   Keys open(b, shared)    called by all threads; `shared` are its ints
//   KeyRun<T> Reader::run(keys, chunk)
//                           called by all lanes, with the warp's chunks in order
//   void append(keys, b, kv_head, AppendedRow&)
//                           called by the warp that has the chunk `appended`; writes the new rows
//                           to memory and to shared memory, from where the warp takes them
//   void load_query(keys, b, kv_head, query, row_elements)
//                           called by all threads; writes the group's query rows
#pragma once

#include <algorithm>

#include "../common/launch.h"
#include "../common/sm90.cuh"
#include "decode_heads.cuh"
#include "decode_split.cuh"

namespace mllama {

constexpr int kClusterMinBlocks = 2;  // what shared memory allows at head dim 128

struct SplitKvClusterParams {
  void* out;                  // (tokens, num_q_heads, head_dim)
  const int32_t* cu_seqlens;  // (batch + 1,), or null: sequence b is row b
  int64_t tokens, batch;
  int num_q_heads, num_kv_heads;
  int blocks;      // of a cluster
  int slice_log2;  // quads of output per block
  int merge_bytes;
  float scale_log2;
};

// A key and a value row that the launch itself puts into the cache.
template <typename T, int kHeadDim>
struct AppendedRow {
  alignas(16) T k[kHeadDim];
  alignas(16) T v[kHeadDim];
};

// The chunks of one warp, strand after strand.
struct StrandWalk {
  int chunks;       // of the sequence
  int next_strand;  // from one strand of the warp to its next
  int strand, chunk;

  __device__ __forceinline__ StrandWalk(int chunks, int first, int next_strand)
      : chunks(chunks), next_strand(next_strand), strand(first), chunk(first) {}

  // Strands ascend, so none behind an empty one has chunks.
  __device__ __forceinline__ bool done() const { return strand >= kStrands || chunk >= chunks; }
  __device__ __forceinline__ bool ends_strand() const { return chunk + kStrands >= chunks; }
  __device__ __forceinline__ void advance() {
    if (ends_strand()) {
      chunk = strand += next_strand;
    } else {
      chunk += kStrands;
    }
  }
};

template <typename T, int kHeadDim>
struct SplitKvClusterShared {
  using Tile = SplitTile<T, kHeadDim>;

  struct Stage {
    T k[kChunkKeys * Tile::kRowElements];
    T v[kChunkKeys * Tile::kRowElements];
  };
  Stage stages[kSplitKvWarps][kSplitKvStages];
  alignas(16) T query[kClusterMaxGroup * Tile::kRowElements];
  AppendedRow<T, kHeadDim> appended;
  int counts[kSplitKvWarps][kSplitKvStages];  // visible keys of the chunk in the stage
};

// The results of all strands for one block's slice of the output, written by all blocks of the
// cluster.
class StrandResults {
 public:
  __device__ __forceinline__ StrandResults(char* shared, int slice_log2)
      : out_(reinterpret_cast<float4*>(shared)),
        pitch_((1 << slice_log2) | 1),
        statistics_(reinterpret_cast<float2*>(shared + kStrands * pitch_ * sizeof(float4))) {}

  __device__ __forceinline__ float4* out(int strand, int quad) const {
    return out_ + strand * pitch_ + quad;
  }
  // Maximum in the exp2 domain, and sum.
  __device__ __forceinline__ float2* statistics(int strand, int row) const {
    return statistics_ + row * (kStrands + 1) + strand;
  }

 private:
  float4* out_;
  int pitch_;
  float2* statistics_;
};

// Whether row `token` of the output belongs to a sequence.
__device__ __forceinline__ bool is_sequence_row(const SplitKvClusterParams& p, int64_t token) {
  return find_sequence(p.cu_seqlens, p.batch, 1, token, p.tokens) >= 0;
}

// Merges the strands of this block's slice and stores it. Eight lanes share a quad, each with every
// eighth strand.
template <typename T, int kHeadDim>
__device__ __forceinline__ void merge_strands(const StrandResults& results, int first_quad,
                                              int quads, int strands, T* out) {
  constexpr int kLanes = 8;
  const int lane = threadIdx.x % kLanes;
  // The shuffles take whole warps: quads behind the last are merged, but not stored.
  for (int i = threadIdx.x; i / kWarpSize * kWarpSize < quads * kLanes; i += kSplitKvThreads) {
    const int quad = min(i / kLanes, quads - 1);
    const int row = (first_quad + quad) * 4 / kHeadDim;
    float maximum = -INFINITY;
    for (int s = lane; s < strands; s += kLanes)
      maximum = fmaxf(maximum, results.statistics(s, row)->x);
    maximum = warp_max<kLanes>(maximum);
    const float shift = maximum == -INFINITY ? 0.0f : maximum;
    float sum = 0.0f;
    float4 total = {};
#pragma unroll 4
    for (int s = lane; s < strands; s += kLanes) {
      const float2 statistics = *results.statistics(s, row);
      const float4 part = *results.out(s, quad);
      const float weight = exp2f(statistics.x - shift);
      sum = fmaf(weight, statistics.y, sum);
      total = {fmaf(weight, part.x, total.x), fmaf(weight, part.y, total.y),
               fmaf(weight, part.z, total.z), fmaf(weight, part.w, total.w)};
    }
    sum = warp_sum<kLanes>(sum);
    total = {warp_sum<kLanes>(total.x), warp_sum<kLanes>(total.y), warp_sum<kLanes>(total.z),
             warp_sum<kLanes>(total.w)};
    if (lane != 0 || i / kLanes >= quads) continue;
    const float divisor = sum == 0.0f ? 1.0f : sum;  // nothing seen: the total is 0 as well
    *reinterpret_cast<uint2*>(out + (first_quad + quad) * 4) =
        make_uint2(pack_pair<T>(total.x / divisor, total.y / divisor),
                   pack_pair<T>(total.z / divisor, total.w / divisor));
  }
}

template <int kHeadDim, typename Source>
__global__ void __launch_bounds__(kSplitKvThreads, kClusterMinBlocks)
    split_kv_cluster_kernel(const __grid_constant__ Source source,
                            const __grid_constant__ SplitKvClusterParams p) {
#ifdef MLLAMA_SM90A_DEVICE
  using T = typename Source::T;
  using Shared = SplitKvClusterShared<T, kHeadDim>;
  using Tile = typename Shared::Tile;
  extern __shared__ uint4 shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  const StrandResults results(reinterpret_cast<char*>(&shared + 1), p.slice_log2);

  const int rank = static_cast<int>(cluster_rank());
  const unsigned pair = blockIdx.x / static_cast<unsigned>(p.blocks);
  const int kv_head = static_cast<int>(pair % static_cast<unsigned>(p.num_kv_heads));
  const int64_t b = pair / static_cast<unsigned>(p.num_kv_heads);
  const int group = p.num_q_heads / p.num_kv_heads;
  const int warp = warp_uniform(threadIdx.x / kWarpSize);
  // Four neighbouring strands to a block, then the next block, so that short sequences spread.
  const int first = rank * kSplitKvWarps + warp, next_strand = p.blocks * kSplitKvWarps;

  cluster_sync_arrive();  // this block is there: the others may write to its shared memory
  wait_for_previous_kernel();
  start_next_kernel();

  typename Source::Reader reader(source, b, kv_head, first, next_strand);
  const typename Source::Keys keys =
      source.open(b, reinterpret_cast<int*>(reinterpret_cast<char*>(&shared + 1) + p.merge_bytes));
  StrandWalk ahead(keys.chunks, first, next_strand);
  const auto copy = [&](int stage) {
    if (!ahead.done()) {
      KeyRun<T> run = reader.run(keys, ahead.chunk);
      if (threadIdx.x % kWarpSize == 0) shared.counts[warp][stage] = run.count;
      if (ahead.chunk == keys.appended) --run.count;
      auto& to = shared.stages[warp][stage];
      copy_split_tile<T, kHeadDim, kChunkKeys>(to.k, to.v, run);
      ahead.advance();
    }
    cp_async_commit();  // one group per chunk, empty behind the last, so that the waits count alike
  };
#pragma unroll
  for (int stage = 0; stage < kSplitKvStages; ++stage) copy(stage);

  const int append_strand = keys.appended % kStrands;
  if (keys.appended >= 0 && append_strand % next_strand == first) {
    source.append(keys, b, kv_head, shared.appended);
  }
  if (keys.chunks > 0) source.load_query(keys, b, kv_head, shared.query, Tile::kRowElements);
  for (int i = group * Tile::kRowElements + threadIdx.x; i < kClusterMaxGroup * Tile::kRowElements;
       i += kSplitKvThreads) {
    shared.query[i] = from_f32<T>(0.0f);
  }
  if (rank == 0 && b < p.tokens && p.cu_seqlens != nullptr && !is_sequence_row(p, b)) {
    T* out = static_cast<T*>(p.out) + (b * p.num_kv_heads + kv_head) * group * kHeadDim;
    for (int i = threadIdx.x; i < group * kHeadDim; i += kSplitKvThreads)
      out[i] = from_f32<T>(0.0f);
  }
  __syncthreads();
  cluster_sync_wait();

  if (keys.chunks > 0) {
    HeadsWarp<T, kHeadDim> state;
    state.load_query(shared.query);
    state.reset();
    int stage = 0;
    for (StrandWalk at(keys.chunks, first, next_strand); !at.done(); at.advance()) {
      cp_async_wait<kSplitKvStages - 1>();
      __syncwarp();  // the chunk was copied by all lanes
      auto& tile = shared.stages[warp][stage];
      const int count = shared.counts[warp][stage];
      if (at.chunk == keys.appended && count > 0) {
        const int lane = threadIdx.x % kWarpSize, i = lane % 16 * Vec<T>::kSize;
        static_assert(kHeadDim <= 16 * Vec<T>::kSize, "half a warp copies a row");
        const int to = (count - 1) * Tile::kRowElements + i;
        if (i < kHeadDim) {
          store_vec((lane < 16 ? tile.k : tile.v) + to,
                    load_vec((lane < 16 ? shared.appended.k : shared.appended.v) + i));
        }
        __syncwarp();
      }
      state.step(tile.k, tile.v, count, p.scale_log2);
      __syncwarp();  // every lane has read the stage that is filled next
      copy(stage);
      stage = stage + 1 == kSplitKvStages ? 0 : stage + 1;
      if (!at.ends_strand()) continue;
      state.emit(
          group,
          [&](int head, float maximum, float sum) {
            const float2* local = results.statistics(at.strand, head);
            for (int to = threadIdx.x % kWarpSize / 4; to < p.blocks; to += kWarpSize / 4)
              cluster_store(cluster_address(local, to), make_float2(maximum, sum));
          },
          [&](int head, int dimension, float value) {
            const int quad = (head * kHeadDim + dimension) / 4;
            const float4* local = results.out(at.strand, quad & ((1 << p.slice_log2) - 1));
            cluster_store(cluster_address(reinterpret_cast<const float*>(local) + dimension % 4,
                                          quad >> p.slice_log2),
                          value);
          });
      state.reset();
    }
  }
  cp_async_wait<0>();
  __syncwarp();  // the barrier below takes whole warps
  cluster_sync();

  const int first_quad = rank << p.slice_log2;
  const int quads = min(group * kHeadDim / 4 - first_quad, 1 << p.slice_log2);
  if (keys.token < 0 || quads <= 0) return;
  T* out = static_cast<T*>(p.out) +
           (keys.token * p.num_kv_heads + kv_head) * static_cast<int64_t>(group) * kHeadDim;
  merge_strands<T, kHeadDim>(results, first_quad, quads, min(keys.chunks, kStrands), out);
#else
  __trap();
#endif
}

// Sequences times key/value heads; rows of no sequence need a block as well: it writes their zeros.
template <typename Params>
int64_t cluster_pairs(const Params& p) {
  return std::max(p.batch, p.tokens) * p.num_kv_heads;
}

// What each block of a cluster keeps of all strands' results, and all its shared memory.
struct ClusterMemory {
  int64_t slice_log2, merge_bytes, shared_bytes;
};

template <int kHeadDim, typename Source, typename Params>
ClusterMemory cluster_memory(const Source& source, const Params& p, int64_t blocks) {
  using Shared = SplitKvClusterShared<typename Source::T, kHeadDim>;
  const int64_t group = p.num_q_heads / p.num_kv_heads;
  const int64_t slice_log2 = cluster_slice_log2(group, kHeadDim, blocks);
  const int64_t merge_bytes = cluster_merge_bytes(group, slice_log2);
  return {slice_log2, merge_bytes,
          int64_t{sizeof(Shared)} + merge_bytes + source.shared_ints() * int64_t{sizeof(int)}};
}

// Blocks of the clusters for a call: cluster_blocks(), or fewer if the current device cannot hold
// such clusters; 0 if it holds none.
template <int kHeadDim, typename Source, typename Params>
int64_t held_cluster_blocks(const Source& source, const Params& p) {
  const void* const kernel = address_of(split_kv_cluster_kernel<kHeadDim, Source>);
  int64_t blocks = cluster_blocks(cluster_pairs(p), p.num_q_heads / p.num_kv_heads);
  while (blocks > 0 &&
         !holds_cluster(kernel, kSplitKvThreads,
                        cluster_memory<kHeadDim>(source, p, blocks).shared_bytes, blocks)) {
    blocks /= 2;
  }
  return blocks;
}

template <int kHeadDim, typename Source, typename Params>
cudaError_t launch_split_kv_cluster(const Source& source, const Params& params, int64_t blocks,
                                    CUstream_st* stream) {
  const int64_t pairs = cluster_pairs(params);
  if (pairs == 0) return cudaSuccess;
  const ClusterMemory memory = cluster_memory<kHeadDim>(source, params, blocks);

  SplitKvClusterParams p{};
  p.out = params.out;
  p.cu_seqlens = params.cu_seqlens;
  p.tokens = params.tokens;
  p.batch = params.batch;
  p.num_q_heads = static_cast<int>(params.num_q_heads);
  p.num_kv_heads = static_cast<int>(params.num_kv_heads);
  p.blocks = static_cast<int>(blocks);
  p.slice_log2 = static_cast<int>(memory.slice_log2);
  p.scale_log2 = static_cast<float>(params.softmax_scale * 1.4426950408889634);
  p.merge_bytes = static_cast<int>(memory.merge_bytes);
  LaunchOptions options;
  options.cluster = static_cast<unsigned>(blocks);
  options.overlap = true;
  return launch(split_kv_cluster_kernel<kHeadDim, Source>, pairs * blocks, kSplitKvThreads,
                memory.shared_bytes, stream, options, source, p);
}

}  // namespace mllama
