// skinny_linear in 16 bits with tensor copies, on sm_90a; see skinny_linear.cu.

#include <cstdlib>
#include <cstring>

#include "../common/launch.h"
#include "../common/tensor_map.h"
#include "kernels.h"
#include "pipeline_sm90.cuh"

namespace mllama {
namespace {

struct TensorShared {
  TensorRingShared ring;
  FewRowsShared few_rows;
};
constexpr int kTensorBlocks = 2;  // per multiprocessor: this kernel's and the next one's
static_assert(kTensorBlocks * (sizeof(TensorShared) + 1024) <= 228 * 1024,
              "the system takes 1 KB per block");

// Both are built until a GPU has shown which is faster: for the measurement
// MLLAMA_KERNELS_NEXT_KERNEL=start, which is read once, asks for the other.
constexpr NextKernel kNextKernel = NextKernel::kBehindLastRequest;

bool starts_next_kernel_early() {
  static const char* const wanted = std::getenv("MLLAMA_KERNELS_NEXT_KERNEL");
  return wanted != nullptr ? std::strcmp(wanted, "start") == 0
                           : kNextKernel == NextKernel::kAtStart;
}

template <typename T, int kRowBlocks, NextKernel kNext>
__global__ void __launch_bounds__(kSlabThreads, kTensorBlocks)
    skinny_linear_sm90_kernel(const SkinnyLinearParams p,
                              const __grid_constant__ CUtensorMap weight) {
#ifdef MLLAMA_SM90A_DEVICE
  extern __shared__ uint4 shared_memory[];
  TensorShared& shared = *reinterpret_cast<TensorShared*>(shared_memory);
  const SkinnyShare share(p, max_pass_tiles(kRowBlocks));
  const TensorCopier copier{share, weight};
  TensorRing<kNext> ring(share, copier, shared.ring);
  DenseWeight<T, kRowBlocks> dense(share);
  FewRowsProduct<SkinnyLinearParams, DenseWeight<T, kRowBlocks>>(share, shared.few_rows, dense)
      .run(ring);
#else
  __trap();
#endif
}

template <typename T, int kRowBlocks>
cudaError_t launch_mma(const SkinnyLinearParams& p, int multiprocessors, cudaStream_t stream) {
  CUtensorMap weight;
  const cudaError_t status = make_tensor_map(weight, p.dtype, p.weight,
                                             {{kWarpDepth, 1, kWarpDepth},
                                              {weight_rows(p), p.weight_row_stride, kHalfRows},
                                              {p.k / kWarpDepth, kWarpDepth, kSlabWarps}},
                                             Swizzle::k128);
  if (status != cudaSuccess) return status;
  const auto kernel =
      starts_next_kernel_early()
          ? skinny_linear_sm90_kernel<T, kRowBlocks, NextKernel::kAtStart>
          : skinny_linear_sm90_kernel<T, kRowBlocks, NextKernel::kBehindLastRequest>;
  return launch(kernel, slab_blocks(p.n, multiprocessors), kSlabThreads, sizeof(TensorShared),
                stream, {.overlap = true}, p, weight);
}

}  // namespace

cudaError_t skinny_linear_sm90(const SkinnyLinearParams& p, int multiprocessors,
                               cudaStream_t stream) {
  return dispatch_few_rows(p.dtype, p.rows, [&](auto element, auto row_blocks) {
    return launch_mma<decltype(element), row_blocks()>(p, multiprocessors, stream);
  });
}

}  // namespace mllama
