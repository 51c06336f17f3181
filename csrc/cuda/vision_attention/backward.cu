// Gradients of vision_attention; backward_sm80.cuh has the algorithm.
//
// Kernels    1. Rows: statistics of query rows. 2. Keys and 3. queries: one block per (batch, head,
//            128 keys or query rows; float32: 32) over all blocks of the other. Head dim 80 is
//            native, as in the forward.
// Mask       A pair of padding tokens is hidden, whichever of them is the query: both kernels have
//            the forward's mask, which skips blocks of padding for tiles of padding.
// Traffic    Kernel 1: 2 * B * S * H * D elements. Then 14 * S^2 * H * D FLOP: S 6432, 16 heads of
//            80, 741 GFLOP, 0.94 ms at 790 TFLOP/s. q, k, v and grad_out come from L2 after the
//            first block of a head.
// Aliasing   The gradients and the workspace overlap nothing. Rows of q, k, v and grad_out may be
//            strided but start on 16 bytes.

#include "../../vision_attention.h"
#include "../attention/backward_delta.cuh"
#include "../attention/backward_sm90.cuh"
#include "../attention/tile_size.h"
#include "../common/alignment.h"
#include "../common/launch.h"
#include "padding_mask.cuh"

namespace mllama {
namespace {

using Params = VisionAttentionBackwardParams;

// Kernel 1. Statistics lie like lse: (batch, num_heads, seqlen).
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kRowThreads)
    vision_rows_kernel(const __grid_constant__ Params p, float2* statistics) {
  const unsigned heads = static_cast<unsigned>(p.num_heads);
  const unsigned seqlen = static_cast<unsigned>(p.seqlen);
  const unsigned row = static_cast<unsigned>(row_of_lanes());
  const int64_t token = row / heads, head = row % heads;
  const int64_t b = token / seqlen, token_of_sequence = token % seqlen;
  const bool valid = b < p.batch;
  LaneRow<T, kHeadDim> out, grad;
  out.load(static_cast<const T*>(p.out) + static_cast<int64_t>(row) * kHeadDim, valid);
  grad.load(static_cast<const T*>(p.grad_out) + b * p.grad_out_batch_stride +
                token_of_sequence * p.grad_out_token_stride + head * p.grad_out_head_stride,
            valid);
  const float delta = dot_rows(out, grad);
  if (valid && threadIdx.x % kRowLanes == 0) {
    const int64_t place = (b * heads + head) * p.seqlen + token_of_sequence;
    const float lse = static_cast<const float*>(p.lse)[place];
    statistics[place] = make_float2(stored_lse<T>(lse), delta);
  }
}

// This block's tile of tokens, be they keys or queries.
template <typename Config>
struct VisionTile {
  using T = typename Config::T;
  int64_t batch;
  int head, first, seqlen;

  __device__ __forceinline__ explicit VisionTile(const Params& p)
      : seqlen(static_cast<int>(p.seqlen)) {
    const int heads = static_cast<int>(p.num_heads);
    const int tiles = (seqlen + Config::kBlockM - 1) / Config::kBlockM;
    first = static_cast<int>(blockIdx.x % tiles) * Config::kBlockM;  // neighbours share L2
    head = static_cast<int>(blockIdx.x / tiles % heads);
    batch = blockIdx.x / tiles / heads;
  }

  __device__ __forceinline__ const T* input(const void* base, int64_t batch_stride,
                                            int64_t head_stride) const {
    return static_cast<const T*>(base) + batch * batch_stride + head * head_stride;
  }
  // Token 0 of a gradient.
  __device__ __forceinline__ T* gradient(void* base, const Params& p) const {
    return static_cast<T*>(base) + (batch * p.seqlen * p.num_heads + head) * Config::kHeadDim;
  }
  __device__ __forceinline__ const bool* padding(const Params& p) const {
    return p.padding == nullptr ? nullptr : p.padding + batch * p.padding_batch_stride;
  }

