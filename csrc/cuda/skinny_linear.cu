// skinny_linear: out = x weight^T for at most 16 rows of x, with the norm before and what stands
// behind it in a decoder layer.
#include <algorithm>

#include "../skinny_linear.h"
#include "hopper.h"
#include "skinny_linear_mma.cuh"
#include "skinny_linear_rings.cuh"
#include "skinny_linear_simt.h"

namespace mllama {
namespace {

struct AsyncShared {
  alignas(16) char slabs[AsyncRing::kStages][kSlabBytes];
  SkinnyShared skinny;
};
static_assert(sizeof(AsyncShared) <= 99 * 1024, "sm_86 and sm_89");

template <typename T, int kRowBlocks>
__global__ void __launch_bounds__(kSlabThreads, 1)
    skinny_linear_sm80_kernel(const SkinnyLinearParams p) {
  extern __shared__ uint4 shared_memory[];
  AsyncShared& shared = *reinterpret_cast<AsyncShared*>(shared_memory);
  using Multiplier = SlabMultiplier<T, kRowBlocks>;
  const WeightShare share(p, Multiplier::kMaxPassTiles);
  AsyncRing ring(share, &shared.slabs[0][0]);
  Multiplier(p, share, shared.skinny).run(ring);
}

struct TensorShared {
  TensorRingShared ring;
  SkinnyShared skinny;
};
constexpr int kTensorBlocks = 2;  // per multiprocessor: this kernel's and the next one's
static_assert(kTensorBlocks * (sizeof(TensorShared) + 1024) <= 228 * 1024,
              "the system takes 1 KB per block");

template <typename T, int kRowBlocks>
__global__ void __launch_bounds__(kSlabThreads, kTensorBlocks)
    skinny_linear_sm90_kernel(const SkinnyLinearParams p,
                              const __grid_constant__ CUtensorMap weight) {
#ifdef MLLAMA_SM90A_DEVICE
  extern __shared__ uint4 shared_memory[];
  TensorShared& shared = *reinterpret_cast<TensorShared*>(shared_memory);
  using Multiplier = SlabMultiplier<T, kRowBlocks>;
  const WeightShare share(p, Multiplier::kMaxPassTiles);
  TensorRing ring(share, weight, shared.ring);
  Multiplier(p, share, shared.skinny).run(ring);
#endif
}

template <typename T, int kRowBlocks>
cudaError_t launch_mma(const SkinnyLinearParams& p, int multiprocessors, cudaStream_t stream) {
  const int64_t blocks = std::min<int64_t>(column_blocks(p.n), multiprocessors);
  if (p.k % kWarpDepth != 0 || !runs_sm90a()) {
    return launch(skinny_linear_sm80_kernel<T, kRowBlocks>, blocks, kSlabThreads,
                  sizeof(AsyncShared), stream, {}, p);
  }
  CUtensorMap weight;
  const cudaError_t status =
      make_tensor_map(weight, p.dtype, p.weight,
                      {{kWarpDepth, 1, kWarpDepth},
                       {p.swiglu ? 2 * p.n : p.n, p.weight_row_stride, kHalfRows},
                       {p.k / kWarpDepth, kWarpDepth, kSlabWarps}},
                      Swizzle::k128);
  if (status != cudaSuccess) return status;
  return launch(skinny_linear_sm90_kernel<T, kRowBlocks>, blocks, kSlabThreads,
                sizeof(TensorShared), stream, {.overlap = true}, p, weight);
}

}  // namespace

int skinny_linear_cuda(const SkinnyLinearParams& p, CUstream_st* stream) {
  if (p.rows == 0 || p.n == 0) return cudaSuccess;
  if (p.rows > kSkinnyLinearMaxRows || p.n > INT32_MAX / 2 - kSlabRows ||
      p.k > INT32_MAX - kSlabDepth) {
    return cudaErrorInvalidValue;
  }
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const bool aligned = p.k * element_size(p.dtype) % 16 == 0 &&
                       is_aligned16(p.x, p.rows > 1 ? p.x_row_stride : 0, p.dtype) &&
                       is_aligned16(p.weight, p.weight_row_stride, p.dtype) &&
                       is_aligned16(p.norm_weight, 0, p.dtype);
  if (p.dtype == DType::kFloat32 || !aligned || p.k == 0) {
    return skinny_linear_simt(p, aligned, multiprocessors, stream);
  }
  return dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {
      return p.rows <= 8 ? launch_mma<T, 1>(p, multiprocessors, stream)
                         : launch_mma<T, 2>(p, multiprocessors, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace mllama
