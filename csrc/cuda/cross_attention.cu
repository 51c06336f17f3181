// Text queries over image tiles, grouped-query attention with one visibility flag per (query,
// tile). Online softmax in FlashAttention-2 order (arXiv 2307.08691); main loop in attention.cuh.
//
// Tiling     One block per (sequence, kv head, 128 rows; float32: 64). The G query heads of a group
//            are packed into the rows, so each K and V block is read once for G heads. A tile's
//            keys are its own blocks: 1601 patches are 50 of 32 and one of 1, and no block
//            straddles tiles. One query row per sequence (decode) goes to split-KV (split_kv.cuh,
//            on sm_90a split_kv_cluster.cuh) instead.
// Mask       Per block of rows every tile is one of: seen by no row (or absent), skipped before its
//            loads are issued; seen by all, no mask; mixed, a select per row. One flag per tile,
//            never per key: 8 KB instead of 26 MB at 2048 rows, 4 tiles, 6404 keys.
// Hidden     A row's scores for a hidden tile are replaced, not added to, and its output skips the
//            product with the tile's values: NaN in a tile that another row sees stays out.
// Empty      A row that sees nothing keeps sum 0 and stores 0. So does a row of no sequence.
// Precision  As attention.cuh; q_norm on the way into shared memory with the roundings of rms_norm.
// Traffic    K and V of the visible tiles once per block of rows, from L2 after the first. Prefill
//            of 512 rows, 4 tiles, 32 heads of 128, bf16: 53.7 GFLOP, 68 us at 790 TFLOP/s, bound
//            by the products. Below some 500 tokens there are fewer blocks than multiprocessors,
//            and time stays that of one block: 6404 keys in a row.
// Aliasing   out aliases nothing. Rows of q, k and v may be strided, but start on 16 bytes.

#include "../cross_attention.h"
#include "attention.cuh"
#include "hopper.h"
#include "ragged.cuh"
#include "split_kv.h"

namespace mllama {
namespace {

// A tile that some row of the block sees; the blocks are numbered visit << kSubBits | block of the
// tile.
struct TileVisit {
  int tile;
  int slot;  // of the pool
  int all_see;
};
constexpr int kSubBits = 16;
constexpr int64_t kMaxTiles = int64_t{1} << (31 - kSubBits);
constexpr int64_t kMaxTileTokens = int64_t{16} << kSubBits;  // at the smallest key block

// K and V of one kv head in the pool of tiles; kept in shared memory to spare registers.
template <typename T>
struct TilePool {
  const T* k;
  const T* v;
  int64_t k_slot_stride, k_token_stride, v_slot_stride, v_token_stride;
  int tile_tokens;
};

template <typename T, int kBlockN>
struct TileKeys {
  const TilePool<T>* pool;
  const TileVisit* visits;

  __device__ __forceinline__ RowRun<T> k_run(int block, int first) const {
    return run(pool->k, pool->k_slot_stride, pool->k_token_stride, block, first);
  }
  __device__ __forceinline__ RowRun<T> v_run(int block, int first) const {
    return run(pool->v, pool->v_slot_stride, pool->v_token_stride, block, first);
  }

 private:
  __device__ __forceinline__ RowRun<T> run(const T* base, int64_t slot_stride, int64_t token_stride,
                                           int block, int first) const {
    const int key = (block & ((1 << kSubBits) - 1)) * kBlockN + first;
    const int64_t slot = visits[block >> kSubBits].slot;
    return {base + slot * slot_stride + key * token_stride, token_stride, pool->tile_tokens - key};
  }
};

template <typename Config>
class TileMask {
 public:
  static constexpr bool kHidesRows = true;
  using T = typename Config::T;

  // Called by all threads of the block. `visits` has room for all tiles; `first_token` counts over
  // all sequences, `rows` are those of the block.
  __device__ __forceinline__ TileMask(const CrossAttentionParams& p, const QueryRows<T>& rows,
                                      int64_t b, int64_t first_token, TileVisit* visits)
      : p_(p), rows_(rows), first_token_(first_token), visits_(visits) {
    const int tiles = static_cast<int>(p.tiles);
    blocks_per_tile_ = (static_cast<int>(p.tile_tokens) + Config::kBlockN - 1) / Config::kBlockN;
    sub_ = blocks_per_tile_ - 1;
    // First what the block's rows see of every tile, at its own place; then the unseen are squeezed
    // out.
    for (int tile = warp_uniform(threadIdx.x / kWarpSize); tile < tiles; tile += Config::kWarps) {
      const TileVisit visit = look_at(tile, b);
      if (threadIdx.x % kWarpSize == 0) visits[tile] = visit;
    }
    __syncthreads();
    for (int first = 0; first < tiles; first += kWarpSize) {
      const int lane = threadIdx.x % kWarpSize;
      TileVisit visit{0, -1, 0};
      if (first + lane < tiles) visit = visits[first + lane];
      __syncthreads();  // all have read these before one of them is overwritten
      const unsigned seen = __ballot_sync(0xffffffffu, visit.slot >= 0);
      if (threadIdx.x < kWarpSize && visit.slot >= 0) {
        visits[count_ + __popc(seen & ((1u << lane) - 1))] = visit;
      }
      count_ += __popc(seen);
    }
    __syncthreads();
  }

