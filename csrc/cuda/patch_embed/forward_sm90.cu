// Pixels to vision tokens for sm_90a: what patch_embed.cu computes, in one pass over the tokens,
// for 16-bit elements. The convolution is a product of unfolded patches (rows, K) and weights (K,
// dim).
//
// Tiling     A cluster computes 256 whole tokens: two blocks of 128 rows by up to four of 320
//            columns. Two warpgroups per block compute 64 x 320 each, two m64n160k16 products per
//            step. One thread copies weights by TMA, slices of 64 k through a ring of four; each
//            of the two blocks that share columns copies half of a slice, to both.
// Patches    Never pass through shared memory: a warp alone needs its 16 rows, and its lanes load
//            the pixel pairs of the register operand straight from the image, one slice ahead of
//            the products. Neighbouring rows are neighbouring patches, so the eight runs of 16
//            bytes that a load reads lie together.
// Weights    Rows of 1176 bytes are no rows for TMA (multiples of 16 bytes); pairs of rows are.
//            Even and odd rows are copied apart, so a thread's accumulators are four neighbouring
//            columns. Behind an even row's last k lies the odd row: pixels are zero there. (Were
//            that row not finite, LayerNorm would make every token NaN in any case.)
// Norm       The tokens stay in registers. Each block has the mean of its columns and the squares
//            about it; the blocks of a row exchange them through the cluster's shared memory and
//            merge them (Chan et al. 1979).
// Rest       Class tokens and zero tokens: a warp each, in clusters behind those of the patches.
// Precision  Products summed in float32; embeddings are added as PyTorch's operators round;
//            statistics in float32; one rounding at the store.
// Traffic    Pixels, weights, embeddings and out once from or to HBM. 4 tiles of 560 x 560, dim
//            1280, bf16: 7.5 + 1.5 + 20.5 + 16.5 MB, 11 us at 4.3 TB/s; 9.6 GFLOP, 12 us at 790
//            TFLOP/s. From L2: pixels for four blocks of columns, 30 MB, and weights for 25
//            clusters, 41 MB with the padding of the last slice: 13 us at an assumed 5.5 TB/s,
//            during the products.
// Estimate   Not measured. 25 clusters of 8 on 132 multiprocessors, at most 16 at a time (two in a
//            GPC of 16 or 18), are two rounds of 37 steps of 320 clocks: 13.5 us at 1.755 GHz.
//            Loading embeddings does not overlap the block's own products: 164 KB, brought to L2
//            meanwhile, at 32 bytes per clock are 3 us per round. With 1 us to start, 20 us.
//            patch_embed.cu would take 36 us: its products want 150 MB from L2, 27 us (22 us for
//            mma.sync at 0.6 of wgmma's rate, in four rounds); then 33 MB of tokens read and
//            written again, 7 us, and 2 us from kernel to kernel.
// Bad ids and aliasing: as patch_embed.cu.

#include "../common/dispatch.cuh"
#include "../common/launch.h"
#include "../common/tensor_map.h"
#include "../common/vec_math.cuh"
#include "gemm_sm90.cuh"
#include "tokens.cuh"

namespace mllama {
namespace {

using namespace patch_sm90;

#ifdef MLLAMA_SM90A_DEVICE

// Predicated instructions, as load_vec_if() explains.
__device__ __forceinline__ Four load_four_if(bool wanted, const void* address) {
  Four four;
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.u32 wanted, %3, 0;\n"
      "mov.u32 %0, 0;\n"
      "mov.u32 %1, 0;\n"
      "@wanted ld.global.nc.v2.u32 {%0, %1}, [%2];\n"
      "}\n"
      : "=&r"(four.pairs[0]), "=&r"(four.pairs[1])
      : "l"(address), "r"(static_cast<uint32_t>(wanted)));
  return four;
}

__device__ __forceinline__ void store_four_if(bool wanted, void* address, const Four& four) {
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.u32 wanted, %3, 0;\n"
      "@wanted st.global.v2.u32 [%2], {%0, %1};\n"
      "}\n" ::"r"(four.pairs[0]),
      "r"(four.pairs[1]), "l"(address), "r"(static_cast<uint32_t>(wanted))
      : "memory");
}

__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(address));
}

// What the other warps of the copying warpgroup do: scale and shift of the block's columns.
template <typename T>
__device__ __forceinline__ void load_norm(PatchShared& shared, const PatchEmbedParams& p,
                                          int first_column) {
  const int i = static_cast<int>(threadIdx.x) - (kComputeWarps + 1) * kWarpSize;
  if (i < 0 || i >= kBlockN / 4) return;
  const int column = first_column + i * 4;
  const bool wanted = column < p.dim;
  shared.norm_weight[i] = load_four_if(wanted, static_cast<const T*>(p.norm_weight) + column);
  shared.norm_bias[i] = load_four_if(wanted, static_cast<const T*>(p.norm_bias) + column);
}

