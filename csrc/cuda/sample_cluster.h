// The launch of sample on Hopper, a cluster of blocks per row (sample_cluster.cu).
#pragma once

#include <cuda_runtime.h>

#include "../sample.h"

namespace mllama {

bool samples_in_clusters(const SampleParams& p);
cudaError_t sample_in_clusters(const SampleParams& p, cudaStream_t stream);

}  // namespace mllama