  __device__ __forceinline__ int next() {
    const bool last = sub_ + 1 == blocks_per_tile_;
    visit_ += last;
    sub_ = last ? 0 : sub_ + 1;
    return visit_ < count_ ? visit_ << kSubBits | sub_ : kNoBlock;
  }

  __device__ __forceinline__ bool enter(int block) {
    const int visit = block >> kSubBits, sub = block & ((1 << kSubBits) - 1);
    if (sub == 0) sees_ = visits_[visit].all_see ? ~0u : rows_that_see(visits_[visit].tile);
    const int keys = static_cast<int>(p_.tile_tokens) - sub * Config::kBlockN;
    keys_ = keys - Config::first_column();
    return !visits_[visit].all_see || keys < Config::kBlockN;
  }

  __device__ __forceinline__ bool visible(int slot, int offset) const {
    return sees(slot) && offset < keys_;
  }
  __device__ __forceinline__ bool sees(int slot) const { return sees_ >> slot & 1; }

 private:
  __device__ __forceinline__ bool flag(int64_t token, int tile) const {
    return p_.tile_mask == nullptr ||
           p_.tile_mask[(first_token_ + token) * p_.tile_mask_row_stride + tile];
  }

  // Whether any and all tokens of the block see the tile; slot -1 if none does. Uniform in the
  // warp.
  __device__ __forceinline__ TileVisit look_at(int tile, int64_t b) const {
    const int64_t slot =
        p_.tile_table == nullptr ? b * p_.tiles + tile : p_.tile_table[b * p_.tiles + tile];
    bool any = false, all = true;
    const int last = rows_.last_token(Config::kBlockM);
    for (int first = rows_.token(0); first <= last; first += kWarpSize) {
      const int token = first + threadIdx.x % kWarpSize;
      const bool sees = flag(min(token, last), tile);
      any |= sees;
      all &= sees;
    }
    any = __any_sync(0xffffffffu, any);
    all = __all_sync(0xffffffffu, all);
    const bool present = slot >= 0 && slot < p_.num_slots;  // the table is unchecked
    return {tile, any && present ? static_cast<int>(slot) : -1, all};
  }

  // Bit s: the query row of slot s sees the tile.
  __device__ __forceinline__ unsigned rows_that_see(int tile) const {
    unsigned bits = 0;
#pragma unroll
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      const int row = Config::row_of_slot(slot);
      if (rows_.valid(row) && flag(rows_.token(row), tile)) bits |= 1u << slot;
    }
    return bits;
  }

  const CrossAttentionParams& p_;
  const QueryRows<T>& rows_;
  int64_t first_token_;
  TileVisit* visits_;
  int count_ = 0;  // visits
  int visit_ = -1, sub_, blocks_per_tile_;
  unsigned sees_ = 0;  // of the entered tile, a bit per slot
  int keys_ = 0;       // keys of the entered block from the thread's first column on
};

// q as it is, or normalised.
template <typename T>
struct CrossQuery {
  NormedQuery<T> normed;

