// Pixels to vision tokens: patch convolution, pre-tile embedding, class token, gated position and
// tile-position embeddings, LayerNorm, zero tokens up to out_tokens.
//
// Kernels    1. Patches: implicit im2col product (patch_gemm.cuh); the three embeddings are added
//            on the way out, every operation rounded as a chain of PyTorch operators rounds it. 2.
//            Tokens: a warp per token makes the class token, normalises every token in place and
//            writes the zero tokens. The row is read three times, twice from L1.
// Precision  Products summed in float32; LayerNorm's statistics as two sums (mean, then squares of
//            differences), float64 for float32 input; one rounding at its store.
// Traffic    Pixels and weights once from HBM (L2 after), out written, read and written again. 4
//            tiles of 560 x 560, dim 1280, bf16: 7.5 + 1.5 + 3 * 16.5 MB and 20 of embeddings, 18
//            us at 4.3 TB/s; 9.6 GFLOP, 12 us at 790 TFLOP/s.
// Bad ids    An aspect_ratio_id outside [0, ratios) gives NaN for its image and reads nothing
//            beyond the tables: ids are on the device, and a check on the host would have to wait
//            for it.
// Aliasing   out aliases nothing. Any alignment: 16-byte vectors where dim and addresses allow.

#include "../patch_embed.h"
#include "patch_gemm.cuh"

namespace mllama {
namespace {

constexpr int kTokenThreads = 128;

template <typename T>
__device__ __forceinline__ Vec<T> load_part(const T* address, int count, bool vectorized) {
  return vectorized ? load_vec(address) : load_elements(address, count);
}

// The embeddings of one token of one tile.
template <typename T>
struct TokenEmbedding {
  const T* position;  // rows of dim elements
  const T* tile_position;
  const T* pre_tile;
  float position_gate, inverse_gate, pre_tile_gate;  // tanh(g), 1 - tanh(g), tanh(h), rounded to T
  bool vectorized;

  // `ratio` is in range. `tile` counts within the image, `token` within the tile.
  __device__ __forceinline__ TokenEmbedding(const PatchEmbedParams& p, int64_t ratio, int64_t tile,
                                            int64_t token, bool vectorized)
      : vectorized(vectorized) {
    const int64_t tokens = p.grid * p.grid + 1;
    position = static_cast<const T*>(p.position_embedding) + token * p.dim;
    tile_position = static_cast<const T*>(p.tile_position_embedding) +
                    ((ratio * p.tiles + tile) * tokens + token) * p.dim;
    pre_tile = static_cast<const T*>(p.pre_tile_embedding) + (ratio * p.tiles + tile) * p.dim;
    position_gate = tanh_gate<T>(p.position_gate);
    inverse_gate = round_to<T>(__fsub_rn(1.0f, position_gate));
    pre_tile_gate = tanh_gate<T>(p.pre_tile_gate);
  }

  // Adds gate * embedding, both operations rounded.
  __device__ __forceinline__ void add(Vec<T>& x, const T* embedding, float gate, int column,
                                      int count) const {
    const Vec<T> e = load_part(embedding + column, count, vectorized);
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) {
      x.data[i] = from_f32<T>(
          __fadd_rn(to_f32(x.data[i]), round_to<T>(__fmul_rn(gate, to_f32(e.data[i])))));
    }
  }

