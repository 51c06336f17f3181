// Gradients of rotary_attention, dense or packed; backward_sm80.cuh has the algorithm.
//
// Kernels    1. Rows: statistics of query rows; q and k rotated, with the bits of the forward, into
//            the workspace and k_cache. Rows of no sequence get their zero gradients here.
//            2. Keys: one block per (sequence, key/value head, 128 keys; float32: 32) over the
//            packed query rows from the tile's first key on.
//            3. Queries: one block per (sequence, key/value head, 128 packed query rows; float32:
//            32) over the keys up to its last row.
//            Blocks with the most to do start first. dq and dk are rotated back in float32, in the
//            registers that sum them up.
// Mask       As the forward: blocks above the diagonal are not visited, and only warps whose rows
//            cross it mask per element.
// Traffic    Kernel 1: (4 Hq + 2 Hkv) * tokens * D elements; 4096 tokens, 32 and 8 heads of 128,
//            bf16: 151 MB, 35 us at 4.3 TB/s. Then 7 * S^2 * Hq * D FLOP: 481 GFLOP, 0.61 ms at 790
//            TFLOP/s; with 5 products it would be 0.43.
// Aliasing   The gradients, k_cache and the workspace overlap nothing. Rows of q, k, v and grad_out
//            may be strided but start on 16 bytes.

#include "../../rotary_attention.h"
#include "../attention/backward_delta.cuh"
#include "../attention/backward_sm90.cuh"
#include "../attention/masks.cuh"
#include "../attention/tile_size.h"
#include "../common/alignment.h"
#include "../common/launch.h"
#include "../common/ragged.cuh"
#include "../common/rope.cuh"
#include "block.cuh"

namespace mllama {
namespace {

using Params = RotaryAttentionBackwardParams;

template <typename T>
struct Angles {
  const T* cos;
  const T* sin;

