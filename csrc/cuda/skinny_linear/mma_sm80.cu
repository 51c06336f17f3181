// skinny_linear in 16 bits with asynchronous copies, on sm_80 and newer; see skinny_linear.cu.

#include "../common/launch.h"
#include "kernels.h"
#include "pipeline_sm80.cuh"

namespace mllama {
namespace {

struct AsyncShared {
  alignas(16) char slabs[AsyncRing::kStages][kSlabBytes];
  FewRowsShared few_rows;
};
static_assert(sizeof(AsyncShared) <= 99 * 1024, "sm_86 and sm_89");

// Without the 1 the compiler keeps to 128 registers, for two blocks, and spills.
template <typename T, int kRowBlocks>
__global__ void __launch_bounds__(kSlabThreads, 1)
    skinny_linear_sm80_kernel(const SkinnyLinearParams p) {
  extern __shared__ uint4 shared_memory[];
  AsyncShared& shared = *reinterpret_cast<AsyncShared*>(shared_memory);
  const SkinnyShare share(p, max_pass_tiles(kRowBlocks));
  AsyncRing ring(share, &shared.slabs[0][0]);
  DenseWeight<T, kRowBlocks> weight(share);
  FewRowsProduct<SkinnyLinearParams, DenseWeight<T, kRowBlocks>>(share, shared.few_rows, weight)
      .run(ring);
}

}  // namespace

cudaError_t skinny_linear_sm80(const SkinnyLinearParams& p, int multiprocessors,
                               cudaStream_t stream) {
  return dispatch_few_rows(p.dtype, p.rows, [&](auto element, auto row_blocks) {
    return launch(skinny_linear_sm80_kernel<decltype(element), row_blocks()>,
                  slab_blocks(p.n, multiprocessors), kSlabThreads, sizeof(AsyncShared), stream, {},
                  p);
  });
}

}  // namespace mllama
