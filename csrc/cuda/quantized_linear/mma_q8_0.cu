#include "mma.cuh"

namespace mllama {

template cudaError_t launch_mma<Family::kQ8_0>(const QuantizedCall&, int, cudaStream_t);

}  // namespace mllama
