// Text queries over image tiles for sm_90a: the prefill kernel of cross_attention.cu on the core of
// core_sm90.cuh, for 16-bit elements. Semantics and aliasing are described there.
//
// Tiling     One block per (sequence, kv head, 128 rows of packed query heads), 128 keys of a tile
//            at a time. q is normalised by the computing warps on its way into shared memory, while
//            the first keys arrive.
// Keys       Tensor copies of 128 rows; tiles are a dimension of their own, and what a copy reaches
//            beyond its tile arrives as zeros and is masked: 1601 keys are 13 blocks, 3.9 % more.
// Mask       A tile that no row of the block sees is not visited. One that some see is attended to
//            as if all did, with no mask but at its end, and added to the rows that see it: tiles
//            are segments (segments_sm90.cuh). For 4 tiles at head dim 128 that moves 384 KB
//            within shared memory per block of rows, beside 18 MB that its products read.
// Traffic    K and V of the visited tiles once per block of rows, from L2 after the first. 2048
//            rows, 4 tiles, 32 heads of 128: 215 GFLOP, 272 us at 790 TFLOP/s, 512 blocks.
// Latency    Where blocks of rows are too few to fill the device, or fill it badly, a cluster of
//            blocks takes the tiles of the same rows, one each (cross_sm90_cluster), and adds up
//            in the order of one block: to the same bits. 32 rows of 32 query and 8 key/value heads
//            are then 32 blocks of 13 key blocks in a row, not 8 of 52.

#include "../attention/rows_sm90.cuh"
#include "../common/device.h"
#include "../common/launch.h"
#include "../common/tensor_map.h"
#include "block.cuh"
#include "kernels.h"

namespace mllama {
namespace {

struct TileMaps {
  CUtensorMap k, v;
};

template <typename Config>
struct MappedTiles {
  const TileMaps& maps;
  const Segment* segments;
  int kv_head;

  __device__ __forceinline__ void copy_k(int block, char* tile, uint64_t* barrier) const {
    copy(maps.k, block, tile, barrier);
  }
  __device__ __forceinline__ void copy_v(int block, char* tile, uint64_t* barrier) const {
    copy(maps.v, block, tile, barrier);
  }
  __device__ __forceinline__ int count(int) const { return Config::kBlockN; }

 private:
  __device__ __forceinline__ void copy(const CUtensorMap& map, int block, char* tile,
                                       uint64_t* barrier) const {
    const int key = (block & ((1 << kSubBits) - 1)) * Config::kBlockN;
    copy_tile<typename Config::KeyLayout>(tile, map, barrier, key, kv_head,
                                          segments[block >> kSubBits].slot);
  }
};

// Dynamic shared memory: the operands, the totals of segments, the segments.
template <typename Config>
struct CrossShared {
  AttentionSm90Shared<Config> attention;
  alignas(16) char totals[SegmentTotals<Config>::kBytes];
  Segment segments[kMaxSm90Tiles];
};

template <typename T, int kHeadDim>
using CrossConfig = AttentionSm90Config<T, kHeadDim, kCrossSm90Tile.rows, kCrossSm90Tile.keys>;

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    cross_attention_sm90_kernel(const __grid_constant__ CrossAttentionParams p,
                                const __grid_constant__ TileMaps maps, const int cluster) {
#ifdef MLLAMA_SM90A_DEVICE
  using T = typename Config::T;
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<CrossShared<Config>*>(memory);
  const CrossBlock block(p, Config::kBlockM, blockIdx.x / cluster);
  if (block.empty()) return;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&maps.k);
    prefetch_tensor_map(&maps.v);
    shared.attention.init_barriers();
    block.fill(shared.attention.rows, p, Config::kHeadDim);
  }
  __syncthreads();

  TileMask<Config, true> mask(p, shared.attention.rows, block.b, block.sequence.begin,
                              shared.segments);
  if (cluster > 1) mask.keep_segment(static_cast<int>(cluster_rank()));
  const CrossQuery<T> query{{static_cast<const T*>(p.q_norm_weight), p.eps}};
  const MappedTiles<Config> keys{maps, shared.segments, static_cast<int>(block.kv_head)};
  attend_sm90<Config>(shared.attention, query, keys, mask, softmax_scale_log2(p.softmax_scale),
                      {shared.totals, cluster});
#else
  __trap();
#endif
}

template <typename Config>
cudaError_t launch_config(const CrossAttentionParams& p, cudaStream_t stream) {
  using Layout = typename Config::KeyLayout;
  static_assert(sizeof(CrossShared<Config>) <= 227 * 1024, "what a block of sm_90 can have");
  const int64_t blocks = cross_blocks(p, Config::kBlockM);
  if (blocks == 0) return cudaSuccess;
  TileMaps maps;
  cudaError_t status = make_rows_map<Layout>(maps.k, p.dtype, tile_keys(p), Config::kBlockN);
  if (status != cudaSuccess) return status;
  status = make_rows_map<Layout>(maps.v, p.dtype, tile_values(p), Config::kBlockN);
  if (status != cudaSuccess) return status;
  int multiprocessors = 0;
  status = count_multiprocessors(multiprocessors);
  if (status != cudaSuccess) return status;
  const auto kernel = cross_attention_sm90_kernel<Config>;
  int cluster = cross_sm90_cluster(blocks, p.tiles, multiprocessors);
  if (!holds_cluster(address_of(kernel), Config::kThreads, sizeof(CrossShared<Config>), cluster)) {
    cluster = 1;  // to the same bits
  }
  LaunchOptions options;
  options.cluster = static_cast<unsigned>(cluster);
  return launch(kernel, blocks * cluster, Config::kThreads, sizeof(CrossShared<Config>), stream,
                options, p, maps, cluster);
}

}  // namespace

cudaError_t cross_prefill_sm90(const CrossAttentionParams& p, CUstream_st* stream) {
  return dispatch_sm90(p.dtype, p.head_dim, [&](auto element, auto head_dim) {
    return launch_config<CrossConfig<decltype(element), decltype(head_dim)::value>>(p, stream);
  });
}

}  // namespace mllama
