#include "mma.cuh"

namespace mllama {

template cudaError_t launch_mma<Family::kQ6_K>(const QuantizedCall&, int, cudaStream_t);

}  // namespace mllama
