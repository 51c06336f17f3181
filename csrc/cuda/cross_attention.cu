// Text queries over image tiles, grouped-query attention with one visibility flag per (query,
// tile). Online softmax in FlashAttention-2 order (arXiv 2307.08691); main loop in attention.cuh.
// 16 bits on sm_90a: cross_attention_sm90.cu.
//
// Tiling     One block per (sequence, kv head, 128 rows; float32: 64). The G query heads of a group
//            are packed into the rows, so each K and V block is read once for G heads. A tile's
//            keys are its own blocks: 1601 patches are 50 of 32 and one of 1, and no block
//            straddles tiles. One query row per sequence (decode) goes to split-KV (split_kv.cuh,
//            on sm_90a split_kv_cluster.cuh) instead.
// Mask       Per block of rows every tile is one of: seen by no row (or absent), skipped before its
//            loads are issued; seen by all, no mask; mixed, a select per row. One flag per tile,
//            never per key: 8 KB instead of 26 MB at 2048 rows, 4 tiles, 6404 keys.
// Hidden     A row's scores for a hidden tile are replaced, not added to, and its output skips the
//            product with the tile's values: NaN in a tile that another row sees stays out.
// Empty      A row that sees nothing keeps sum 0 and stores 0. So does a row of no sequence.
// Precision  As attention.cuh; q_norm on the way into shared memory with the roundings of rms_norm.
// Traffic    K and V of the visible tiles once per block of rows, from L2 after the first. Prefill
//            of 512 rows, 4 tiles, 32 heads of 128, bf16: 53.7 GFLOP, 68 us at 790 TFLOP/s, bound
//            by the products. Below some 500 tokens there are fewer blocks than multiprocessors,
//            and time stays that of one block: 6404 keys in a row.
// Aliasing   out aliases nothing. Rows of q, k and v may be strided, but start on 16 bytes.

#include "attention.cuh"
#include "cross_attention_block.cuh"
#include "cross_attention_sm90.h"
#include "hopper.h"
#include "split_kv.h"

namespace mllama {
namespace {

// K and V of one kv head in the pool of tiles; kept in shared memory to spare registers.
template <typename T>
struct TilePool {
  const T* k;
  const T* v;
  int64_t k_slot_stride, k_token_stride, v_slot_stride, v_token_stride;
  int tile_tokens;
};

template <typename T, int kBlockN>
struct TileKeys {
  const TilePool<T>* pool;
  const TileVisit* visits;

  __device__ __forceinline__ RowRun<T> k_run(int block, int first) const {
    return run(pool->k, pool->k_slot_stride, pool->k_token_stride, block, first);
  }
  __device__ __forceinline__ RowRun<T> v_run(int block, int first) const {
    return run(pool->v, pool->v_slot_stride, pool->v_token_stride, block, first);
  }

