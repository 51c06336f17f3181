// skinny_linear without tensor cores.
#pragma once

#include <cuda_runtime.h>

#include "../skinny_linear.h"

namespace mllama {

// `aligned`: all rows start and end on 16 bytes.
cudaError_t skinny_linear_simt(const SkinnyLinearParams& p, bool aligned, int multiprocessors,
                               cudaStream_t stream);

}  // namespace mllama
