// Causal grouped-query attention with rotary embedding, dense, packed or over a paged cache.
//
// Kernels    1. Append (append.cu): rotates k and writes it, with v, into the pages (not paged:
//            rotated k into scratch; v is read in place). A key is rotated once, not once per query
//            block.
//            2. One query row per sequence: split-KV decode (decode_split.cuh). Otherwise prefill:
//            for 16 bits on sm_90a prefill_sm90.cu, else prefill_sm80.cu: the main loop of
//            core_sm80.cuh, one block per (sequence, key/value head, 128 rows of packed query
//            heads; float32: 64). q is rotated on its way into shared memory, once per row, and the
//            rotated q never goes to memory. Rows are taken last first, so that the longest blocks
//            start first. Stream order is the only synchronisation between the two: appended keys
//            are read by blocks all over the device. On sm_90a 16-bit decode is a single launch,
//            the append included (decode_cluster.cu).
// Mask       Key j is visible to row i of a sequence if j <= cache_len + i. Blocks above the
//            diagonal are not visited; only blocks that cross it are masked per element.
// Precision  As core_sm80.cuh; the rotation rounds both products and the sum (rope.cuh).
// Traffic    Append: 4 * tokens * Hkv * D elements; 2048 tokens, 8 heads of 128, bf16: 17 MB,
//            3.9 us at 4.3 TB/s. Prefill: 2 * S^2 * Hq * D FLOP, bound by the products: S 4096,
//            32 heads of 128: 137 GFLOP, 174 us at 790 TFLOP/s.
// Aliasing   q, k, v and out may not overlap each other or the caches. Input rows may be strided
//            but start on 16 bytes.

#include "../../rotary_attention.h"
#include "../attention/decode.h"
#include "../attention/tile_size.h"
#include "../common/alignment.h"
#include "../common/device.h"
#include "kernels.h"

namespace mllama {
namespace {

// Whether the keys of a sequence are split over blocks.
constexpr bool is_decoding(const RotaryAttentionParams& p) {
  return p.page_table != nullptr && p.max_seqlen == 1 &&
         p.num_q_heads / p.num_kv_heads <= kSplitKvMaxGroup;
}

// Blocks of the clusters that decode a call; 0: it is not decoded by clusters.
int64_t decode_cluster(const RotaryAttentionParams& p) {
  return is_decoding(p) && fits_cluster(p.dtype, p.num_q_heads, p.num_kv_heads) && runs_sm90a()
             ? rotary_cluster_blocks(p)
             : 0;
}

bool runs_prefill_sm90(const RotaryAttentionParams& p) {
  return element_size(p.dtype) == 2 && rotary_keys(p).mappable(p.head_dim, 2) &&
         rotary_values(p).mappable(p.head_dim, 2) && runs_sm90a();
}

bool is_aligned(const RotaryAttentionParams& p) {
  return rows_aligned(p.dtype,
                      {p.q, p.k, p.v, p.cos, p.sin, p.out, p.k_cache, p.v_cache, p.workspace},
                      {p.q_batch_stride, p.q_token_stride, p.q_head_stride, p.k_batch_stride,
                       p.k_token_stride, p.k_head_stride, p.v_batch_stride, p.v_token_stride,
                       p.v_head_stride, p.cos_row_stride, p.sin_row_stride});
}

}  // namespace

// Clusters need none, but whether they will run is not known here: the current device may not yet
// be that of the tensors.
int64_t rotary_attention_workspace(const RotaryAttentionParams& p) {
  return is_decoding(p) ? rotary_decode_workspace(p) : 0;
}

int rotary_attention_cuda(const RotaryAttentionParams& p, CUstream_st* stream) {
  if (p.tokens == 0) return cudaSuccess;
  const int64_t longest = p.max_pages * p.page_size + p.max_seqlen;
  if (longest * (p.num_q_heads / p.num_kv_heads) > kMaxAttentionRows || !(p.softmax_scale > 0)) {
    return cudaErrorInvalidValue;
  }
  if (!is_aligned(p)) return cudaErrorMisalignedAddress;
  if (const int64_t blocks = decode_cluster(p); blocks > 0) {
    return rotary_decode_cluster(p, blocks, stream);
  }
  const cudaError_t status = rotary_append(p, stream);
  if (status != cudaSuccess) return status;
  if (is_decoding(p)) return rotary_decode_split(p, stream);
  return runs_prefill_sm90(p) ? rotary_prefill_sm90(p, stream) : rotary_prefill_sm80(p, stream);
}

}  // namespace mllama
