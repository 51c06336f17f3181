// Causal grouped-query attention with rotary embedding, dense, packed or over a paged cache.
//
// Kernels    1. Append: rotates k and writes it, with v, into the pages (not paged: rotated k into
//            scratch; v is read in place). A key is rotated once, not once per query block.
//            2. One query row per sequence: split-KV decode (split_kv.cuh). Otherwise prefill: for
//            16 bits on sm_90a rotary_attention_sm90.cu, else the main loop of attention.cuh, one
//            block per (sequence, key/value head, 128 rows of packed query heads; float32: 64). q
//            is rotated on its way into shared memory, once per row, and the rotated q never goes
//            to memory. Rows are taken last first, so that the longest blocks start first.
//            Stream order is the only synchronisation between the two: appended keys are read by
//            blocks all over the device. On sm_90a 16-bit decode is a single launch, the append
//            included (rotary_decode_cluster.cu).
// Mask       Key j is visible to row i of a sequence if j <= cache_len + i. Blocks above the
//            diagonal are not visited; only blocks that cross it are masked per element.
// Precision  As attention.cuh; the rotation rounds both products and the sum (rope.cuh).
// Traffic    Append: 4 * tokens * Hkv * D elements; 2048 tokens, 8 heads of 128, bf16: 17 MB,
//            3.9 us at 4.3 TB/s. Prefill: 2 * S^2 * Hq * D FLOP, bound by the products: S 4096,
//            32 heads of 128: 137 GFLOP, 174 us at 790 TFLOP/s.
// Aliasing   q, k, v and out may not overlap each other or the caches. Input rows may be strided
//            but start on 16 bytes.

#include "../rotary_attention.h"
#include "attention.cuh"
#include "attention_keys.cuh"
#include "hopper.h"
#include "ragged.cuh"
#include "rope.cuh"
#include "rotary_attention_block.cuh"
#include "rotary_attention_sm90.h"
#include "split_kv.h"

