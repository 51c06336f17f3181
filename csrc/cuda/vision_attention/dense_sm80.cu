// Vision self-attention on the main loop of core_sm80.cuh, for all element types on sm_80 and
// newer; see vision_attention.cu.

#include "../attention/core_sm80.cuh"
#include "../attention/keys_sm80.cuh"
#include "../common/launch.h"
#include "kernels.h"
#include "padding_mask.cuh"

namespace mllama {
namespace {

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    vision_attention_kernel(const __grid_constant__ VisionAttentionParams p) {
  using T = typename Config::T;
  extern __shared__ __align__(16) char shared[];
  const int seqlen = static_cast<int>(p.seqlen), num_heads = static_cast<int>(p.num_heads);
  const int row_blocks = (seqlen + Config::kBlockM - 1) / Config::kBlockM;
  const int row_block = blockIdx.x % row_blocks;  // neighbours share K and V in L2
  const int head = blockIdx.x / row_blocks % num_heads;
  const int64_t batch = blockIdx.x / row_blocks / num_heads;

  __shared__ QueryRows<T> rows;
  if (threadIdx.x == 0) {
    rows.q = static_cast<const T*>(p.q) + batch * p.q_batch_stride + head * p.q_head_stride;
    rows.out = static_cast<T*>(p.out) + (batch * p.seqlen * num_heads + head) * Config::kHeadDim;
    rows.q_token_stride = p.q_token_stride;
    rows.out_token_stride = p.num_heads * Config::kHeadDim;
    rows.q_head_stride = rows.out_head_stride = 0;
    rows.lse = p.lse == nullptr
                   ? nullptr
                   : static_cast<float*>(p.lse) + (batch * num_heads + head) * p.seqlen;
    rows.lse_head_stride = 0;
    rows.group = 1;
    rows.first = row_block * Config::kBlockM;
    rows.count = seqlen;
  }
  __syncthreads();

  DenseKeys<T, Config::kBlockN> keys{
      static_cast<const T*>(p.k) + batch * p.k_batch_stride + head * p.k_head_stride,
      static_cast<const T*>(p.v) + batch * p.v_batch_stride + head * p.v_head_stride,
      p.k_token_stride, p.v_token_stride, seqlen};
  PaddingMask<Config> mask(
      p.padding == nullptr ? nullptr : p.padding + batch * p.padding_batch_stride,
      row_block * Config::kBlockM, seqlen, shared + Config::kSharedBytes);
  attend<Config>(rows, PlainQuery{}, keys, mask, softmax_scale_log2(p.softmax_scale), shared);
}

template <typename Config>
cudaError_t launch_config(const VisionAttentionParams& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div<int64_t>(p.seqlen, Config::kBlockM) * p.num_heads * p.batch;
  const int64_t shared_bytes = Config::kSharedBytes + padding_mask_bytes(p, Config::kBlockN);
  return launch(vision_attention_kernel<Config>, blocks, Config::kThreads, shared_bytes, stream, {},
                p);
}

}  // namespace

cudaError_t vision_dense_sm80(const VisionAttentionParams& p, CUstream_st* stream) {
  return dispatch_dtype(p.dtype, [&](auto element) {
    return dispatch_config<decltype(element)>(
        p.head_dim, [&](auto config) { return launch_config<decltype(config)>(p, stream); });
  });
}

}  // namespace mllama
