// Vision self-attention over all tiles of an image; non-causal. Only (padding query, padding key)
// pairs are masked: valid queries do attend to padding keys, so absent tiles cannot be dropped.
// Online softmax in FlashAttention-2 order (arXiv 2307.08691); main loop in attention.cuh. 16 bits
// on sm_90a: vision_attention_sm90.cu.
//
// Tiling     One block per (batch, head, 128 query rows; float32: 64). Head dim 80 is native: 5
//            k-steps for the scores, 10 n-tiles for the output, shared rows of 176 bytes.
// Mask       One bit per token, read where it matters: a block of valid queries needs no mask at
//            all, a block of padding queries skips key blocks that are all padding before their
//            loads, and only blocks that mix are masked per element. A padding query that sees
//            nothing gives zeros.
// Precision  As attention.cuh.
// Traffic    q, k, v read and out written once from HBM, 4 * B * S * H * D elements; K and V of a
//            head stay in L2 for its row blocks. 4 tiles, S 6432, 16 heads of 80, bf16: 66 MB, 15
//            us at 4.3 TB/s; 4 * S^2 * H * D = 212 GFLOP, 0.27 ms at 790 TFLOP/s: bound by the
//            products and exp2.
// Aliasing   out aliases nothing. Rows of q, k, v may be strided (a fused qkv projection is read in
//            place), but every row must start on 16 bytes.

#include "../vision_attention.h"
#include "attention.cuh"
#include "attention_keys.cuh"
#include "hopper.h"
#include "vision_attention_sm90.h"

namespace mllama {
namespace {

// Per key block, in shared memory: 8 bytes of padding flags and its place in the list of visited
// blocks.
constexpr int64_t padding_mask_bytes(const VisionAttentionParams& p, int64_t block_keys) {
  return p.padding == nullptr
             ? 0
             : ceil_div(p.seqlen, block_keys) * int64_t{sizeof(uint64_t) + sizeof(int32_t)};
}

template <typename Config>
class PaddingMask {
 public:
  static constexpr bool kHidesRows = false;

  // Called by all threads of the block. `padding`: the sequence's flags, or null; `shared`:
  // padding_mask_bytes() bytes.
  __device__ __forceinline__ PaddingMask(const bool* padding, int first_row, int seqlen,
                                         char* shared)
      : shared_(shared),
        seqlen_(seqlen),
        visits_((seqlen + Config::kBlockN - 1) / Config::kBlockN) {
    if (padding == nullptr) return;
    const int row = first_row + threadIdx.x;
    const bool valid = threadIdx.x < Config::kBlockM && row < seqlen;
    const bool padded = valid && padding[row];
    if (!__syncthreads_or(padded)) return;
    flags_ = kSomePadded | (__syncthreads_and(padded || !valid) ? kAllPadded : 0);
#pragma unroll
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      const int slot_row = first_row + Config::row_of_slot(slot);
      if (slot_row < seqlen && padding[slot_row]) flags_ |= 1u << slot;
    }
    const int blocks = visits_;
    for (int block = warp_uniform(threadIdx.x / kWarpSize); block < blocks;
         block += Config::kWarps) {
      const uint64_t bits = padding_bits(padding, block);
      if (threadIdx.x % kWarpSize == 0) block_padding()[block] = bits;
    }
    __syncthreads();
    if (flags_ & kAllPadded) visits_ = list_visited(blocks);
  }

  __device__ __forceinline__ int next() {
    const int visit = visit_++;
    if (visit >= visits_) return kNoBlock;
    return flags_ & kAllPadded ? visited_blocks()[visit] : visit;
  }

  __device__ __forceinline__ bool enter(int block) {
    tail_ = tail_bits(block);
    hidden_ = flags_ & kSomePadded ? block_padding()[block] : 0;
    const bool masked = (tail_ | hidden_) != 0;
    tail_ >>= Config::first_column();
    hidden_ >>= Config::first_column();
    return masked;
  }

  __device__ __forceinline__ bool visible(int slot, int offset) const {
    const uint64_t hidden = tail_ | ((flags_ >> slot & 1) ? hidden_ : 0);
    return (hidden >> offset & 1) == 0;
  }

  __device__ __forceinline__ bool sees(int) const { return true; }

 private:
  static_assert(Config::kBlockN <= 64, "a block's keys are bits of one word");
  // Among the query rows of the block: blocks of padding keys are skipped if all are padding.
  static constexpr unsigned kSomePadded = 1u << 30, kAllPadded = 1u << 31;
  static constexpr uint64_t kAllKeys = ~uint64_t{0} >> (64 - Config::kBlockN);

  // Keys of the block behind the sequence's end.
  __device__ __forceinline__ uint64_t tail_bits(int block) const {
    const int keys = seqlen_ - block * Config::kBlockN;
    return keys >= Config::kBlockN ? 0 : kAllKeys & (kAllKeys << keys);
  }

