// Gradients of cross_attention; backward_sm80.cuh has the algorithm.
//
// Kernels    1. Rows: statistics of query rows; with q_norm, normalised q into the workspace.
//            2. Keys: one block per (slot, kv head, 128 keys of the tile; float32: 32), over the
//            packed query rows of every sequence that has the slot, in the order of tile_table, in
//            blocks of rows some of which see the tile.
//            3. Queries: one block per (sequence, kv head, 128 packed rows; float32: 32) over the
//            tiles that some of them see; with q_norm, back through it in the registers that sum dq
//            up, and the block's part of the weight's gradient into the workspace.
//            4. With q_norm: the sum of these parts, in a fixed order.
// Mask       Kernel 2 reads the rows of a block that do not see the tile as zeros: they add nothing
//            whatever they hold, and scores need no mask. Kernel 3 masks as the forward
//            (block.cuh).
// Traffic    q, out and grad_out once for kernel 1, then K and V of a visible tile once per block
//            of rows, and the rows that see a tile once per 128 of its keys, from L2 after the
//            first. 512 rows, 4 tiles, 32 heads of 128, bf16: 188 GFLOP, 0.24 ms at 790 TFLOP/s.
// Aliasing   The gradients and the workspace overlap nothing. Rows of q, k, v and grad_out may be
//            strided but start on 16 bytes.

#include "../attention/backward_delta.cuh"
#include "../attention/backward_norm.cuh"
#include "../attention/backward_sm90.cuh"
#include "../attention/tile_size.h"
#include "../common/alignment.h"
#include "../common/launch.h"
#include "block.cuh"
#include "tile_rows.cuh"

namespace mllama {
namespace {

using Params = CrossAttentionBackwardParams;

// Kernel 1. normed_q: null without q_norm. Rows of no sequence get their zero
// gradients here.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kRowThreads)
    cross_rows_kernel(const __grid_constant__ Params p, float2* statistics, T* normed_q) {
  const unsigned heads = static_cast<unsigned>(p.num_q_heads);
  const unsigned row = static_cast<unsigned>(row_of_lanes());
  const int64_t token = row / heads, head = row % heads;
  const bool valid = token < p.tokens;
  const QueryRowPlace<Params> place(p, valid ? token : 0, head);
  const bool orphan = valid && p.cu_seqlens != nullptr &&
                      find_sequence(p.cu_seqlens, p.batch, p.max_seqlen, token, p.tokens) < 0;
  LaneRow<T, kHeadDim> q;
  if (orphan) {
    q.clear();
    q.store(static_cast<T*>(p.grad_q) + place.contiguous(), true);
  }
  store_statistics<T, kHeadDim>(place, valid && !orphan, statistics);
  if (normed_q == nullptr) return;
  LaneRow<T, kHeadDim> weight;
  weight.load(static_cast<const T*>(p.q_norm_weight), true);
  q.load(static_cast<const T*>(p.q) +
             place.strided(p.q_batch_stride, p.q_token_stride, p.q_head_stride),
         valid);
  normalize_row(q.v, weight.v, kHeadDim, p.eps);
  q.store(normed_q + place.contiguous(), valid);
}

// Rows whose `q` is the one that enters the products.
template <typename T>
__device__ __forceinline__ void use_normed(BackwardRows<T>& rows, const CrossBlock& block,
                                           const Params& p, const T* normed_q, int head_dim) {
  if (normed_q == nullptr) return;
  rows.q =
      normed_q + (block.sequence.begin * p.num_q_heads + block.kv_head * block.group) * head_dim;
  rows.q_token_stride = p.num_q_heads * head_dim;
  rows.q_head_stride = head_dim;
}

// Kernel 2. In `p` of kernels 2 and 3, out is the gradient of q.
template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    cross_keys_kernel(const __grid_constant__ Params p, const float2* statistics,
                      const typename Config::T* normed_q) {
  using T = typename Config::T;
  extern __shared__ __align__(1024) char shared[];
  if constexpr (!Config::kCompiles) return __trap();
  const BackwardTiles<Config> tiles(shared);
  auto* const states = reinterpret_cast<TileRowsState<T>*>(tiles.rest);
  const unsigned blocks_per_tile =
      (static_cast<unsigned>(p.tile_tokens) + Config::kBlockM - 1) / Config::kBlockM;
  const unsigned kv_heads = static_cast<unsigned>(p.num_kv_heads);
  const int first = static_cast<int>(blockIdx.x % blocks_per_tile) * Config::kBlockM;
  const int kv_head = static_cast<int>(blockIdx.x / blocks_per_tile % kv_heads);
  const int slot = static_cast<int>(blockIdx.x / blocks_per_tile / kv_heads);

  const KeyTile<T> keys{static_cast<const T*>(p.k) + slot * p.k_slot_stride +
                            first * p.k_token_stride + kv_head * p.k_head_stride,
                        static_cast<const T*>(p.v) + slot * p.v_slot_stride +
                            first * p.v_token_stride + kv_head * p.v_head_stride,
                        p.k_token_stride, p.v_token_stride,
                        static_cast<int>(p.tile_tokens) - first};
  TileRowsState<T>& state = states[threadIdx.x / kWarpSize];
  TileRows<Config> rows(p, slot, kv_head, first, statistics, normed_q, state);
  typename Config::Sums grad_k = {}, grad_v = {};
  add_up_keys<Config>(keys, rows, rows, softmax_scale_log2(p.softmax_scale), tiles, grad_k, grad_v);
  const int count = static_cast<int>(p.tile_tokens - state.first_key);
  const int64_t stride = p.num_kv_heads * Config::kHeadDim;
  const int64_t place =
      ((state.slot * p.tile_tokens + state.first_key) * p.num_kv_heads + state.kv_head) *
      Config::kHeadDim;
  const auto target = [&](void* grad) {
    return [count, stride, base = static_cast<T*>(grad) + place](int row) {
      return row < count ? base + row * stride : nullptr;
    };
  };
  store_sums<Config>(grad_v, 1.0f, tiles.own[1], target(p.grad_v));
  store_sums<Config>(grad_k, static_cast<float>(p.softmax_scale), tiles.own[0], target(p.grad_k));
}

// K and V of one kv head in the pool of tiles.
template <typename T, int kBlockN>
struct SegmentKeys {
  const CrossAttentionParams& p;
  const Segment* segments;
  int64_t kv_head;