  __device__ __forceinline__ Angles(const Params& p, int64_t token)
      : cos(static_cast<const T*>(p.cos) + token % p.cos_rows * p.cos_row_stride),
        sin(static_cast<const T*>(p.sin) + token % p.cos_rows * p.sin_row_stride) {}
};

// Kernel 1. Rows of a token: its query heads, then its key/value heads.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kRowThreads)
    rotary_rows_kernel(const __grid_constant__ Params p, float2* statistics, T* rotated_q) {
  const unsigned heads = static_cast<unsigned>(p.num_q_heads + p.num_kv_heads);
  const int64_t row = row_of_lanes();
  const int64_t token = static_cast<unsigned>(row) / heads;
  const bool valid = token < p.tokens;
  const int64_t head = row - token * heads, kv_head = head - p.num_q_heads;
  const QueryRowPlace<Params> place(p, valid ? token : 0, head);
  const bool is_query = kv_head < 0;
  const bool orphan = valid && p.cu_seqlens != nullptr &&
                      find_sequence(p.cu_seqlens, p.batch, p.max_seqlen, token, p.tokens) < 0;
  store_statistics<T, kHeadDim>(place, valid && is_query && !orphan, statistics);
  if (!valid) return;

  const int64_t key_row = (token * p.num_kv_heads + kv_head) * kHeadDim;
  if (orphan) {
    LaneRow<T, kHeadDim> zeros;
    zeros.clear();
    if (is_query) {
      zeros.store(static_cast<T*>(p.grad_q) + place.contiguous(), true);
    } else {
      zeros.store(static_cast<T*>(p.grad_k) + key_row, true);
      zeros.store(static_cast<T*>(p.grad_v) + key_row, true);
    }
    return;
  }
  const T* const source =
      is_query ? static_cast<const T*>(p.q) +
                     place.strided(p.q_batch_stride, p.q_token_stride, p.q_head_stride)
               : static_cast<const T*>(p.k) + place.strided(p.k_batch_stride, p.k_token_stride, 0) +
                     kv_head * p.k_head_stride;
  T* const target =
      is_query ? rotated_q + place.contiguous() : static_cast<T*>(p.k_cache) + key_row;
  const Angles<T> angles(p, token);
#pragma unroll
  for (int c = threadIdx.x % kRowLanes; c < kHeadDim / 2 / Vec<T>::kSize; c += kRowLanes) {
    const RopeChunk<T> chunk(c, kHeadDim, p.interleaved);
    Vec<T> first = load_vec(source + chunk.first), second = load_vec(source + chunk.second);
    rotate_chunk(first, second, load_vec(angles.cos + c * Vec<T>::kSize),
                 load_vec(angles.sin + c * Vec<T>::kSize), p.interleaved);
    store_vec(target + chunk.first, first);
    store_vec(target + chunk.second, second);
  }
}

// Undoes the rotation of a thread's sums of one row, which holds both elements of every pair.
template <typename Config>
__device__ __forceinline__ void rotate_back(typename Config::Sums& sums, int slot,
                                            const Angles<typename Config::T>& angles,
                                            bool interleaved) {
  const auto rotate = [&](float& x, float& y, int pair) {
    const float c = to_f32(angles.cos[pair]), s = to_f32(angles.sin[pair]);
    const float back = fmaf(x, c, y * s);
    y = fmaf(y, c, -(x * s));
    x = back;
  };
  if (interleaved) {
#pragma unroll
    for (int n = 0; n < Config::kDimTiles; ++n) {
      rotate(sums[0][n][slot * 2], sums[0][n][slot * 2 + 1], (n * 8 + Config::first_column()) / 2);
    }
  } else {
    constexpr int kHalf = Config::kDimTiles / 2;
#pragma unroll
    for (int n = 0; n < kHalf; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        rotate(sums[0][n][slot * 2 + i], sums[0][n + kHalf][slot * 2 + i],
               n * 8 + Config::first_column() + i);
      }
    }
  }
}

// Keys as rows: query row r (`group` per token) sees keys 0 .. r / group.
template <typename Config>
class CausalQueries {
 public:
  __device__ __forceinline__ CausalQueries(int first_key, int length, int group)
      : blocks_((length * group + Config::kBlockN - 1) / Config::kBlockN),
        next_(first_key * group / Config::kBlockN) {
    const int warp_row = static_cast<int>(threadIdx.x) / kWarpSize * Config::kRowsPerWarp;
    const int last = min(first_key + warp_row + Config::kRowsPerWarp - 1, length);
    masked_ = (last * group + Config::kBlockN - 1) / Config::kBlockN;
#pragma unroll
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      first_[slot] =
          min(first_key + Config::row_of_slot(slot), length) * group - Config::first_column();
    }
  }

  __device__ __forceinline__ int next() { return next_ < blocks_ ? next_++ : kNoBlock; }

  __device__ __forceinline__ bool enter(int block) {
    first_row_ = block * Config::kBlockN;
    return block < masked_;
  }

  __device__ __forceinline__ bool visible(int slot, int offset) const {
    return offset >= first_[slot] - first_row_;
  }

 private:
  int blocks_, next_;
  int masked_;                 // from this block on all keys of the warp are seen
  int first_[Config::kSlots];  // the row that sees each key first, from the first column on
  int first_row_ = 0;          // of the entered block
};

// What kernel 2 keeps in shared memory beside its tiles: registers are short while it sums up.
template <typename T>
struct KeysExtra {
  BackwardRows<T> rows;
  int64_t token, place;  // of the first key: its row of cos, and of the gradients
  int64_t count;         // keys
};

