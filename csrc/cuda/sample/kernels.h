// What sample.cu can call.
#pragma once

#include <cuda_runtime.h>

#include "../../sample.h"

namespace mllama {

// A block per row: any call.
cudaError_t sample_in_blocks(const SampleParams& p, cudaStream_t stream);

// A cluster of blocks per row, on a device for which runs_sm90a() holds, if the rows fit into the
// shared memory of the largest cluster that it can hold.
cudaError_t sample_in_clusters(const SampleParams& p, cudaStream_t stream);
bool fits_sample_cluster(int64_t vocab);

}  // namespace mllama