// Starts bringing the embeddings of the block's tokens to L2, where they are wanted after the
// product.
template <typename T>
__device__ __forceinline__ void prefetch_embeddings(const PatchEmbedParams& p, int rows,
                                                    int first_row, int first_column) {
  constexpr int kLine = 128 / sizeof(T), kLines = kBlockN / kLine;
  static_assert(kBlockN % kLine == 0);
  const int patches = static_cast<int>(p.grid * p.grid), tiles = static_cast<int>(p.tiles);
  const int row = first_row + static_cast<int>(threadIdx.x) / 2;
  if (row >= rows) return;
  const int image_tile = row / patches, token = row - image_tile * patches + 1;
  const int image = image_tile / tiles;
  const int64_t ratio = p.aspect_ratio_ids[image];
  if (ratio < 0 || ratio >= p.ratios) return;
  const TokenEmbedding<T> embedding(p, ratio, image_tile - image * tiles, token, true);
  for (int line = threadIdx.x % 2; line < kLines; line += 2) {
    const int column = first_column + line * kLine;
    if (column >= p.dim) return;
    prefetch_l2(embedding.tile_position + column);
    prefetch_l2(embedding.position + column);
  }
}

// x + gate * e of pairs, both operations rounded (vec_math.cuh).
template <typename T>
__device__ __forceinline__ uint32_t add_scaled(uint32_t x, uint32_t gate, uint32_t e) {
  const auto pair = [](const uint32_t& word) { return *reinterpret_cast<const Pair<T>*>(&word); };
  const Pair<T> sum = __hadd2_rn(pair(x), __hmul2_rn(pair(gate), pair(e)));
  return *reinterpret_cast<const uint32_t*>(&sum);
}

// A thread's part of one row of the block: the token, from embeddings to LayerNorm.
template <typename T>
class PatchRow {
 public:
  // `columns` of the block exist.
  __device__ __forceinline__ PatchRow(int first_column, int columns)
      : first_column_(first_column + threadIdx.x % 4 * 4),
        columns_(columns),
        places_(columns - static_cast<int>(threadIdx.x) % 4 * 4) {}

  // Rounds the products of `slot` and adds the embeddings, or makes all NaN.
  __device__ __forceinline__ void embed(PatchSums& sums, int slot,
                                        const TokenEmbedding<T>& embedding, bool valid) {
    const uint32_t pre_tile_gate = twice(embedding.pre_tile_gate),
                   inverse_gate = twice(embedding.inverse_gate),
                   position_gate = twice(embedding.position_gate);
    const T* const pre_tiles = embedding.pre_tile + first_column_;
    const T* const positions = embedding.position + first_column_;
    const T* const tile_positions = embedding.tile_position + first_column_;
    for_batches([&](int product, int first_group) {
      Four pre_tile[kBatch], position[kBatch], tile_position[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int place = place_of(product, first_group + i);
        const bool wanted = valid && place < places_;
        pre_tile[i] = load_four_if(wanted, pre_tiles + place);
        position[i] = load_four_if(wanted, positions + place);
        tile_position[i] = load_four_if(wanted, tile_positions + place);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int group = first_group + i;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t x = pack_pair<T>(sums.at(slot, product, group, 2 * half),
                                    sums.at(slot, product, group, 2 * half + 1));
          x = add_scaled<T>(x, pre_tile_gate, pre_tile[i].pairs[half]);
          x = add_scaled<T>(x, inverse_gate, position[i].pairs[half]);
          x = add_scaled<T>(x, position_gate, tile_position[i].pairs[half]);
          tokens_[product][group].pairs[half] = valid ? x : twice(NAN);
        }
      }
    });
  }

  __device__ __forceinline__ RowStatistics statistics() const {
    float sums[4] = {}, squares[4] = {};  // chains of dependent additions
    for_elements([&](float x, int i) { sums[i] += x; });
    const float mean = warp_sum<4>(sums[0] + sums[1] + (sums[2] + sums[3])) / columns_;
    for_elements([&](float x, int i) { squares[i] += (x - mean) * (x - mean); });
    return {mean, warp_sum<4>(squares[0] + squares[1] + (squares[2] + squares[3]))};
  }

  // Four columns of the token.
  __device__ __forceinline__ Four normalized(int product, int group, float mean, float rstd,
                                             const Four& weight, const Four& bias) const {
    Four result;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 x = unpack_pair<T>(tokens_[product][group].pairs[half]);
      const float2 w = unpack_pair<T>(weight.pairs[half]);
      const float2 b = unpack_pair<T>(bias.pairs[half]);
      result.pairs[half] =
          pack_pair<T>(fmaf((x.x - mean) * rstd, w.x, b.x), fmaf((x.y - mean) * rstd, w.y, b.y));
    }
    return result;
  }

 private:
  static constexpr int kBatch = 5;  // groups whose loads are under way together
  static_assert(kGroups % kBatch == 0);

  __device__ static __forceinline__ uint32_t twice(float x) { return pack_pair<T>(x, x); }

  template <typename F>
  __device__ static __forceinline__ void for_batches(const F& f) {
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
#pragma unroll
      for (int group = 0; group < kGroups; group += kBatch) f(product, group);
    }
  }

  // f(value, its place in the group)
  template <typename F>
  __device__ __forceinline__ void for_elements(const F& f) const {
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        if (place_of(product, group) >= places_) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 x = unpack_pair<T>(tokens_[product][group].pairs[half]);
          f(x.x, 2 * half);
          f(x.y, 2 * half + 1);
        }
      }
    }
  }

  const int first_column_;      // the thread's first of each group
  const int columns_, places_;  // of the block; from the thread's first column
  Four tokens_[kProducts][kGroups];
};