 private:
  __device__ __forceinline__ RowRun<T> run(const T* base, int64_t slot_stride, int64_t token_stride,
                                           int block, int first) const {
    const int key = (block & ((1 << kSubBits) - 1)) * kBlockN + first;
    const int64_t slot = visits[block >> kSubBits].slot;
    return {base + slot * slot_stride + key * token_stride, token_stride, pool->tile_tokens - key};
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    cross_attention_kernel(const __grid_constant__ CrossAttentionParams p) {
  using T = typename Config::T;
  extern __shared__ __align__(16) char shared[];
  const CrossBlock block(p, Config::kBlockM, blockIdx.x);
  if (block.empty()) return;

  __shared__ QueryRows<T> rows;
  __shared__ TilePool<T> pool;
  if (threadIdx.x == 0) {
    block.fill(rows, p, Config::kHeadDim);
    pool.k = static_cast<const T*>(p.k) + block.kv_head * p.k_head_stride;
    pool.v = static_cast<const T*>(p.v) + block.kv_head * p.v_head_stride;
    pool.k_slot_stride = p.k_slot_stride;
    pool.k_token_stride = p.k_token_stride;
    pool.v_slot_stride = p.v_slot_stride;
    pool.v_token_stride = p.v_token_stride;
    pool.tile_tokens = static_cast<int>(p.tile_tokens);
  }
  __syncthreads();

  TileVisit* const visits = reinterpret_cast<TileVisit*>(shared + Config::kSharedBytes);
  TileMask<Config, false> mask(p, rows, block.b, block.sequence.begin, visits);
  TileKeys<T, Config::kBlockN> keys{&pool, visits};
  const CrossQuery<T> query{{static_cast<const T*>(p.q_norm_weight), p.eps}};
  attend<Config>(rows, query, keys, mask, softmax_scale_log2(p.softmax_scale), shared);
}

template <typename Config>
cudaError_t launch_config(const CrossAttentionParams& p, cudaStream_t stream) {
  const int64_t blocks = cross_blocks(p, Config::kBlockM);
  if (blocks == 0) return cudaSuccess;
  const int64_t shared_bytes =
      Config::kSharedBytes + p.tiles * static_cast<int64_t>(sizeof(TileVisit));
  return launch(cross_attention_kernel<Config>, blocks, Config::kThreads, shared_bytes, stream, {},
                p);
}

constexpr int kFillThreads = 256;
__global__ void __launch_bounds__(kFillThreads) fill_kernel(float* target, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFillThreads + threadIdx.x;
  if (i < count) target[i] = INFINITY;
}

// What rows of no sequence get, for all rows.
cudaError_t fill_for_no_sequence(const CrossAttentionParams& p, cudaStream_t stream) {
  const int64_t rows = p.tokens * p.num_q_heads;
  if (p.lse != nullptr) {
    const cudaError_t status =
        launch(fill_kernel, ceil_div<int64_t>(rows, kFillThreads), kFillThreads, 0, stream, {},
               static_cast<float*>(p.lse), rows);
    if (status != cudaSuccess) return status;
  }
  return cudaMemsetAsync(p.out, 0, rows * p.head_dim * element_size(p.dtype), stream);
}

// Blocks of the clusters that decode a call; 0: it is not decoded by clusters.
int64_t decode_cluster(const CrossAttentionParams& p) {
  return uses_cluster(p) && runs_sm90a() ? cross_decode_cluster(p) : 0;
}

}  // namespace

// Clusters need none, but whether they will run is not known here: the current device may not yet
// be that of the tensors.
int64_t cross_attention_workspace(const CrossAttentionParams& p) {
  return uses_split_kv(p) ? cross_decode_workspace(p) : 0;
}

int cross_attention_cuda(const CrossAttentionParams& p, CUstream_st* stream) {
  if (p.tokens == 0 || p.num_q_heads == 0) return cudaSuccess;
  if (p.max_seqlen * (p.num_q_heads / p.num_kv_heads) > kMaxAttentionRows || p.tiles >= kMaxTiles ||
      p.num_slots > INT32_MAX || p.tile_tokens > kMaxTileTokens || !(p.softmax_scale > 0)) {
    return cudaErrorInvalidValue;
  }
  if (!rows_aligned(
          p.dtype, {p.q, p.k, p.v, p.q_norm_weight, p.out},
          {p.q_batch_stride, p.q_token_stride, p.q_head_stride, p.k_slot_stride, p.k_token_stride,
           p.k_head_stride, p.v_slot_stride, p.v_token_stride, p.v_head_stride})) {
    return cudaErrorMisalignedAddress;
  }
  if (const int64_t blocks = decode_cluster(p); blocks > 0) {
    return cross_decode_cluster_cuda(p, blocks, stream);
  }
  if (uses_split_kv(p)) return cross_decode_cuda(p, stream);
  if (p.cu_seqlens != nullptr) {
    const cudaError_t status = fill_for_no_sequence(p, stream);
    if (status != cudaSuccess) return status;
  }
  if (uses_cross_sm90(p) && runs_sm90a()) return cross_attention_sm90(p, stream);
  return dispatch_dtype(p.dtype, [&](auto element) {
    return dispatch_config<decltype(element), true>(
        p.head_dim, [&](auto config) { return launch_config<decltype(config)>(p, stream); });
  });
}

}  // namespace mllama
