// Vision self-attention over all tiles of an image; non-causal. Only (padding query, padding key)
// pairs are masked: valid queries do attend to padding keys, so absent tiles cannot be dropped.
// Online softmax in FlashAttention-2 order (arXiv 2307.08691); main loop in attention.cuh. 16 bits
// on sm_90a: vision_attention_sm90.cu.
//
// Tiling     One block per (batch, head, 128 query rows; float32: 64). Head dim 80 is native: 5
//            k-steps for the scores, 10 n-tiles for the output, shared rows of 176 bytes.
// Mask       One bit per token, read where it matters: a block of valid queries needs no mask at
//            all, a block of padding queries skips key blocks that are all padding before their
//            loads, and only blocks that mix are masked per element. A padding query that sees
//            nothing gives zeros.
// Precision  As attention.cuh.
// Traffic    q, k, v read and out written once from HBM, 4 * B * S * H * D elements; K and V of a
//            head stay in L2 for its row blocks. 4 tiles, S 6432, 16 heads of 80, bf16: 66 MB, 15
//            us at 4.3 TB/s; 4 * S^2 * H * D = 212 GFLOP, 0.27 ms at 790 TFLOP/s: bound by the
//            products and exp2.
// Aliasing   out aliases nothing. Rows of q, k, v may be strided (a fused qkv projection is read in
//            place), but every row must start on 16 bytes.

#include "../vision_attention.h"
#include "attention.cuh"
#include "attention_keys.cuh"
#include "hopper.h"
#include "padding_mask.cuh"
#include "vision_attention_sm90.h"

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

int vision_attention_cuda(const VisionAttentionParams& p, CUstream_st* stream) {
  if (p.batch == 0 || p.seqlen == 0 || p.num_heads == 0) return cudaSuccess;
  if (p.seqlen > kMaxAttentionRows || !(p.softmax_scale > 0)) return cudaErrorInvalidValue;
  if (!rows_aligned(
          p.dtype, {p.q, p.k, p.v, p.out},
          {p.q_batch_stride, p.q_token_stride, p.q_head_stride, p.k_batch_stride, p.k_token_stride,
           p.k_head_stride, p.v_batch_stride, p.v_token_stride, p.v_head_stride})) {
    return cudaErrorMisalignedAddress;
  }
  if (uses_vision_sm90(p) && runs_sm90a()) return vision_attention_sm90(p, stream);
  return dispatch_dtype(p.dtype, [&](auto element) {
    return dispatch_config<decltype(element)>(
        p.head_dim, [&](auto config) { return launch_config<decltype(config)>(p, stream); });
  });
}

}  // namespace mllama