  __device__ __forceinline__ void fill(BackwardRows<T>& rows, const Params& p,
                                       const float2* statistics, int first_row) const {
    rows.q = input(p.q, p.q_batch_stride, p.q_head_stride);
    rows.out = gradient(p.grad_q, p);
    rows.q_token_stride = p.q_token_stride;
    rows.out_token_stride = p.num_heads * Config::kHeadDim;
    rows.q_head_stride = rows.out_head_stride = 0;
    rows.group = 1;
    rows.first = first_row;
    rows.count = seqlen;
    rows.grad_out = input(p.grad_out, p.grad_out_batch_stride, p.grad_out_head_stride);
    rows.grad_token_stride = p.grad_out_token_stride;
    rows.grad_head_stride = 0;
    rows.statistics = statistics + (batch * p.num_heads + head) * p.seqlen;
  }
};

// Kernel 2.
template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    vision_keys_kernel(const __grid_constant__ Params p, const float2* statistics) {
  using T = typename Config::T;
  extern __shared__ __align__(1024) char shared[];
  if constexpr (!Config::kCompiles) return __trap();
  const BackwardTiles<Config> tiles(shared);
  const VisionTile<Config> tile(p);
  auto& rows = *reinterpret_cast<BackwardRows<T>*>(tiles.rest);
  if (threadIdx.x == 0) tile.fill(rows, p, statistics, 0);
  __syncthreads();

  const KeyTile<T> keys{
      tile.input(p.k, p.k_batch_stride, p.k_head_stride) + tile.first * p.k_token_stride,
      tile.input(p.v, p.v_batch_stride, p.v_head_stride) + tile.first * p.v_token_stride,
      p.k_token_stride, p.v_token_stride, tile.seqlen - tile.first};
  PaddingMask<Config> mask(tile.padding(p), tile.first, tile.seqlen,
                           tiles.rest + sizeof(BackwardRows<T>));
  typename Config::Sums grad_k = {}, grad_v = {};
  add_up_keys<Config>(keys, SequenceQueries<Config>{rows}, mask,
                      softmax_scale_log2(p.softmax_scale), tiles, grad_k, grad_v);
  const auto target = [&](void* grad) {
    const int64_t stride = p.num_heads * Config::kHeadDim;
    return [&keys, stride, base = tile.gradient(grad, p) + tile.first * stride](int row) {
      return row < keys.count ? base + row * stride : nullptr;
    };
  };
  store_sums<Config>(grad_v, 1.0f, tiles.own[1], target(p.grad_v));
  store_sums<Config>(grad_k, static_cast<float>(p.softmax_scale), tiles.own[0], target(p.grad_k));
}

// Kernel 3.
template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    vision_queries_kernel(const __grid_constant__ Params p, const float2* statistics) {
  using T = typename Config::T;
  extern __shared__ __align__(1024) char shared[];
  if constexpr (!Config::kCompiles) return __trap();
  const BackwardTiles<Config> tiles(shared);
  const VisionTile<Config> tile(p);
  auto& rows = *reinterpret_cast<BackwardRows<T>*>(tiles.rest);
  if (threadIdx.x == 0) tile.fill(rows, p, statistics, tile.first);
  __syncthreads();

  DenseKeys<T, Config::kBlockN> keys{tile.input(p.k, p.k_batch_stride, p.k_head_stride),
                                     tile.input(p.v, p.v_batch_stride, p.v_head_stride),
                                     p.k_token_stride, p.v_token_stride, tile.seqlen};
  PaddingMask<Config> mask(tile.padding(p), tile.first, tile.seqlen,
                           tiles.rest + sizeof(BackwardRows<T>));
  typename Config::Sums grad_q = {};
  add_up_queries<Config>(rows, keys, mask, softmax_scale_log2(p.softmax_scale), tiles, grad_q);
  store_sums<Config>(grad_q, static_cast<float>(p.softmax_scale), tiles.own[0],
                     [&](int row) { return rows.valid(row) ? rows.out_row(row) : nullptr; });
}

template <typename Config>
cudaError_t launch_all(const Params& p, cudaStream_t stream) {
  using T = typename Config::T;
  constexpr int64_t kSharedBytes = BackwardTiles<Config>::kBytes + sizeof(BackwardRows<T>);
  const int64_t rows = p.batch * p.seqlen * p.num_heads;
  if (rows > INT32_MAX) return cudaErrorInvalidValue;
  float2* const statistics = static_cast<float2*>(p.workspace);
  cudaError_t status = launch(vision_rows_kernel<T, Config::kHeadDim>, row_blocks(rows),
                              kRowThreads, 0, stream, {}, p, statistics);
  if (status != cudaSuccess) return status;
  const int64_t blocks = ceil_div<int64_t>(p.seqlen, Config::kBlockM) * p.num_heads * p.batch;
  const int64_t shared_bytes = kSharedBytes + padding_mask_bytes(p, Config::kBlockN);
  status = launch(vision_keys_kernel<Config>, blocks, Config::kThreads, shared_bytes, stream, {}, p,
                  statistics);
  if (status != cudaSuccess) return status;
  return launch(vision_queries_kernel<Config>, blocks, Config::kThreads, shared_bytes, stream, {},
                p, statistics);
}

}  // namespace

// The statistics of the query rows.
int64_t vision_attention_backward_workspace(const Params& p) {
  return statistics_bytes(p.batch * p.seqlen * p.num_heads);
}

int vision_attention_backward_cuda(const Params& p, CUstream_st* stream) {
  if (p.batch == 0 || p.seqlen == 0 || p.num_heads == 0) return cudaSuccess;
  if (p.seqlen > kMaxAttentionRows || !(p.softmax_scale > 0)) return cudaErrorInvalidValue;
  if (!rows_aligned(
          p.dtype, {p.q, p.k, p.v, p.out, p.grad_out, p.grad_q, p.grad_k, p.grad_v, p.workspace},
          {p.q_batch_stride, p.q_token_stride, p.q_head_stride, p.k_batch_stride, p.k_token_stride,
           p.k_head_stride, p.v_batch_stride, p.v_token_stride, p.v_head_stride,
           p.grad_out_batch_stride, p.grad_out_token_stride, p.grad_out_head_stride})) {
    return cudaErrorMisalignedAddress;
  }
  return dispatch_attention_backward(p.dtype, p.head_dim,
                                     [&]<typename Config>(std::type_identity<Config>, auto) {
                                       return launch_all<Config>(p, stream);
                                     });
}

}  // namespace mllama
