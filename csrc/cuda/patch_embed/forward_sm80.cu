// Pixels to vision tokens in two kernels, for all element types on sm_80 and newer; see
// patch_embed.cu.

#include "../common/launch.h"
#include "gemm_sm80.cuh"
#include "kernels.h"
#include "tokens.cuh"

namespace mllama {
namespace {

constexpr int kTokenThreads = 128;

template <typename Gemm>
__global__ void __launch_bounds__(Gemm::kThreads, 2)
    patch_kernel(const __grid_constant__ PatchEmbedParams p,
                 const __grid_constant__ PatchGeometry g, const PatchAlignment alignment,
                 const bool vectorized) {
  using T = typename Gemm::T;
  extern __shared__ __align__(16) char shared[];
  __shared__ int64_t row_offsets[Gemm::kBlockM];
  const int dim = static_cast<int>(p.dim);
  const unsigned column_blocks = (dim + Gemm::kBlockN - 1) / Gemm::kBlockN;
  const int first_column =
      static_cast<int>(blockIdx.x % column_blocks) * Gemm::kBlockN;  // neighbours share pixels
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / column_blocks) * Gemm::kBlockM;
  for (int row = threadIdx.x; row < Gemm::kBlockM; row += Gemm::kThreads) {
    row_offsets[row] = first_row + row < g.rows ? g.patch_offset(first_row + row) : -1;
  }
  __syncthreads();
  Gemm::run(g, alignment, static_cast<const T*>(p.pixel_values), row_offsets,
            static_cast<const T*>(p.patch_weight), first_column, dim, shared);

  constexpr int kVecs = Gemm::kBlockN / Vec<T>::kSize;
  const int column = first_column + threadIdx.x % kVecs * Vec<T>::kSize;
  const int count = dim - column;
  if (count <= 0) return;
  const int patches = g.grid * g.grid;
  for (int row = threadIdx.x / kVecs; row < Gemm::kBlockM && first_row + row < g.rows;
       row += Gemm::kThreads / kVecs) {
    const int64_t image_tile = (first_row + row) / patches;
    const int64_t image = image_tile / p.tiles, token = first_row + row - image_tile * patches + 1;
    const int64_t ratio = p.aspect_ratio_ids[image];
    if (ratio < 0 || ratio >= p.ratios) continue;  // the tokens are NaN: see token_kernel
    const TokenEmbedding<T> embedding(p, ratio, image_tile - image * p.tiles, token, vectorized);
    Vec<T> x = load_vec(reinterpret_cast<const T*>(shared + row * Gemm::kOutStride) +
                        (column - first_column));
    embedding.add(x, embedding.pre_tile, embedding.pre_tile_gate, column, count);
    embedding.add_positions(x, column, count);
    T* const out = unnormalized_token<T>(p, image_tile, token) + column;
    if (vectorized) {
      store_vec(out, x);
    } else {
      store_elements(out, x, count);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kTokenThreads)
    token_kernel(const __grid_constant__ PatchEmbedParams p, const bool vectorized) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kTokenThreads + threadIdx.x) / kWarpSize;
  if (row < p.images * p.tiles * p.out_tokens) finish_token<T>(p, row, vectorized);
}

template <typename Gemm>
cudaError_t launch_gemm(const PatchEmbedParams& p, cudaStream_t stream) {
  using T = typename Gemm::T;
  const bool vectorized = tokens_vectorized<T>(p);
  const PatchGeometry g(p);
  const int64_t patch_blocks =
      ceil_div<int64_t>(g.rows, Gemm::kBlockM) * ceil_div<int64_t>(p.dim, Gemm::kBlockN);
  const int64_t tokens = p.images * p.tiles * p.out_tokens;
  const int64_t token_blocks = ceil_div<int64_t>(tokens * kWarpSize, kTokenThreads);
  if (patch_blocks > INT32_MAX || token_blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (patch_blocks > 0) {
    const cudaError_t status =
        launch(patch_kernel<Gemm>, patch_blocks, Gemm::kThreads, Gemm::kSharedBytes, stream, {}, p,
               g, PatchAlignment(p), vectorized);
    if (status != cudaSuccess) return status;
  }
  return launch(token_kernel<T>, token_blocks, kTokenThreads, 0, stream, {}, p, vectorized);
}

}  // namespace

cudaError_t patch_forward_sm80(const PatchEmbedParams& p, CUstream_st* stream) {
  switch (p.dtype) {
    case DType::kFloat32:
      return launch_gemm<SimtPatchGemm>(p, stream);
    case DType::kFloat16:
      return launch_gemm<TensorCorePatchGemm<__half>>(p, stream);
    case DType::kBFloat16:
      return launch_gemm<TensorCorePatchGemm<__nv_bfloat16>>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace mllama
