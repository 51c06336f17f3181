// Zeros, and a log-sum-exp of +infinity, for rows of no sequence.

#include "../common/launch.h"
#include "kernels.h"

namespace mllama {
namespace {

constexpr int kFillThreads = 256;
__global__ void __launch_bounds__(kFillThreads) fill_kernel(float* target, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFillThreads + threadIdx.x;
  if (i < count) target[i] = INFINITY;
}

}  // namespace

cudaError_t cross_fill_no_sequence(const CrossAttentionParams& p, CUstream_st* stream) {
  const int64_t rows = p.tokens * p.num_q_heads;
  if (p.lse != nullptr) {
    const cudaError_t status =
        launch(fill_kernel, ceil_div<int64_t>(rows, kFillThreads), kFillThreads, 0, stream, {},
               static_cast<float*>(p.lse), rows);
    if (status != cudaSuccess) return status;
  }
  return cudaMemsetAsync(p.out, 0, rows * p.head_dim * element_size(p.dtype), stream);
}

}  // namespace mllama
