// sample with one block per row: for architectures without clusters, and for vocabularies that do
// not fit into a cluster's shared memory. The algorithm is in sample.cuh.
//
// Tiling     One block of 32 warps per row. Every pass reads the logits again, from L2, and scales
//            them again: a row does not fit into one block's shared memory.
// Traffic    rows * vocab elements from memory, and that again from L2 for each of 3 to 11 passes:
//            the largest, up to 4 per cut, 2 for the draw (the second only up to the token's warp).
//            The same of seen, counts and allowed where a row has them; log-probabilities add two
//            passes over the logits (likeliest.cuh).

#include "../common/dispatch.cuh"
#include "../common/launch.h"
#include "kernels.h"
#include "sample.cuh"

namespace mllama {
namespace {

template <typename T>
struct ReadLevels {
  const ScaledRow<T>& scaled;
  int64_t first_token;
  float largest;

  struct Pass {
    const ReadLevels& of;
    BiasCursor biases;

    __device__ void get(int step, uint32_t (&level)[kTokensPerLane]) {
      const int lane = threadIdx.x % kWarpSize;
      float z[kTokensPerLane];
      of.scaled.load(of.first_token + step * kTokensPerStep + lane * kTokensPerLane, biases, z);
#pragma unroll
      for (int i = 0; i < kTokensPerLane; ++i) level[i] = level_of(z[i], of.largest);
    }
  };
  __device__ Pass pass() const { return {*this, scaled.biases()}; }
};

template <typename T>
__global__ void __launch_bounds__(kSampleThreads)
    sample_kernel(const SampleParams p, const bool vectorized, const int span) {
  __shared__ SampleShared shared;
  sample_row<T>(
      p, blockIdx.x, vectorized, span, shared, OneBlock{},
      [](int, const float (&)[kTokensPerLane]) {},
      [](const ScaledRow<T>& scaled, int64_t first_token, int, float largest) {
        return ReadLevels<T>{scaled, first_token, largest};
      });
}

}  // namespace

cudaError_t sample_in_blocks(const SampleParams& p, cudaStream_t stream) {
  return dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t span =
        round_up<int64_t>(ceil_div<int64_t>(p.vocab, kSampleWarps), kTokensPerStep);
    return launch(sample_kernel<T>, p.rows, kSampleThreads, 0, stream, {}, p, reads_quads(p),
                  static_cast<int>(span));
  });
}

}  // namespace mllama