  __device__ __forceinline__ void add_positions(Vec<T>& x, int column, int count) const {
    add(x, position, inverse_gate, column, count);
    add(x, tile_position, position_gate, column, count);
  }
};

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
    T* const out = static_cast<T*>(p.out) + (image_tile * p.out_tokens + token) * p.dim + column;
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
  constexpr int kSize = Vec<T>::kSize;
  const int lane = threadIdx.x % kWarpSize, dim = static_cast<int>(p.dim);
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kTokenThreads + threadIdx.x) / kWarpSize;
  const int64_t image_tile = row / p.out_tokens, token = row - image_tile * p.out_tokens;
  const int64_t image = image_tile / p.tiles;
  if (image >= p.images) return;
  T* const out = static_cast<T*>(p.out) + row * p.dim;
  const auto store = [&](int column, const Vec<T>& v) {
    if (vectorized) {
      store_vec(out + column, v);
    } else {
      store_elements(out + column, v, dim - column);
    }
  };

  const int64_t ratio = p.aspect_ratio_ids[image];
  const bool valid = ratio >= 0 && ratio < p.ratios;
  if (!valid || token > p.grid * p.grid) {
    Vec<T> fill;
#pragma unroll
    for (int i = 0; i < kSize; ++i) fill.data[i] = from_f32<T>(valid ? 0.0f : NAN);
    for (int column = lane * kSize; column < dim; column += kWarpSize * kSize) store(column, fill);
    return;
  }

  const TokenEmbedding<T> embedding(p, ratio, image_tile - image * p.tiles, token, vectorized);
  const auto load = [&](int column) {
    if (token > 0) return load_part(out + column, dim - column, vectorized);
    Vec<T> x =
        load_part(static_cast<const T*>(p.class_embedding) + column, dim - column, vectorized);
    embedding.add_positions(x, column, dim - column);
    return x;
  };
  // f(value, column) of all elements of this lane.
  const auto for_elements = [&](const auto& f) {
    for (int column = lane * kSize; column < dim; column += kWarpSize * kSize) {
      const Vec<T> x = load(column);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (column + i < dim) f(to_f32(x.data[i]));
      }
    }
  };
  Statistic<T> sum = 0, squares = 0;
  for_elements([&](float x) { sum += x; });
  const Statistic<T> mean = warp_sum(sum) / dim;
  for_elements([&](float x) { squares += (x - mean) * (x - mean); });
  const Statistic<T> rstd = 1 / sqrt(warp_sum(squares) / dim + static_cast<Statistic<T>>(p.eps));
  for (int column = lane * kSize; column < dim; column += kWarpSize * kSize) {
    Vec<T> x = load(column);
    const Vec<T> weight =
        load_part(static_cast<const T*>(p.norm_weight) + column, dim - column, vectorized);
    const Vec<T> bias =
        load_part(static_cast<const T*>(p.norm_bias) + column, dim - column, vectorized);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float normalized = static_cast<float>((to_f32(x.data[i]) - mean) * rstd);
      x.data[i] = from_f32<T>(fmaf(normalized, to_f32(weight.data[i]), to_f32(bias.data[i])));
    }
    store(column, x);
  }
}

template <typename Gemm>
cudaError_t launch(const PatchEmbedParams& p, cudaStream_t stream) {
  using T = typename Gemm::T;
  bool vectorized = p.dim % Vec<T>::kSize == 0;
  for (const void* pointer :
       {p.class_embedding, p.position_embedding, p.tile_position_embedding, p.pre_tile_embedding,
        p.norm_weight, p.norm_bias, static_cast<const void*>(p.out)}) {
    vectorized = vectorized && is_aligned16(pointer, 0, p.dtype);
  }
  const PatchGeometry g(p);
  const int64_t patch_blocks =
      ceil_div<int64_t>(g.rows, Gemm::kBlockM) * ceil_div<int64_t>(p.dim, Gemm::kBlockN);
  const int64_t tokens = p.images * p.tiles * p.out_tokens;
  const int64_t token_blocks = ceil_div<int64_t>(tokens * kWarpSize, kTokenThreads);
  if (patch_blocks > INT32_MAX || token_blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (patch_blocks > 0) {
    const auto kernel = patch_kernel<Gemm>;
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Gemm::kSharedBytes);
    if (status != cudaSuccess) return status;
    kernel<<<static_cast<unsigned>(patch_blocks), Gemm::kThreads, Gemm::kSharedBytes, stream>>>(
        p, g, PatchAlignment(p), vectorized);
  }
  token_kernel<T><<<static_cast<unsigned>(token_blocks), kTokenThreads, 0, stream>>>(p, vectorized);
  return cudaGetLastError();
}

}  // namespace

int patch_embed_cuda(const PatchEmbedParams& p, CUstream_st* stream) {
  if (p.images == 0 || p.tiles == 0 || p.out_tokens == 0 || p.dim == 0) return cudaSuccess;
  // Offsets within one tile of an image and columns are counted in int.
  if (p.dim > (1 << 24) || p.channels * p.size * p.size > INT32_MAX || p.grid > (1 << 15)) {
    return cudaErrorInvalidValue;
  }
  switch (p.dtype) {
    case DType::kFloat32:
      return launch<SimtPatchGemm>(p, stream);
    case DType::kFloat16:
      return launch<TensorCorePatchGemm<__half>>(p, stream);
    case DType::kBFloat16:
      return launch<TensorCorePatchGemm<__nv_bfloat16>>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace mllama
