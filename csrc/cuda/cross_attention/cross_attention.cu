// Text queries over image tiles, grouped-query attention with one visibility flag per (query,
// tile). Online softmax in FlashAttention-2 order (arXiv 2307.08691); main loop in core_sm80.cuh
// (prefill_sm80.cu). 16 bits on sm_90a: prefill_sm90.cu.
//
// Tiling     One block per (sequence, kv head, 128 rows; float32: 64). The G query heads of a group
//            are packed into the rows, so each K and V block is read once for G heads. A tile's
//            keys are its own blocks: 1601 patches are 50 of 32 and one of 1, and no block
//            straddles tiles. One query row per sequence (decode) goes to split-KV
//            (decode_split.cuh, on sm_90a decode_cluster.cuh) instead.
// Mask       Per block of rows every tile is one of: seen by no row (or absent), skipped before its
//            loads are issued; seen by all, no mask; mixed, a select per row. One flag per tile,
//            never per key: 8 KB instead of 26 MB at 2048 rows, 4 tiles, 6404 keys.
// Hidden     A row's scores for a hidden tile are replaced, not added to, and its output skips the
//            product with the tile's values: NaN in a tile that another row sees stays out.
// Empty      A row that sees nothing keeps sum 0 and stores 0. So does a row of no sequence.
// Precision  As core_sm80.cuh; q_norm on the way into shared memory with the roundings of rms_norm.
// Traffic    K and V of the visible tiles once per block of rows, from L2 after the first. Prefill
//            of 512 rows, 4 tiles, 32 heads of 128, bf16: 53.7 GFLOP, 68 us at 790 TFLOP/s, bound
//            by the products. Below some 500 tokens there are fewer blocks than multiprocessors,
//            and time stays that of one block: 6404 keys in a row.
// Aliasing   out aliases nothing. Rows of q, k and v may be strided, but start on 16 bytes.

#include "../../cross_attention.h"
#include "../attention/decode.h"
#include "../attention/tile_size.h"
#include "../common/alignment.h"
#include "../common/device.h"
#include "kernels.h"

namespace mllama {
namespace {

// Whether the keys of a sequence are split over blocks. Decoding never wants the lse.
constexpr bool is_decoding(const CrossAttentionParams& p) {
  return p.max_seqlen == 1 && p.num_q_heads / p.num_kv_heads <= kSplitKvMaxGroup &&
         p.lse == nullptr;
}

// Blocks of the clusters that decode a call; 0: it is not decoded by clusters.
int64_t decode_cluster(const CrossAttentionParams& p) {
  return is_decoding(p) && fits_cluster(p.dtype, p.num_q_heads, p.num_kv_heads) &&
                 p.tiles <= kClusterMaxTiles && runs_sm90a()
             ? cross_cluster_blocks(p)
             : 0;
}

bool runs_prefill_sm90(const CrossAttentionParams& p) {
  return element_size(p.dtype) == 2 && p.tiles <= kMaxSm90Tiles &&
         tile_keys(p).mappable(p.head_dim, 2) && tile_values(p).mappable(p.head_dim, 2) &&
         runs_sm90a();
}

}  // namespace

// Clusters need none, but whether they will run is not known here: the current device may not yet
// be that of the tensors.
int64_t cross_attention_workspace(const CrossAttentionParams& p) {
  return is_decoding(p) ? cross_decode_workspace(p) : 0;
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
    return cross_decode_cluster(p, blocks, stream);
  }
  if (is_decoding(p)) return cross_decode_split(p, stream);
  if (p.cu_seqlens != nullptr) {
    const cudaError_t status = cross_fill_no_sequence(p, stream);
    if (status != cudaSuccess) return status;
  }
  return runs_prefill_sm90(p) ? cross_prefill_sm90(p, stream) : cross_prefill_sm80(p, stream);
}

}  // namespace mllama
