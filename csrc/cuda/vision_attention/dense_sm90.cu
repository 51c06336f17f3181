// Vision self-attention for sm_90a: what vision_attention.cu computes, on the core of
// core_sm90.cuh, for 16-bit elements.
//
// Tiling     One block per (batch, head, 128 query rows), 176 keys at a time at head dim 80. That
//            head dim is native: tiles are five panels of 16 columns, a step of the scores reads
//            one, and outputs are products of 80 columns.
// Mask       As vision_attention.cu: valid queries take no mask but at the sequence's end; padding
//            queries alone look at one bit per key and skip key blocks that are all padding.
// Traffic    q, k, v read and out written once from HBM, 4 * B * S * H * D elements; K and V of a
//            head stay in L2 for its row blocks. 4 tiles, S 6432, 16 heads of 80, bf16: 66 MB, 15
//            us at 4.3 TB/s; 4 * S^2 * H * D = 212 GFLOP, 0.27 ms at 790 TFLOP/s: bound by the
//            products. exp2 takes 0.8 of their time, at the same time.
// Aliasing   As vision_attention.cu.

#include "../attention/rows_sm90.cuh"
#include "../common/launch.h"
#include "../common/tensor_map.h"
#include "kernels.h"
#include "padding_mask.cuh"

namespace mllama {
namespace {

struct VisionMaps {
  CUtensorMap q, k, v;
};

template <typename Config>
struct VisionQuery {
  const CUtensorMap& map;
  int row, head, batch;

  __device__ __forceinline__ void copy(char* tile, uint64_t* barrier) const {
    copy_tile<typename Config::QueryLayout>(tile, map, barrier, row, head, batch);
  }
};

template <typename Config>
struct VisionKeys {
  const VisionMaps& maps;
  int head, batch;

  __device__ __forceinline__ void copy_k(int block, char* tile, uint64_t* barrier) const {
    copy_tile<typename Config::KeyLayout>(tile, maps.k, barrier, block * Config::kBlockN, head,
                                          batch);
  }
  __device__ __forceinline__ void copy_v(int block, char* tile, uint64_t* barrier) const {
    copy_tile<typename Config::KeyLayout>(tile, maps.v, barrier, block * Config::kBlockN, head,
                                          batch);
  }
  __device__ __forceinline__ int count(int) const { return Config::kBlockN; }
};

template <typename T, int kHeadDim>
using VisionConfig = AttentionSm90Config<T, kHeadDim, dense_sm90_tile(kHeadDim).rows,
                                         dense_sm90_tile(kHeadDim).keys>;

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    vision_attention_sm90_kernel(const __grid_constant__ VisionAttentionParams p,
                                 const __grid_constant__ VisionMaps maps) {
#ifdef MLLAMA_SM90A_DEVICE
  using T = typename Config::T;
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<AttentionSm90Shared<Config>*>(memory);
  const int seqlen = static_cast<int>(p.seqlen), num_heads = static_cast<int>(p.num_heads);
  const int row_blocks = (seqlen + Config::kBlockM - 1) / Config::kBlockM;
  const int row_block = blockIdx.x % row_blocks;  // neighbours share K and V in L2
  const int head = blockIdx.x / row_blocks % num_heads;
  const int batch = blockIdx.x / row_blocks / num_heads;
  const int first = row_block * Config::kBlockM;

  if (threadIdx.x == 0) {
    prefetch_tensor_map(&maps.q);
    prefetch_tensor_map(&maps.k);
    prefetch_tensor_map(&maps.v);
    shared.init_barriers();
    QueryRows<T>& rows = shared.rows;
    rows.out = static_cast<T*>(p.out) + (batch * p.seqlen * num_heads + head) * Config::kHeadDim;
    rows.out_token_stride = p.num_heads * Config::kHeadDim;
    rows.out_head_stride = 0;
    rows.lse = p.lse == nullptr
                   ? nullptr
                   : static_cast<float*>(p.lse) + (batch * num_heads + head) * p.seqlen;
    rows.lse_head_stride = 0;
    rows.group = 1;
    rows.first = first;
    rows.count = seqlen;
  }
  __syncthreads();

  WidePaddingMask<Config> mask(
      p.padding == nullptr ? nullptr : p.padding + batch * p.padding_batch_stride, first, seqlen,
      reinterpret_cast<BlockPadding<Config::kBlockN>*>(memory +
                                                       sizeof(AttentionSm90Shared<Config>)));
  attend_sm90<Config>(shared, VisionQuery<Config>{maps.q, first, head, batch},
                      VisionKeys<Config>{maps, head, batch}, mask,
                      softmax_scale_log2(p.softmax_scale));
#else
  __trap();
#endif
}

template <typename Config>
cudaError_t launch_config(const VisionAttentionParams& p, cudaStream_t stream) {
  using KeyLayout = typename Config::KeyLayout;
  using QueryLayout = typename Config::QueryLayout;
  VisionMaps maps;
  cudaError_t status =
      make_rows_map<QueryLayout>(maps.q, p.dtype, vision_queries(p), Config::kBlockM);
  if (status != cudaSuccess) return status;
  status = make_rows_map<KeyLayout>(maps.k, p.dtype, vision_keys(p), Config::kBlockN);
  if (status != cudaSuccess) return status;
  status = make_rows_map<KeyLayout>(maps.v, p.dtype, vision_values(p), Config::kBlockN);
  if (status != cudaSuccess) return status;
  const int64_t blocks = ceil_div<int64_t>(p.seqlen, Config::kBlockM) * p.num_heads * p.batch;
  const int64_t padding = p.padding == nullptr ? 0
                                               : ceil_div<int64_t>(p.seqlen, Config::kBlockN) *
                                                     int64_t{sizeof(BlockPadding<Config::kBlockN>)};
  return launch(vision_attention_sm90_kernel<Config>, blocks, Config::kThreads,
                int64_t{sizeof(AttentionSm90Shared<Config>)} + padding, stream, {}, p, maps);
}

}  // namespace

cudaError_t vision_dense_sm90(const VisionAttentionParams& p, CUstream_st* stream) {
  return dispatch_sm90(p.dtype, p.head_dim, [&](auto element, auto head_dim) {
    return launch_config<VisionConfig<decltype(element), decltype(head_dim)::value>>(p, stream);
  });
}

}  // namespace mllama
