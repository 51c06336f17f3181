// Vision self-attention over all tiles of an image; non-causal. Only (padding query, padding key)
// pairs are masked: valid queries do attend to padding keys, so absent tiles cannot be dropped.
// Online softmax in FlashAttention-2 order (arXiv 2307.08691); main loop in core_sm80.cuh
// (dense_sm80.cu). 16 bits on sm_90a: dense_sm90.cu.
//
// Tiling     One block per (batch, head, 128 query rows; float32: 64). Head dim 80 is native: 5
//            k-steps for the scores, 10 n-tiles for the output, shared rows of 176 bytes.
// Mask       One bit per token, read where it matters: a block of valid queries needs no mask at
//            all, a block of padding queries skips key blocks that are all padding before their
//            loads, and only blocks that mix are masked per element. A padding query that sees
//            nothing gives zeros.
// Precision  As core_sm80.cuh.
// Traffic    q, k, v read and out written once from HBM, 4 * B * S * H * D elements; K and V of a
//            head stay in L2 for its row blocks. 4 tiles, S 6432, 16 heads of 80, bf16: 66 MB, 15
//            us at 4.3 TB/s; 4 * S^2 * H * D = 212 GFLOP, 0.27 ms at 790 TFLOP/s: bound by the
//            products and exp2.
// Aliasing   out aliases nothing. Rows of q, k, v may be strided (a fused qkv projection is read in
//            place), but every row must start on 16 bytes.

#include "../../vision_attention.h"
#include "../attention/tile_size.h"
#include "../common/alignment.h"
#include "../common/device.h"
#include "kernels.h"

namespace mllama {
namespace {

bool runs_dense_sm90(const VisionAttentionParams& p) {
  return element_size(p.dtype) == 2 && vision_queries(p).mappable(p.head_dim, 2) &&
         vision_keys(p).mappable(p.head_dim, 2) && vision_values(p).mappable(p.head_dim, 2) &&
         runs_sm90a();
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
  return runs_dense_sm90(p) ? vision_dense_sm90(p, stream) : vision_dense_sm80(p, stream);
}

}  // namespace mllama