  __device__ __forceinline__ RowRun<T> k_run(int block, int first) const {
    return run(p.k, p.k_slot_stride, p.k_token_stride, p.k_head_stride, block, first);
  }
  __device__ __forceinline__ RowRun<T> v_run(int block, int first) const {
    return run(p.v, p.v_slot_stride, p.v_token_stride, p.v_head_stride, block, first);
  }

 private:
  __device__ __forceinline__ RowRun<T> run(const void* base, int64_t slot_stride,
                                           int64_t token_stride, int64_t head_stride, int block,
                                           int first) const {
    const int key = (block & ((1 << kSubBits) - 1)) * kBlockN + first;
    const int64_t slot = segments[block >> kSubBits].slot;
    return {static_cast<const T*>(base) + slot * slot_stride + key * token_stride +
                kv_head * head_stride,
            token_stride, static_cast<int>(p.tile_tokens) - key};
  }
};

// What kernel 3 keeps in shared memory beside its tiles.
template <typename T>
struct QueriesExtra {
  BackwardRows<T> rows;
  QueryRows<T> given;   // q before the norm
  Segment segments[1];  // p.tiles of them
};

// Kernel 3. `parts`: head_dim floats per block, with q_norm.
template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    cross_queries_kernel(const __grid_constant__ Params p, const float2* statistics,
                         const typename Config::T* normed_q, float* parts) {
  using T = typename Config::T;
  extern __shared__ __align__(1024) char shared[];
  if constexpr (!Config::kCompiles) return __trap();
  const BackwardTiles<Config> tiles(shared);
  const CrossBlock block(p, Config::kBlockM, blockIdx.x);
  float* const part = parts + static_cast<int64_t>(blockIdx.x) * Config::kHeadDim;
  if (block.empty()) {
    if (normed_q != nullptr) {
      for (int i = threadIdx.x; i < Config::kHeadDim; i += Config::kThreads) part[i] = 0.0f;
    }
    return;
  }
  auto& extra = *reinterpret_cast<QueriesExtra<T>*>(tiles.rest);
  BackwardRows<T>& rows = extra.rows;
  QueryRows<T>& given = extra.given;
  if (threadIdx.x == 0) {
    fill_rows(rows, block, p, statistics, Config::kHeadDim);
    given = rows;
    use_normed(rows, block, p, normed_q, Config::kHeadDim);
  }
  __syncthreads();

  Segment* const segments = extra.segments;
  TileMask<Config, false> mask(p, rows, block.b, block.sequence.begin, segments);
  SegmentKeys<T, Config::kBlockN> keys{p, segments, block.kv_head};
  typename Config::Sums grad_q = {};
  add_up_queries<Config>(rows, keys, mask, softmax_scale_log2(p.softmax_scale), tiles, grad_q);
  float scale = static_cast<float>(p.softmax_scale);
  if (normed_q != nullptr) {
    Config::sync();  // all are done with the stages
    unnormalize<Config>(grad_q, scale, rows, given, static_cast<const T*>(p.q_norm_weight), p.eps,
                        reinterpret_cast<float*>(tiles.stages), part);
    scale = 1.0f;
  }
  store_sums<Config>(grad_q, scale, tiles.own[0],
                     [&](int row) { return rows.valid(row) ? rows.out_row(row) : nullptr; });
}

// What lies where in the workspace.
struct Workspace {
  int64_t normed_q, parts, bytes;