  template <typename Config>
  __device__ __forceinline__ void load(char* tile, const QueryRows<T>& rows) const {
    if (normed.weight == nullptr) {
      PlainQuery{}.load<Config>(tile, rows);
    } else {
      normed.template load<Config>(tile, rows);
    }
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    cross_attention_kernel(const __grid_constant__ CrossAttentionParams p) {
  using T = typename Config::T;
  extern __shared__ __align__(16) char shared[];
  const int group = static_cast<int>(p.num_q_heads / p.num_kv_heads);
  const unsigned row_blocks =
      (static_cast<unsigned>(p.max_seqlen) * group + Config::kBlockM - 1) / Config::kBlockM;
  const int first = static_cast<int>(blockIdx.x % row_blocks) *
                    Config::kBlockM;  // neighbours share K and V in L2
  const int64_t kv_head = blockIdx.x / row_blocks % static_cast<unsigned>(p.num_kv_heads);
  const int64_t b = blockIdx.x / row_blocks / static_cast<unsigned>(p.num_kv_heads);
  const SequenceRows sequence = sequence_rows(p.cu_seqlens, b, p.max_seqlen, p.tokens);
  if (first >= sequence.count * group) return;

  __shared__ QueryRows<T> rows;
  __shared__ TilePool<T> pool;
  if (threadIdx.x == 0) {
    const int64_t head = kv_head * group;
    const int64_t q =
        p.cu_seqlens == nullptr ? b * p.q_batch_stride : sequence.begin * p.q_token_stride;
    rows.q = static_cast<const T*>(p.q) + q + head * p.q_head_stride;
    rows.out = static_cast<T*>(p.out) + (sequence.begin * p.num_q_heads + head) * Config::kHeadDim;
    rows.q_token_stride = p.q_token_stride;
    rows.q_head_stride = p.q_head_stride;
    rows.out_token_stride = p.num_q_heads * Config::kHeadDim;
    rows.out_head_stride = Config::kHeadDim;
    rows.group = group;
    rows.first = first;
    rows.count = static_cast<int>(sequence.count) * group;
    pool.k = static_cast<const T*>(p.k) + kv_head * p.k_head_stride;
    pool.v = static_cast<const T*>(p.v) + kv_head * p.v_head_stride;
    pool.k_slot_stride = p.k_slot_stride;
    pool.k_token_stride = p.k_token_stride;
    pool.v_slot_stride = p.v_slot_stride;
    pool.v_token_stride = p.v_token_stride;
    pool.tile_tokens = static_cast<int>(p.tile_tokens);
  }
  __syncthreads();

  TileVisit* const visits = reinterpret_cast<TileVisit*>(shared + Config::kSharedBytes);
  TileMask<Config> mask(p, rows, b, sequence.begin, visits);
  TileKeys<T, Config::kBlockN> keys{&pool, visits};
  const CrossQuery<T> query{{static_cast<const T*>(p.q_norm_weight), p.eps}};
  attend<Config>(rows, query, keys, mask, softmax_scale_log2(p.softmax_scale), shared);
}

template <typename Config>
cudaError_t launch(const CrossAttentionParams& p, cudaStream_t stream) {
  if (p.cu_seqlens != nullptr) {  // rows of no sequence
    const cudaError_t status = cudaMemsetAsync(
        p.out, 0, p.tokens * p.num_q_heads * p.head_dim * element_size(p.dtype), stream);
    if (status != cudaSuccess) return status;
  }
  const int64_t group = p.num_q_heads / p.num_kv_heads;
  const int64_t blocks =
      ceil_div<int64_t>(p.max_seqlen * group, Config::kBlockM) * p.num_kv_heads * p.batch;
  if (blocks == 0) return cudaSuccess;
  const int64_t shared_bytes =
      Config::kSharedBytes + p.tiles * static_cast<int64_t>(sizeof(TileVisit));
  return launch_attention(cross_attention_kernel<Config>, blocks, Config::kThreads, shared_bytes,
                          stream, p);
}

bool decodes_by_cluster(const CrossAttentionParams& p) { return uses_cluster(p) && runs_sm90a(); }

}  // namespace

// Clusters need none, but whether they will run is not known here: the current device may not yet
// be that of the tensors.
int64_t cross_attention_workspace(const CrossAttentionParams& p) {
  return uses_split_kv(p) ? cross_decode_workspace(p) : 0;
}

int cross_attention_cuda(const CrossAttentionParams& p, CUstream_st* stream) {
  if (p.tokens == 0 || p.num_q_heads == 0) return cudaSuccess;
  if (p.max_seqlen * (p.num_q_heads / p.num_kv_heads) > kMaxAttentionRows || p.tiles >= kMaxTiles ||
      p.num_slots > INT32_MAX || p.tile_tokens > kMaxTileTokens || !(p.softmax_scale > 0)) {
    return cudaErrorInvalidValue;
  }
  if (!rows_aligned(
          p.dtype, {p.q, p.k, p.v, p.q_norm_weight, p.out},
          {p.q_batch_stride, p.q_token_stride, p.q_head_stride, p.k_slot_stride, p.k_token_stride,
           p.k_head_stride, p.v_slot_stride, p.v_token_stride, p.v_head_stride})) {
    return cudaErrorMisalignedAddress;
  }
  if (decodes_by_cluster(p)) return cross_decode_cluster_cuda(p, stream);
  if (uses_split_kv(p)) return cross_decode_cuda(p, stream);
  return dispatch_dtype(p.dtype, [&](auto element) {
    return dispatch_config<decltype(element), true>(
        p.head_dim, [&](auto config) { return launch<decltype(config)>(p, stream); });
  });
}

}  // namespace mllama