// Kernel 2. In `p`, q is the rotated one; so it is in kernel 3, and out is the gradient of q.
template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    rotary_keys_kernel(const __grid_constant__ Params p, const float2* statistics) {
  using T = typename Config::T;
  extern __shared__ __align__(1024) char shared[];
  if constexpr (!Config::kCompiles) return __trap();
  const BackwardTiles<Config> tiles(shared);
  // As blocks of the forward, but of rows that are keys, and the first tile first: it is seen most.
  struct KeyBlock {
    SequenceRows sequence;
    int64_t b, kv_head;
    int first, group;
    __device__ __forceinline__ void fill(QueryRows<T>& rows, const Params& p, int head_dim) const {
      const int64_t head = kv_head * group;
      rows.q = static_cast<const T*>(p.q) + (sequence.begin * p.num_q_heads + head) * head_dim;
      rows.q_token_stride = p.q_token_stride;
      rows.q_head_stride = p.q_head_stride;
      rows.group = group;
      rows.first = 0;
      rows.count = static_cast<int>(sequence.count) * group;
    }
  } block;
  const unsigned kv_heads = static_cast<unsigned>(p.num_kv_heads);
  const unsigned pairs = static_cast<unsigned>(p.batch) * kv_heads;
  block.group = static_cast<int>(p.num_q_heads / p.num_kv_heads);
  block.kv_head = blockIdx.x % kv_heads;
  block.b = blockIdx.x % pairs / kv_heads;
  block.first = static_cast<int>(blockIdx.x / pairs) * Config::kBlockM;
  block.sequence = sequence_rows(p.cu_seqlens, block.b, p.max_seqlen, p.tokens);
  const int length = static_cast<int>(block.sequence.count);
  if (block.first >= length) return;

  const int64_t kv_stride = p.num_kv_heads * Config::kHeadDim;
  const int64_t token = block.sequence.begin + block.first;
  const int64_t place = token * kv_stride + block.kv_head * Config::kHeadDim;
  auto& extra = *reinterpret_cast<KeysExtra<T>*>(tiles.rest);
  if (threadIdx.x == 0) {
    fill_rows(extra.rows, block, p, statistics, Config::kHeadDim);
    extra.token = token;
    extra.place = place;
    extra.count = length - block.first;
  }
  __syncthreads();

  const int64_t v = p.cu_seqlens == nullptr
                        ? block.b * p.v_batch_stride + block.first * p.v_token_stride
                        : token * p.v_token_stride;
  const KeyTile<T> keys{static_cast<const T*>(p.k_cache) + place,
                        static_cast<const T*>(p.v) + v + block.kv_head * p.v_head_stride, kv_stride,
                        p.v_token_stride, length - block.first};
  CausalQueries<Config> mask(block.first, length, block.group);
  typename Config::Sums grad_k = {}, grad_v = {};
  add_up_keys<Config>(keys, SequenceQueries<Config>{extra.rows}, mask,
                      softmax_scale_log2(p.softmax_scale), tiles, grad_k, grad_v);
  const int count = static_cast<int>(extra.count);
  const auto target = [&](void* grad) {
    return [count, base = static_cast<T*>(grad) + extra.place,
            stride = p.num_kv_heads * Config::kHeadDim](int row) {
      return row < count ? base + row * stride : nullptr;
    };
  };
  store_sums<Config>(grad_v, 1.0f, tiles.own[1], target(p.grad_v));
#pragma unroll
  for (int slot = 0; slot < Config::kSlots; ++slot) {
    const int row = min(Config::row_of_slot(slot), count - 1);
    rotate_back<Config>(grad_k, slot, Angles<T>(p, extra.token + row), p.interleaved);
  }
  store_sums<Config>(grad_k, static_cast<float>(p.softmax_scale), tiles.own[0], target(p.grad_k));
}

// Kernel 3.
template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    rotary_queries_kernel(const __grid_constant__ Params p, const float2* statistics) {
  using T = typename Config::T;
  extern __shared__ __align__(1024) char shared[];
  if constexpr (!Config::kCompiles) return __trap();
  const BackwardTiles<Config> tiles(shared);
  const RotaryBlock block(p, Config::kBlockM);
  if (block.empty()) return;
  auto& rows = *reinterpret_cast<BackwardRows<T>*>(tiles.rest);
  if (threadIdx.x == 0) fill_rows(rows, block, p, statistics, Config::kHeadDim);
  __syncthreads();

  const int64_t kv_stride = p.num_kv_heads * Config::kHeadDim;
  const int64_t v = p.cu_seqlens == nullptr ? block.b * p.v_batch_stride
                                            : block.sequence.begin * p.v_token_stride;
  DenseKeys<T, Config::kBlockN> keys{
      static_cast<const T*>(p.k_cache) + block.sequence.begin * kv_stride +
          block.kv_head * Config::kHeadDim,
      static_cast<const T*>(p.v) + v + block.kv_head * p.v_head_stride, kv_stride, p.v_token_stride,
      static_cast<int>(block.length)};
  CausalMask<Config> mask(block.first, block.count, block.group, 0);
  typename Config::Sums grad_q = {};
  add_up_queries<Config>(rows, keys, mask, softmax_scale_log2(p.softmax_scale), tiles, grad_q);
#pragma unroll
  for (int slot = 0; slot < Config::kSlots; ++slot) {
    const int row = Config::row_of_slot(slot);
    const int64_t token = block.sequence.begin + (rows.valid(row) ? rows.token(row) : 0);
    rotate_back<Config>(grad_q, slot, Angles<T>(p, token), p.interleaved);
  }
  store_sums<Config>(grad_q, static_cast<float>(p.softmax_scale), tiles.own[0],
                     [&](int row) { return rows.valid(row) ? rows.out_row(row) : nullptr; });
}