// Mean and reciprocal deviation of a row whose statistics lie at the same place in all blocks.
__device__ __forceinline__ float2 merge_statistics(const RowStatistics& statistics, int dim,
                                                   uint32_t rank, float eps) {
  constexpr int kParts = kPatchSm90MaxDim / kBlockN;
  RowStatistics parts[kParts];
  const auto count = [dim](int i) {
    return static_cast<float>(max(min(dim - i * kBlockN, kBlockN), 0));
  };
  float sum = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    parts[i] = {};
    if (i * kBlockN < dim) {
      const uint32_t part = cluster_address(&statistics, i * kRowBlocks + rank % kRowBlocks);
      parts[i] = {cluster_load(part), cluster_load(part + 4)};
    }
    sum = fmaf(count(i), parts[i].mean, sum);
  }
  const float mean = sum / dim;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const float difference = parts[i].mean - mean;
    squares += fmaf(count(i) * difference, difference, parts[i].squares);
  }
  return make_float2(mean, 1 / sqrt(squares / dim + eps));
}

// From sums of products to tokens: the computing warps' part after the product.
template <typename T>
__device__ __forceinline__ void finish_patches(PatchShared& shared, const PatchEmbedParams& p,
                                               const PatchGeometry& g, int cluster,
                                               PatchSums& sums) {
  const uint32_t rank = cluster_rank();
  const int dim = static_cast<int>(p.dim), first_column = first_column_of(rank);
  const int columns = min(dim - first_column, kBlockN),
            row = first_row_of(cluster, rank) + block_row();
  PatchRow<T> tokens[kSlots] = {{first_column, columns}, {first_column, columns}};
  const int rows = static_cast<int>(g.rows), patches = g.grid * g.grid;
  const int tiles = static_cast<int>(p.tiles);
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int patch = row + slot * 8, image_tile = patch / patches, image = image_tile / tiles;
    const int64_t ratio = patch < rows ? p.aspect_ratio_ids[image] : -1;
    const bool valid = ratio >= 0 && ratio < p.ratios;
    const TokenEmbedding<T> embedding(p, valid ? ratio : 0, valid ? image_tile - image * tiles : 0,
                                      valid ? patch - image_tile * patches + 1 : 0, true);
    tokens[slot].embed(sums, slot, embedding, valid);
    const RowStatistics statistics = tokens[slot].statistics();
    if (threadIdx.x % 4 == 0) shared.statistics[block_row() + slot * 8] = statistics;
  }
  cluster_sync();
  float2 norm[kSlots];
  T* out[kSlots];
  const int lane_column = threadIdx.x % 4 * 4;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    norm[slot] = merge_statistics(shared.statistics[block_row() + slot * 8], dim, rank,
                                  static_cast<float>(p.eps));
    const int patch = row + slot * 8, image_tile = patch / patches;
    const int64_t token = image_tile * p.out_tokens + patch - image_tile * patches + 1;
    out[slot] = static_cast<T*>(p.out) + token * p.dim + first_column + lane_column;
  }
  cluster_sync_arrive();  // before the stores, which its fence would wait for
#pragma unroll
  for (int product = 0; product < kProducts; ++product) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int place = place_of(product, group);
      const Four weight = shared.norm_weight[(place + lane_column) / 4],
                 bias = shared.norm_bias[(place + lane_column) / 4];
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        store_four_if(
            row + slot * 8 < rows && place + lane_column < columns, out[slot] + place,
            tokens[slot].normalized(product, group, norm[slot].x, norm[slot].y, weight, bias));
      }
    }
  }
  cluster_sync_wait();  // no block leaves while its statistics are read
}

#endif  // MLLAMA_SM90A_DEVICE