namespace mllama {
namespace {

constexpr int kAppendThreads = 256;

template <typename T>
__device__ __forceinline__ const T* first_row(const void* base, const int32_t* cu_seqlens,
                                              int64_t b, int64_t begin, int64_t batch_stride,
                                              int64_t token_stride) {
  return static_cast<const T*>(base) +
         (cu_seqlens == nullptr ? b * batch_stride : begin * token_stride);
}

// One thread per (token, key/value head, chunk of pairs). Rows of q that belong to no sequence get
// a result here: zeros and a log-sum-exp of +infinity.
template <typename T>
__global__ void __launch_bounds__(kAppendThreads)
    append_kernel(const __grid_constant__ RotaryAttentionParams p) {
  const int head_dim = static_cast<int>(p.head_dim);
  const int chunks = head_dim / 2 / Vec<T>::kSize;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kAppendThreads + threadIdx.x;
  const int64_t row = index / chunks;
  const int chunk_index = static_cast<int>(index - row * chunks);
  const int64_t token = row / p.num_kv_heads, kv_head = row - token * p.num_kv_heads;
  if (token >= p.tokens) return;
  const RopeChunk<T> chunk(chunk_index, head_dim, p.interleaved);

  const int64_t b = find_sequence(p.cu_seqlens, p.batch, p.max_seqlen, token, p.tokens);
  if (b < 0) {
    const int64_t group = p.num_q_heads / p.num_kv_heads;
    T* out = static_cast<T*>(p.out) + (token * p.num_q_heads + kv_head * group) * head_dim;
    for (int64_t g = 0; g < group; ++g, out += head_dim) {
      store_vec(out + chunk.first, zero_vec<T>());
      store_vec(out + chunk.second, zero_vec<T>());
      if (p.lse != nullptr && chunk_index == 0) {
        static_cast<float*>(p.lse)[(kv_head * group + g) * p.tokens + token] = INFINITY;
      }
    }
    return;
  }
  const int64_t begin = p.cu_seqlens == nullptr ? b * p.max_seqlen : p.cu_seqlens[b];
  int64_t target = token * p.num_kv_heads + kv_head;  // row of the cache or the scratch
  if (p.page_table != nullptr) {
    const int64_t position = p.cache_lens[b] + token - begin;
    if (position < 0 || position >= p.max_pages * p.page_size) return;
    const int64_t slot = position / p.page_size;
    const int64_t page = p.page_table[b * p.max_pages + slot];
    if (page < 0 || page >= p.num_pages) return;  // the table is unchecked
    target = (page * p.num_kv_heads + kv_head) * p.page_size + position - slot * p.page_size;
  }

  const T* k = first_row<T>(p.k, p.cu_seqlens, b, begin, p.k_batch_stride, p.k_token_stride) +
               (token - begin) * p.k_token_stride + kv_head * p.k_head_stride;
  const int64_t angles = token % p.cos_rows;
  const T* cos = static_cast<const T*>(p.cos) + angles * p.cos_row_stride;
  const T* sin = static_cast<const T*>(p.sin) + angles * p.sin_row_stride;
  Vec<T> first = load_vec(k + chunk.first), second = load_vec(k + chunk.second);
  rotate_chunk(first, second, load_vec(cos + chunk_index * Vec<T>::kSize),
               load_vec(sin + chunk_index * Vec<T>::kSize), p.interleaved);
  T* k_target = static_cast<T*>(p.k_cache) + target * head_dim;
  store_vec(k_target + chunk.first, first);
  store_vec(k_target + chunk.second, second);
  if (p.page_table != nullptr) {
    const T* v = first_row<T>(p.v, p.cu_seqlens, b, begin, p.v_batch_stride, p.v_token_stride) +
                 (token - begin) * p.v_token_stride + kv_head * p.v_head_stride;
    T* v_target = static_cast<T*>(p.v_cache) + target * head_dim;
    store_vec(v_target + chunk.first, load_vec(v + chunk.first));
    store_vec(v_target + chunk.second, load_vec(v + chunk.second));
  }
}

// Keys of one sequence and head: rows at fixed strides or, with a page table, in pages. Like the
// query rows it is kept in shared memory: at head dim 128 the main loop leaves no registers for
// either.
template <typename T>
struct KeySpan {
  const T* k;  // first key, or page 0 of the cache, at the head
  const T* v;
  const int32_t* page_table;  // of the sequence, or null
  int64_t k_stride, v_stride, page_stride, num_pages;
  int page_size, length;
};

template <typename T>
__device__ __forceinline__ KeySpan<T> dense_span(const RotaryAttentionParams& p, int64_t b,
                                                 int64_t kv_head, const SequenceRows& rows) {
  KeySpan<T> span{};
  span.k = static_cast<const T*>(p.k_cache) + (rows.begin * p.num_kv_heads + kv_head) * p.head_dim;
  span.v = first_row<T>(p.v, p.cu_seqlens, b, rows.begin, p.v_batch_stride, p.v_token_stride) +
           kv_head * p.v_head_stride;
  span.k_stride = p.num_kv_heads * p.head_dim;
  span.v_stride = p.v_token_stride;
  span.length = static_cast<int>(rows.count);
  return span;
}

template <typename T>
__device__ __forceinline__ KeySpan<T> paged_span(const RotaryAttentionParams& p, int64_t b,
                                                 int64_t kv_head, int64_t length) {
  const int64_t head = kv_head * p.page_size * p.head_dim;
  KeySpan<T> span{};
  span.k = static_cast<const T*>(p.k_cache) + head;
  span.v = static_cast<const T*>(p.v_cache) + head;
  span.page_table = p.page_table + b * p.max_pages;
  span.k_stride = span.v_stride = p.head_dim;
  span.page_stride = p.num_kv_heads * p.page_size * p.head_dim;
  span.num_pages = p.num_pages;
  span.page_size = static_cast<int>(p.page_size);
  span.length = static_cast<int>(length);
  return span;
}

// page_size is a multiple of 16, so a run never leaves its page; rows of a page outside the cache
// read as zero.
template <typename T, int kBlockN>
struct SequenceKeys {
  const KeySpan<T>* span;

  __device__ __forceinline__ RowRun<T> k_run(int block, int first) const {
    return run(span->k, span->k_stride, block * kBlockN + first);
  }
  __device__ __forceinline__ RowRun<T> v_run(int block, int first) const {
    return run(span->v, span->v_stride, block * kBlockN + first);
  }

 private:
  __device__ __forceinline__ RowRun<T> run(const T* base, int64_t stride, int key) const {
    const int count = span->length - key;
    if (count <= 0) return {base, stride, 0};
    if (span->page_table == nullptr) return {base + key * stride, stride, count};
    const int slot = key / span->page_size;
    const int64_t page = __ldg(span->page_table + slot);
    if (page < 0 || page >= span->num_pages) return {base, stride, 0};
    return {base + page * span->page_stride + (key - slot * span->page_size) * stride, stride,
            count};
  }
};

template <typename Config>
class CausalMask {
 public:
  static constexpr bool kHidesRows = false;

  // Row r of the sequence (`group` per token) sees keys 0 .. past + r / group. `last_keys` is
  // shared memory for the last key of each of the block's rows; every warp writes those of its own
  // rows.
  __device__ __forceinline__ CausalMask(int first_row, int rows, int group, int past,
                                        int* last_keys)
      : last_keys_(last_keys) {
    const int warp_row = threadIdx.x / kWarpSize * Config::kRowsPerWarp;
    for (int i = threadIdx.x % kWarpSize; i < Config::kRowsPerWarp; i += kWarpSize) {
      last_keys[warp_row + i] = past + (first_row + warp_row + i) / group;
    }
    __syncwarp();
    const int last_row = min(first_row + Config::kBlockM, rows) - 1;
    blocks_ = (past + last_row / group) / Config::kBlockN + 1;
  }

