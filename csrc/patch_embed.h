// patch_embed: pixels to the tokens that enter the vision encoder (convolution as unfold + GEMM,
// pre-tile embedding, class token, gated position and tile-position embeddings, LayerNorm, zero
// tokens).
#pragma once

#include "common.h"

namespace mllama {

struct PatchEmbedParams {
  const void* pixel_values;             // (images, tiles, channels, size, size), contiguous
  const int64_t* aspect_ratio_ids;      // (images,), in [0, ratios)
  const void* patch_weight;             // (dim, channels * patch * patch), contiguous
  const void* class_embedding;          // (dim,)
  const void* position_embedding;       // (grid^2 + 1, dim), contiguous
  const void* position_gate;            // (1,)
  const void* tile_position_embedding;  // (ratios, tiles * (grid^2 + 1) * dim), contiguous
  const void* pre_tile_embedding;       // (ratios, tiles * dim), contiguous
  const void* pre_tile_gate;            // (1,)
  const void* norm_weight;              // (dim,)
  const void* norm_bias;                // (dim,)
  void* out;                            // (images, tiles, out_tokens, dim), contiguous
  int64_t images, tiles, channels, size, patch, grid;  // grid = size / patch
  int64_t dim, out_tokens, ratios;                     // out_tokens >= grid^2 + 1; the rest is zero
  double eps;
  DType dtype;
};

void patch_embed_cpu(const PatchEmbedParams& p);
int patch_embed_cuda(const PatchEmbedParams& p, CUstream_st* stream);

}  // namespace mllama
