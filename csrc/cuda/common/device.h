// What the choice of a kernel asks of the current device.
#pragma once

#include <cuda_runtime.h>

namespace mllama {

// Whether it is a Hopper and this library was compiled for sm_90a.
bool runs_sm90a();

cudaError_t count_multiprocessors(int& count);

}  // namespace mllama
