// What patch_embed.cu can call. Every stream is that of the current device.
#pragma once

#include <cuda_runtime.h>

#include "../../patch_embed.h"

namespace mllama {

// Any call.
cudaError_t patch_forward_sm80(const PatchEmbedParams& p, CUstream_st* stream);

// 16 bits, on a device for which runs_sm90a() holds and that can hold the clusters; no tokens for a
// backward: there are no registers left for their addresses. Pixels are read in pairs, rows of out
// in groups of four; two rows of weights, as one, start on 16 bytes.
cudaError_t patch_forward_sm90(const PatchEmbedParams& p, CUstream_st* stream);
bool holds_patch_clusters(const PatchEmbedParams& p);
// Columns of out per block, at most four blocks side by side.
constexpr int64_t kPatchSm90Columns = 320, kPatchSm90MaxDim = 4 * kPatchSm90Columns;
// Pixels of a patch: a table of their places is kept in shared memory.
constexpr int64_t kPatchSm90MaxDepth = 1024;

}  // namespace mllama
