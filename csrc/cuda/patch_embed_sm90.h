// patch_embed for sm_90a.
#pragma once

#include "../patch_embed.h"

namespace mllama {

// Columns of out per block, at most four blocks side by side.
constexpr int64_t kPatchSm90Columns = 320, kPatchSm90MaxDim = 4 * kPatchSm90Columns;
// Pixels of a patch: a table of their places is kept in shared memory.
constexpr int64_t kPatchSm90MaxDepth = 1024;

// Whether it takes a call on a device for which runs_sm90a() holds. Pixels are read in pairs, rows
// of out in groups of four; two rows of weights, as one, start on 16 bytes. Tokens for a backward
// are left to patch_embed.cu: there are no registers left for their addresses.
inline bool uses_patch_sm90(const PatchEmbedParams& p) {
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
  return fits;
}

// Whether it does and the current device is one, and can hold its clusters.
bool runs_patch_sm90(const PatchEmbedParams& p);

// Returns a cudaError_t.
int patch_embed_sm90(const PatchEmbedParams& p, CUstream_st* stream);

}  // namespace mllama