// Clusters from `row_clusters` on make the tokens that are no patches.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    patch_sm90_kernel(const __grid_constant__ PatchEmbedParams p,
                      const __grid_constant__ PatchGeometry g,
                      const __grid_constant__ CUtensorMap weights, const int row_clusters,
                      const bool vectorized) {
#ifdef MLLAMA_SM90A_DEVICE
  const int dim = static_cast<int>(p.dim);
  const int blocks = (dim + kBlockN - 1) / kBlockN * kRowBlocks;
  const int cluster = static_cast<int>(blockIdx.x) / blocks;
  const int warp = warp_uniform(threadIdx.x / kWarpSize);
  if (cluster >= row_clusters) {
    const int64_t patches = p.grid * p.grid;
    const int64_t others = p.out_tokens - patches;
    const int64_t i = (blockIdx.x - static_cast<int64_t>(row_clusters) * blocks) * kWarps + warp;
    if (i >= p.images * p.tiles * others) return;
    const int64_t image_tile = i / others, other = i - image_tile * others;
    const int64_t token = other == 0 ? 0 : patches + other;
    finish_token<T>(p, image_tile * p.out_tokens + token, vectorized);
    return;
  }

  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<PatchShared*>(memory);
  const uint32_t rank = cluster_rank();
  const int first_column = first_column_of(rank), first_row = first_row_of(cluster, rank);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&weights);
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&shared.full[stage], 1);
      mbarrier_init(&shared.empty[stage], kComputeWarps * kRowBlocks);
    }
    fence_mbarrier_init();
  }
  const int pairs = (g.depth + kBlockK - 1) / kBlockK * kBlockK / 2;
  for (int pair = threadIdx.x; pair < pairs; pair += kThreads) {
    shared.pixel_offsets[pair] = 2 * pair < g.depth ? g.pixel_offset(2 * pair) : -1;
  }
  cluster_sync();  // the barriers of all blocks can be arrived at

  if (warp >= kComputeWarps) {
    registers_release<kCopyRegisters>();
    if (warp == kComputeWarps && elect_one()) {
      copy_weights(shared, weights, g.depth, first_column, rank);
    }
    load_norm<T>(shared, p, first_column);
    __syncwarp();
    cluster_sync();
    cluster_sync();
    return;
  }
  registers_acquire<kComputeRegisters>();
  prefetch_embeddings<T>(p, static_cast<int>(g.rows), first_row, first_column);
  PatchSums sums;
  PatchProduct<T>(shared, g, static_cast<const T*>(p.pixel_values), first_row + block_row(), rank)
      .run(sums);
  finish_patches<T>(shared, p, g, cluster, sums);
#else
  __trap();
#endif
}

int64_t cluster_blocks(const PatchEmbedParams& p) {
  return ceil_div<int64_t>(p.dim, kBlockN) * kRowBlocks;
}

template <typename T>
cudaError_t launch_dtype(const PatchEmbedParams& p, cudaStream_t stream) {
  const PatchGeometry g(p);
  CUtensorMap weights;
  const cudaError_t status = make_tensor_map(
      weights, p.dtype, p.patch_weight,
      {{2 * g.depth, 1, kBlockK}, {p.dim / 2, 2 * g.depth, kBoxRows}}, Swizzle::k128);
  if (status != cudaSuccess) return status;
  const int64_t blocks = cluster_blocks(p);
  const int64_t row_clusters = ceil_div<int64_t>(g.rows, kBlockM * kRowBlocks);
  const int64_t others = p.images * p.tiles * (p.out_tokens - p.grid * p.grid);
  const int64_t other_clusters = ceil_div<int64_t>(others, blocks * kWarps);
  const int64_t grid = (row_clusters + other_clusters) * blocks;
  if (grid > INT32_MAX) return cudaErrorInvalidValue;
  LaunchOptions options;
  options.cluster = static_cast<unsigned>(blocks);
  return launch(patch_sm90_kernel<T>, grid, kThreads, sizeof(PatchShared), stream, options, p, g,
                weights, static_cast<int>(row_clusters), tokens_vectorized<T>(p));
}

}  // namespace

bool holds_patch_clusters(const PatchEmbedParams& p) {
  bool holds = false;
  dispatch_half(p.dtype, [&](auto element) {
    holds = holds_cluster(address_of(patch_sm90_kernel<decltype(element)>), kThreads,
                          sizeof(PatchShared), static_cast<unsigned>(cluster_blocks(p)));
    return cudaSuccess;
  });
  return holds;
}

cudaError_t patch_forward_sm90(const PatchEmbedParams& p, CUstream_st* stream) {
  return dispatch_half(p.dtype,
                       [&](auto element) { return launch_dtype<decltype(element)>(p, stream); });
}

}  // namespace mllama
