#include "mma.cuh"

namespace mllama {

template cudaError_t launch_mma<Family::kInt8>(const QuantizedCall&, int, cudaStream_t);

}  // namespace mllama
