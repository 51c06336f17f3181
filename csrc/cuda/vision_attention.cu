// Vision self-attention over all tiles of an image set; non-causal. Only (padding query, padding
// key) pairs are masked: valid queries do attend to padding keys, so absent tiles cannot be
// dropped. Online softmax in FlashAttention-2 order (arXiv 2307.08691); main loop in attention.cuh.
//
// Tiling     One block per (batch, head, 128 query rows; float32: 64). Head dim 80 is native: 5
// k-steps for
//            the scores, 10 n-tiles for the output, shared rows of 176 bytes.
// Mask       One bit per token, read where it matters: a block of valid queries needs no mask at
// all, a block
//            of padding queries skips key blocks that are all padding before their loads, and only
//            blocks that mix are masked per element. A padding query that sees nothing gives zeros.
// Precision  As attention.cuh.
// Traffic    q, k, v read and out written once from HBM, 4 * B * S * H * D elements; K and V of a
// head stay in
//            L2 for its row blocks. 4 tiles, S 6432, 16 heads of 80, bf16: 66 MB, 15 us at 4.3
//            TB/s; 4 * S^2 * H * D = 212 GFLOP, 0.27 ms at 790 TFLOP/s: bound by the products and
//            exp2.
// Aliasing   out aliases nothing. Rows of q, k, v may be strided (a fused qkv projection is read in
// place), but
//            every row must start on 16 bytes.

#include "../vision_attention.h"
#include "attention.cuh"
#include "attention_keys.cuh"

namespace mllama {
namespace {

template <typename Config>
class PaddingMask {
 public:
  static constexpr bool kHidesRows = false;

  // Called by all threads of the block. `padding`: the sequence's flags, or null.
  __device__ __forceinline__ PaddingMask(const bool* padding, int first_row, int seqlen)
      : padding_(padding), seqlen_(seqlen) {
    if (padding == nullptr) return;
    const int row = first_row + threadIdx.x;
    const bool valid = threadIdx.x < Config::kBlockM && row < seqlen;
    const bool padded = valid && padding[row];
    some_padded_ = __syncthreads_or(padded);
    all_padded_ = __syncthreads_and(padded || !valid);
#pragma unroll
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      const int slot_row = first_row + Config::row_of_slot(slot);
      if (slot_row < seqlen && padding[slot_row]) padded_slots_ |= 1u << slot;
    }
  }

  __device__ __forceinline__ int next(int block) const {
    const int blocks = (seqlen_ + Config::kBlockN - 1) / Config::kBlockN;
    if (all_padded_) {
      while (block < blocks && (padding_bits(block) | tail_bits(block)) == kAllKeys) ++block;
    }
    return block < blocks ? block : kNoBlock;
  }

  __device__ __forceinline__ bool enter(int block) {
    tail_ = tail_bits(block);
    hidden_ = some_padded_ ? padding_bits(block) : 0;
    const bool masked = (tail_ | hidden_) != 0;
    tail_ >>= Config::first_column();
    hidden_ >>= Config::first_column();
    return masked;
  }

  __device__ __forceinline__ bool visible(int slot, int offset) const {
    const uint64_t hidden = tail_ | ((padded_slots_ >> slot & 1) ? hidden_ : 0);
    return (hidden >> offset & 1) == 0;
  }

  __device__ __forceinline__ bool sees(int) const { return true; }

 private:
  static_assert(Config::kBlockN == 64 || Config::kBlockN == 32,
                "a block's keys are bits of one word");
  static constexpr uint64_t kAllKeys = Config::kBlockN == 64 ? ~uint64_t{0} : 0xffffffffu;

  // Keys of the block behind the sequence's end.
  __device__ __forceinline__ uint64_t tail_bits(int block) const {
    const int keys = seqlen_ - block * Config::kBlockN;
    return keys >= Config::kBlockN ? 0 : kAllKeys & (kAllKeys << keys);
  }

  // Padding keys of the block; the same in all lanes.
  __device__ __forceinline__ uint64_t padding_bits(int block) const {
    uint64_t bits = 0;
#pragma unroll
    for (int i = 0; i < Config::kBlockN; i += kWarpSize) {
      const int key = block * Config::kBlockN + i + threadIdx.x % kWarpSize;
      bits |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, key < seqlen_ && padding_[key]))
              << i;
    }
    return bits;
  }

  const bool* padding_;
  int seqlen_;
  bool some_padded_ = false, all_padded_ = false;  // over the block's query rows
  unsigned padded_slots_ = 0;                      // of this thread's query rows
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

  QueryRows<T> rows;
  rows.q = static_cast<const T*>(p.q) + batch * p.q_batch_stride + head * p.q_head_stride;
  rows.out = static_cast<T*>(p.out) + (batch * p.seqlen * num_heads + head) * Config::kHeadDim;
  rows.q_token_stride = p.q_token_stride;
  rows.out_token_stride = p.num_heads * Config::kHeadDim;
  rows.q_head_stride = rows.out_head_stride = 0;
  rows.group = 1;
  rows.first = row_block * Config::kBlockM;
  rows.count = seqlen;

  DenseKeys<T, Config::kBlockN> keys{
      static_cast<const T*>(p.k) + batch * p.k_batch_stride + head * p.k_head_stride,
      static_cast<const T*>(p.v) + batch * p.v_batch_stride + head * p.v_head_stride,
      p.k_token_stride, p.v_token_stride, seqlen};
  PaddingMask<Config> mask(
      p.padding == nullptr ? nullptr : p.padding + batch * p.padding_batch_stride, rows.first,
      seqlen);
  attend<Config>(rows, PlainQuery{}, keys, mask, softmax_scale_log2(p.softmax_scale), shared);
}

template <typename Config>
cudaError_t launch(const VisionAttentionParams& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div<int64_t>(p.seqlen, Config::kBlockM) * p.num_heads * p.batch;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const auto kernel = vision_attention_kernel<Config>;
  const cudaError_t status = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSharedBytes);
  if (status != cudaSuccess) return status;
  kernel<<<static_cast<unsigned>(blocks), Config::kThreads, Config::kSharedBytes, stream>>>(p);
  return cudaGetLastError();
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
  return dispatch_dtype(p.dtype, [&](auto element) {
    return dispatch_head_dim<decltype(element)>(
        p.head_dim, [&](auto config) { return launch<decltype(config)>(p, stream); });
  });
}

}  // namespace mllama
