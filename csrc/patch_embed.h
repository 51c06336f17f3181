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
  void* tokens;  // (images, tiles, grid^2 + 1, dim): what LayerNorm is given; or null
  int64_t images, tiles, channels, size, patch, grid;  // grid = size / patch
  int64_t dim, out_tokens, ratios;                     // out_tokens >= grid^2 + 1; the rest is zero
  double eps;
  DType dtype;
};

// Gradients of all but pixels and patch_weight, which are products of grad_patches. Those that are
// null are not wanted.
struct PatchEmbedBackwardParams {
  // As in the forward, contiguous.
  const void* grad_out;  // (images, tiles, out_tokens, dim)
  const void* tokens;    // (images, tiles, positions, dim)
  const int64_t* aspect_ratio_ids;
  const void *position_embedding, *position_gate, *tile_position_embedding, *pre_tile_embedding,
      *pre_tile_gate, *norm_weight;

  void* grad_patches;  // (images, tiles, positions - 1, dim), of the tokens that are patches; there
                       // if grad_pre_tile_embedding is
  void *grad_class_embedding, *grad_position_embedding, *grad_position_gate,
      *grad_tile_position_embedding, *grad_pre_tile_embedding, *grad_pre_tile_gate,
      *grad_norm_weight, *grad_norm_bias;

  // Sums over kBlockPositions positions each, in their order: (blocks(), 2, dim) of g * x and g,
  // float32 (float64 for float64); (blocks(), 2) of the gates position_gate and pre_tile_gate.
  void* norm_sums;
  double* gate_sums;

  int64_t images, tiles, positions, out_tokens, dim, ratios;
  double eps;
  DType dtype;

  static constexpr int64_t kBlockPositions = 4;
  int64_t blocks() const { return ceil_div(positions, kBlockPositions); }
};

// Of the CUDA kernels: a block keeps sums of whole rows in registers.
constexpr int64_t kPatchBackwardMaxDim = 2560;

void patch_embed_cpu(const PatchEmbedParams& p);
int patch_embed_cuda(const PatchEmbedParams& p, CUstream_st* stream);
void patch_embed_backward_cpu(const PatchEmbedBackwardParams& p);
int patch_embed_backward_cuda(const PatchEmbedBackwardParams& p, CUstream_st* stream);

}  // namespace mllama