  __device__ __forceinline__ int next() { return next_ < blocks_ ? next_++ : kNoBlock; }

  __device__ __forceinline__ bool enter(int block) {
#pragma unroll
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      last_[slot] =
          last_keys_[Config::row_of_slot(slot)] - block * Config::kBlockN - Config::first_column();
    }
    return true;
  }

  __device__ __forceinline__ bool visible(int slot, int offset) const {
    return offset <= last_[slot];
  }

  __device__ __forceinline__ bool sees(int) const { return true; }

 private:
  const int* last_keys_;
  int next_ = 0, blocks_;
  // The key each row sees last, counted from the thread's first column of the entered block.
  int last_[Config::kSlots];
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    rotary_attention_kernel(const __grid_constant__ RotaryAttentionParams p) {
  using T = typename Config::T;
  extern __shared__ __align__(16) char shared[];
  const RotaryBlock block(p, Config::kBlockM);
  if (block.empty()) return;

  __shared__ QueryRows<T> rows;
  __shared__ KeySpan<T> span;
  __shared__ int last_keys[Config::kBlockM];
  if (threadIdx.x == 0) {
    block.fill(rows, p, Config::kHeadDim);
    span = p.page_table == nullptr ? dense_span<T>(p, block.b, block.kv_head, block.sequence)
                                   : paged_span<T>(p, block.b, block.kv_head, block.length);
  }
  __syncthreads();

  const RotaryQuery<T> query = block.query<T>(p);
  CausalMask<Config> mask(block.first, block.count, block.group, static_cast<int>(block.past),
                          last_keys);
  SequenceKeys<T, Config::kBlockN> keys{&span};
  attend<Config>(rows, query, keys, mask, softmax_scale_log2(p.softmax_scale), shared);
}

template <typename Config>
cudaError_t launch_attend(const RotaryAttentionParams& p, cudaStream_t stream) {
  const int64_t blocks = rotary_blocks(p, Config::kBlockM);
  if (blocks == 0) return cudaSuccess;
  return launch(rotary_attention_kernel<Config>, blocks, Config::kThreads, Config::kSharedBytes,
                stream, {}, p);
}

template <typename T>
cudaError_t launch_append(const RotaryAttentionParams& p, cudaStream_t stream) {
  const int64_t threads = p.tokens * p.num_kv_heads * (p.head_dim / 2 / Vec<T>::kSize);
  return launch(append_kernel<T>, ceil_div<int64_t>(threads, kAppendThreads), kAppendThreads, 0,
                stream, {}, p);
}

// Blocks of the clusters that decode a call; 0: it is not decoded by clusters.
int64_t decode_cluster(const RotaryAttentionParams& p) {
  return uses_cluster(p) && runs_sm90a() ? rotary_decode_cluster(p) : 0;
}

bool is_aligned(const RotaryAttentionParams& p) {
  return rows_aligned(p.dtype,
                      {p.q, p.k, p.v, p.cos, p.sin, p.out, p.k_cache, p.v_cache, p.workspace},
                      {p.q_batch_stride, p.q_token_stride, p.q_head_stride, p.k_batch_stride,
                       p.k_token_stride, p.k_head_stride, p.v_batch_stride, p.v_token_stride,
                       p.v_head_stride, p.cos_row_stride, p.sin_row_stride});
}

}  // namespace

// Clusters need none, but whether they will run is not known here: the current device may not yet
// be that of the tensors.
int64_t rotary_attention_workspace(const RotaryAttentionParams& p) {
  return uses_split_kv(p) ? rotary_decode_workspace(p) : 0;
}

int rotary_attention_cuda(const RotaryAttentionParams& p, CUstream_st* stream) {
  if (p.tokens == 0) return cudaSuccess;
  const int64_t longest = p.max_pages * p.page_size + p.max_seqlen;
  if (longest * (p.num_q_heads / p.num_kv_heads) > kMaxAttentionRows || !(p.softmax_scale > 0)) {
    return cudaErrorInvalidValue;
  }
  if (!is_aligned(p)) return cudaErrorMisalignedAddress;
  if (const int64_t blocks = decode_cluster(p); blocks > 0) {
    return rotary_decode_cluster_cuda(p, blocks, stream);
  }
  return dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    return dispatch_config<T>(p.head_dim, [&](auto config) {
      const cudaError_t status = launch_append<T>(p, stream);
      if (status != cudaSuccess) return status;
      if (uses_split_kv(p)) return static_cast<cudaError_t>(rotary_decode_cuda(p, stream));
      if (uses_rotary_sm90(p) && runs_sm90a()) {
        return static_cast<cudaError_t>(rotary_attention_sm90(p, stream));
      }
      return launch_attend<decltype(config)>(p, stream);
    });
  });
}

}  // namespace mllama
