// Pixels to vision tokens: patch convolution, pre-tile embedding, class token, gated position and
// tile-position embeddings, LayerNorm, zero tokens up to out_tokens.
//
// Kernels    On sm_90a forward_sm90.cu, for what it takes; else (forward_sm80.cu)
//            1. Patches: implicit im2col product (gemm_sm80.cuh); the three embeddings are added
//            on the way out, every operation rounded as a chain of PyTorch operators rounds it. 2.
//            Tokens: a warp per token makes the class token, normalises every token (in place,
//            unless a backward will want what it normalises) and writes the zero tokens. The row is
//            read three times, twice from L1.
// Precision  Products summed in float32; LayerNorm's statistics as two sums (mean, then squares of
//            differences), float64 for float32 input; one rounding at its store.
// Traffic    Pixels and weights once from HBM (L2 after), out written, read and written again. 4
//            tiles of 560 x 560, dim 1280, bf16: 7.5 + 1.5 + 3 * 16.5 MB and 20 of embeddings, 18
//            us at 4.3 TB/s; 9.6 GFLOP, 12 us at 790 TFLOP/s.
// Bad ids    An aspect_ratio_id outside [0, ratios) gives NaN for its image and reads nothing
//            beyond the tables: ids are on the device, and a check on the host would have to wait
//            for it.
// Aliasing   out aliases nothing. Any alignment: 16-byte vectors where dim and addresses allow.

#include "../../patch_embed.h"
#include "../common/device.h"
#include "kernels.h"

namespace mllama {
namespace {

bool runs_forward_sm90(const PatchEmbedParams& p) {
  const auto aligned = [](const void* pointer, uintptr_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
  };
  const int64_t depth = p.channels * p.patch * p.patch;
  bool fits = p.tokens == nullptr && element_size(p.dtype) == 2 && p.grid > 0 && p.dim % 4 == 0 &&
              p.dim <= kPatchSm90MaxDim && depth % 4 == 0 && depth <= kPatchSm90MaxDepth &&
              p.images * p.tiles * p.grid * p.grid <= INT32_MAX && p.patch % 2 == 0 &&
              p.size % 2 == 0 && aligned(p.pixel_values, 4) && aligned(p.patch_weight, 16);
  for (const void* pointer : {p.position_embedding, p.tile_position_embedding, p.pre_tile_embedding,
                              p.norm_weight, p.norm_bias, static_cast<const void*>(p.out)}) {
    fits = fits && aligned(pointer, 8);
  }
  return fits && runs_sm90a() && holds_patch_clusters(p);
}

}  // namespace

int patch_embed_cuda(const PatchEmbedParams& p, CUstream_st* stream) {
  if (p.images == 0 || p.tiles == 0 || p.out_tokens == 0 || p.dim == 0) return cudaSuccess;
  // Offsets within one tile of an image and columns are counted in int.
  if (p.dim > (1 << 24) || p.channels * p.size * p.size > INT32_MAX || p.grid > (1 << 15)) {
    return cudaErrorInvalidValue;
  }
  return runs_forward_sm90(p) ? patch_forward_sm90(p, stream) : patch_forward_sm80(p, stream);
}

}  // namespace mllama