  // Padding keys of the block; the same in all lanes.
  __device__ __forceinline__ uint64_t padding_bits(const bool* padding, int block) const {
    uint64_t bits = 0;
#pragma unroll
    for (int i = 0; i < Config::kBlockN; i += kWarpSize) {
      const int offset = i + threadIdx.x % kWarpSize, key = block * Config::kBlockN + offset;
      const bool padded = offset < Config::kBlockN && key < seqlen_ && padding[key];
      bits |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, padded)) << i;
    }
    return bits;
  }

  // Lists the blocks that hold any key for a padding query; every warp writes the same.
  __device__ __forceinline__ int list_visited(int blocks) const {
    const int lane = threadIdx.x % kWarpSize;
    int count = 0;
    for (int first = 0; first < blocks; first += kWarpSize) {
      const int block = first + lane;
      const bool visited =
          block < blocks && (block_padding()[block] | tail_bits(block)) != kAllKeys;
      const unsigned ballot = __ballot_sync(0xffffffffu, visited);
      if (threadIdx.x < kWarpSize && visited)
        visited_blocks()[count + __popc(ballot & ((1u << lane) - 1))] = block;
      count += __popc(ballot);
    }
    __syncthreads();
    return count;
  }

  __device__ __forceinline__ uint64_t* block_padding() const {
    return reinterpret_cast<uint64_t*>(shared_);
  }
  __device__ __forceinline__ int32_t* visited_blocks() const {
    return reinterpret_cast<int32_t*>(block_padding() +
                                      (seqlen_ + Config::kBlockN - 1) / Config::kBlockN);
  }

  char* shared_;
  int seqlen_;
  int visits_, visit_ = 0;
  unsigned flags_ = 0;              // bit s: query row of slot s is padding; and those above
  uint64_t tail_ = 0, hidden_ = 0;  // of the entered block, from this thread's first column
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    vision_attention_kernel(const __grid_constant__ VisionAttentionParams p) {
  using T = typename Config::T;
  extern __shared__ __align__(16) char shared[];
  const int seqlen = static_cast<int>(p.seqlen), num_heads = static_cast<int>(p.num_heads);
  const int row_blocks = (seqlen + Config::kBlockM - 1) / Config::kBlockM;
  const int row_block = blockIdx.x % row_blocks;  // neighbours share K and V in L2
  const int head = blockIdx.x / row_blocks % num_heads;
  const int64_t batch = blockIdx.x / row_blocks / num_heads;

  __shared__ QueryRows<T> rows;
  if (threadIdx.x == 0) {
    rows.q = static_cast<const T*>(p.q) + batch * p.q_batch_stride + head * p.q_head_stride;
    rows.out = static_cast<T*>(p.out) + (batch * p.seqlen * num_heads + head) * Config::kHeadDim;
    rows.q_token_stride = p.q_token_stride;
    rows.out_token_stride = p.num_heads * Config::kHeadDim;
    rows.q_head_stride = rows.out_head_stride = 0;
    rows.lse = p.lse == nullptr
                   ? nullptr
                   : static_cast<float*>(p.lse) + (batch * num_heads + head) * p.seqlen;
    rows.lse_head_stride = 0;
    rows.group = 1;
    rows.first = row_block * Config::kBlockM;
    rows.count = seqlen;
  }
  __syncthreads();

  DenseKeys<T, Config::kBlockN> keys{
      static_cast<const T*>(p.k) + batch * p.k_batch_stride + head * p.k_head_stride,
      static_cast<const T*>(p.v) + batch * p.v_batch_stride + head * p.v_head_stride,
      p.k_token_stride, p.v_token_stride, seqlen};
  PaddingMask<Config> mask(
      p.padding == nullptr ? nullptr : p.padding + batch * p.padding_batch_stride,
      row_block * Config::kBlockM, seqlen, shared + Config::kSharedBytes);
  attend<Config>(rows, PlainQuery{}, keys, mask, softmax_scale_log2(p.softmax_scale), shared);
}

template <typename Config>
cudaError_t launch(const VisionAttentionParams& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div<int64_t>(p.seqlen, Config::kBlockM) * p.num_heads * p.batch;
  const int64_t shared_bytes = Config::kSharedBytes + padding_mask_bytes(p, Config::kBlockN);
  return launch_attention(vision_attention_kernel<Config>, blocks, Config::kThreads, shared_bytes,
                          stream, p);
}

}  // namespace

int vision_attention_cuda(const VisionAttentionParams& p, CUstream_st* stream) {
  if (p.batch == 0 || p.seqlen == 0 || p.num_heads == 0) return cudaSuccess;
  if (p.seqlen > kMaxAttentionRows || !(p.softmax_scale > 0)) return cudaErrorInvalidValue;
  if (!rows_aligned(
          p.dtype, {p.q, p.k, p.v, p.out},
          {p.q_batch_stride, p.q_token_stride, p.q_head_stride, p.k_batch_stride, p.k_token_stride,
           p.k_head_stride, p.v_batch_stride, p.v_token_stride, p.v_head_stride})) {
    return cudaErrorMisalignedAddress;
  }
  if (uses_vision_sm90(p) && runs_sm90a()) return vision_attention_sm90(p, stream);
  return dispatch_dtype(p.dtype, [&](auto element) {
    return dispatch_config<decltype(element)>(
        p.head_dim, [&](auto config) { return launch<decltype(config)>(p, stream); });
  });
}

}  // namespace mllama