  explicit Workspace(const Params& p) {
    const int64_t rows = p.tokens * p.num_q_heads;
    const AttentionBackwardTile tile = attention_backward_tile(p.head_dim, element_size(p.dtype));
    static_assert(attention_backward_tile(128, 2).rows == kBackwardSm90Tile.rows);
    const bool normed = p.q_norm_weight != nullptr;
    normed_q = statistics_bytes(rows);
    parts = normed_q + (normed ? rows * p.head_dim * element_size(p.dtype) : 0);
    bytes = parts + (normed ? cross_blocks(p, tile.rows) * p.head_dim * int64_t{4} : 0);
  }
};

template <typename Config, typename HidingConfig>
cudaError_t launch_all(Params p, cudaStream_t stream) {
  using T = typename Config::T;
  constexpr int kHeadDim = Config::kHeadDim;
  const Workspace places(p);
  char* const workspace = static_cast<char*>(p.workspace);
  const bool normed = p.q_norm_weight != nullptr;
  float2* const statistics = reinterpret_cast<float2*>(workspace);
  T* const normed_q = normed ? reinterpret_cast<T*>(workspace + places.normed_q) : nullptr;
  float* const parts = reinterpret_cast<float*>(workspace + places.parts);
  const int64_t rows = p.tokens * p.num_q_heads;
  if (rows > INT32_MAX) return cudaErrorInvalidValue;
  cudaError_t status = launch(cross_rows_kernel<T, kHeadDim>, row_blocks(rows), kRowThreads, 0,
                              stream, {}, p, statistics, normed_q);
  if (status != cudaSuccess) return status;
  p.out = p.grad_q;
  const int64_t key_blocks =
      ceil_div<int64_t>(p.tile_tokens, Config::kBlockM) * p.num_kv_heads * p.num_slots;
  if (key_blocks > 0) {
    constexpr int64_t kSharedBytes =
        BackwardTiles<Config>::kBytes +
        Config::kThreads / kWarpSize * int64_t{sizeof(TileRowsState<T>)};
    status = launch(cross_keys_kernel<Config>, key_blocks, Config::kThreads, kSharedBytes, stream,
                    {}, p, statistics, normed_q);
    if (status != cudaSuccess) return status;
  }
  const int64_t query_blocks = cross_blocks(p, Config::kBlockM);
  if (query_blocks > 0) {
    const int64_t shared_bytes = BackwardTiles<HidingConfig>::kBytes +
                                 int64_t{sizeof(QueriesExtra<T>)} +
                                 p.tiles * int64_t{sizeof(Segment)};
    status = launch(cross_queries_kernel<HidingConfig>, query_blocks, Config::kThreads,
                    shared_bytes, stream, {}, p, statistics, normed_q, parts);
    if (status != cudaSuccess) return status;
  }
  if (!normed) return cudaSuccess;
  return launch(sum_parts_kernel<T>, p.head_dim / kPartColumns, kPartThreads, 0, stream, {}, parts,
                query_blocks, p.head_dim, static_cast<T*>(p.grad_q_norm_weight));
}

}  // namespace

// The statistics of the query rows; with q_norm, normalised q and parts of the
// weight's gradient.
int64_t cross_attention_backward_workspace(const Params& p) { return Workspace(p).bytes; }

int cross_attention_backward_cuda(const Params& p, CUstream_st* stream) {
  if (p.tokens == 0 || p.num_q_heads == 0) return cudaSuccess;
  if (p.max_seqlen * (p.num_q_heads / p.num_kv_heads) > kMaxAttentionRows || p.tiles >= kMaxTiles ||
      p.num_slots > INT32_MAX || p.batch * p.tiles > INT32_MAX || p.tile_tokens > kMaxTileTokens ||
      !(p.softmax_scale > 0)) {
    return cudaErrorInvalidValue;
  }
  if (!rows_aligned(
          p.dtype,
          {p.q, p.k, p.v, p.q_norm_weight, p.out, p.grad_out, p.grad_q, p.grad_k, p.grad_v,
           p.workspace},
          {p.q_batch_stride, p.q_token_stride, p.q_head_stride, p.k_slot_stride, p.k_token_stride,
           p.k_head_stride, p.v_slot_stride, p.v_token_stride, p.v_head_stride,
           p.grad_out_batch_stride, p.grad_out_token_stride, p.grad_out_head_stride})) {
    return cudaErrorMisalignedAddress;
  }
  return dispatch_attention_backward(p.dtype, p.head_dim,
                                     [&]<typename Config, typename Hiding>(
                                         std::type_identity<Config>, std::type_identity<Hiding>) {
                                       return launch_all<Config, Hiding>(p, stream);
                                     });
}

}  // namespace mllama
