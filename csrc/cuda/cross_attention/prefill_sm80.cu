// Text queries over image tiles on the main loop of core_sm80.cuh: the prefill of
// cross_attention.cu for all element types on sm_80 and newer.

#include "../attention/core_sm80.cuh"
#include "../common/launch.h"
#include "block.cuh"
#include "kernels.h"

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
  const Segment* segments;

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
    const int64_t slot = segments[block >> kSubBits].slot;
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

  Segment* const segments = reinterpret_cast<Segment*>(shared + Config::kSharedBytes);
  TileMask<Config, false> mask(p, rows, block.b, block.sequence.begin, segments);
  TileKeys<T, Config::kBlockN> keys{&pool, segments};
  const CrossQuery<T> query{{static_cast<const T*>(p.q_norm_weight), p.eps}};
  attend<Config>(rows, query, keys, mask, softmax_scale_log2(p.softmax_scale), shared);
}

template <typename Config>
cudaError_t launch_config(const CrossAttentionParams& p, cudaStream_t stream) {
  const int64_t blocks = cross_blocks(p, Config::kBlockM);
  if (blocks == 0) return cudaSuccess;
  const int64_t shared_bytes =
      Config::kSharedBytes + p.tiles * static_cast<int64_t>(sizeof(Segment));
  return launch(cross_attention_kernel<Config>, blocks, Config::kThreads, shared_bytes, stream, {},
                p);
}

}  // namespace

cudaError_t cross_prefill_sm80(const CrossAttentionParams& p, CUstream_st* stream) {
  return dispatch_dtype(p.dtype, [&](auto element) {
    return dispatch_config<decltype(element), true>(
        p.head_dim, [&](auto config) { return launch_config<decltype(config)>(p, stream); });
  });
}

}  // namespace mllama
