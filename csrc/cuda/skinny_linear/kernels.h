// What skinny_linear.cu can call: each for up to kSkinnyLinearMaxRows rows, on a device with so
// many multiprocessors.
#pragma once

#include <cuda_runtime.h>

#include "../../skinny_linear.h"
#include "../few_rows/slab.h"

namespace mllama {

static_assert(kSkinnyLinearMaxRows == kFewRows);

constexpr int64_t weight_rows(const SkinnyLinearParams& p) { return p.swiglu ? 2 * p.n : p.n; }

// Without tensor cores: any call. `aligned`: all rows start and end on 16 bytes.
cudaError_t skinny_linear_simt(const SkinnyLinearParams& p, bool aligned, int multiprocessors,
                               cudaStream_t stream);

// 16 bits, aligned.
cudaError_t skinny_linear_sm80(const SkinnyLinearParams& p, int multiprocessors,
                               cudaStream_t stream);

// Likewise, on a device for which runs_sm90a() holds, k a multiple of kWarpDepth, a weight that a
// tensor map can describe.
cudaError_t skinny_linear_sm90(const SkinnyLinearParams& p, int multiprocessors,
                               cudaStream_t stream);

}  // namespace mllama