template <typename Config>
cudaError_t launch_all(Params p, cudaStream_t stream) {
  using T = typename Config::T;
  constexpr int64_t kSharedBytes = BackwardTiles<Config>::kBytes + sizeof(KeysExtra<T>);
  float2* const statistics = static_cast<float2*>(p.workspace);
  T* const rotated_q = reinterpret_cast<T*>(static_cast<char*>(p.workspace) +
                                            statistics_bytes(p.tokens * p.num_q_heads));
  const int64_t rows = p.tokens * (p.num_q_heads + p.num_kv_heads);
  if (rows > INT32_MAX) return cudaErrorInvalidValue;
  cudaError_t status = launch(rotary_rows_kernel<T, Config::kHeadDim>, row_blocks(rows),
                              kRowThreads, 0, stream, {}, p, statistics, rotated_q);
  if (status != cudaSuccess) return status;
  p.q = rotated_q;
  p.q_head_stride = p.head_dim;
  p.q_token_stride = p.num_q_heads * p.head_dim;
  p.q_batch_stride = p.max_seqlen * p.q_token_stride;
  p.out = p.grad_q;
  const int64_t key_blocks =
      ceil_div<int64_t>(p.max_seqlen, Config::kBlockM) * p.num_kv_heads * p.batch;
  const int64_t query_blocks = rotary_blocks(p, Config::kBlockM);
  if (key_blocks == 0) return cudaSuccess;
  status = launch(rotary_keys_kernel<Config>, key_blocks, Config::kThreads, kSharedBytes, stream,
                  {}, p, statistics);
  if (status != cudaSuccess) return status;
  return launch(rotary_queries_kernel<Config>, query_blocks, Config::kThreads, kSharedBytes, stream,
                {}, p, statistics);
}

bool is_aligned(const Params& p) {
  return rows_aligned(
      p.dtype,
      {p.q, p.k, p.v, p.cos, p.sin, p.out, p.k_cache, p.workspace, p.grad_out, p.grad_q, p.grad_k,
       p.grad_v},
      {p.q_batch_stride, p.q_token_stride, p.q_head_stride, p.k_batch_stride, p.k_token_stride,
       p.k_head_stride, p.v_batch_stride, p.v_token_stride, p.v_head_stride, p.cos_row_stride,
       p.sin_row_stride, p.grad_out_batch_stride, p.grad_out_token_stride, p.grad_out_head_stride});
}

}  // namespace

// The statistics of the query rows, and the rotated rows.
int64_t rotary_attention_backward_workspace(const Params& p) {
  const int64_t rows = p.tokens * p.num_q_heads;
  return statistics_bytes(rows) + rows * p.head_dim * element_size(p.dtype);
}

int rotary_attention_backward_cuda(const Params& p, CUstream_st* stream) {
  if (p.tokens == 0) return cudaSuccess;
  if (p.max_seqlen * (p.num_q_heads / p.num_kv_heads) > kMaxAttentionRows ||
      !(p.softmax_scale > 0)) {
    return cudaErrorInvalidValue;
  }
  if (!is_aligned(p)) return cudaErrorMisalignedAddress;
  return dispatch_attention_backward(p.dtype, p.head_dim,
                                     [&]<typename Config>(std::type_identity<Config>, auto) {
                                       return launch_all<Config>(p, stream);
                                     });
}

}  // namespace mllama
