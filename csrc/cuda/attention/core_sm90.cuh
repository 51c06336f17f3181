// The attention core for sm_90a: warp-specialised, after FlashAttention-3 (Shah et al. 2024, arXiv
// 2407.08608). 16-bit elements. It computes what core_sm80.cuh computes, with the same queries and
// masks.
//
// Tiling     One thread block computes 128 query rows (tile_size.h) and walks over key
//            blocks. Two warpgroups compute 64 rows each; one warp of a third copies K and V by TMA
//            into rings of two tiles each, and gives its registers to the others.
// Overlap    A warpgroup issues the scores of the next block, then the product of this block's
//            weights with V, and does the softmax of the next block while the latter runs. Named
//            barriers make the warpgroups take turns in issuing, so that one's products run during
//            the other's softmax.
// Products   wgmma (wgmma.cuh). Q and K from shared memory; the weights stay in registers: the
//            accumulator layout of scores is the operand layout of the second product.
// Tiles      Panels of 128 or 32 bytes a row (PanelLayout), as the tensor copies leave them.
// Precision  Scores, softmax and output in float32; weights are rounded before the product with V.
//            One rounding at the store. The maximum is lazy (softmax.cuh): most blocks leave the
//            output unscaled.
// Segments   Keys whose segments are seen by some rows only: segments_sm90.cuh.
// Geometry   As core_sm80.cuh: the order of summation over keys depends on the sequence alone.
#pragma once

#include <type_traits>

#include "../common/dispatch.cuh"
#include "../common/sm90.cuh"
#include "../common/softmax.cuh"
#include "../common/wgmma.cuh"
#include "products_sm90.cuh"
#include "queries.cuh"
#include "segments_sm90.cuh"
#include "tile_sm90.cuh"

namespace mllama {

// Dynamic shared memory of one thread block, 1024-byte aligned: 161 KB at head dim 128 with 128
// keys, 131 KB at 80 with 176, of 227 KB.
template <typename Config>
struct AttentionSm90Shared {
  using T = typename Config::T;
  static constexpr int kStages = kAttentionSm90Stages;

  alignas(1024) char q[Config::QueryLayout::kBytes];
  alignas(1024) char k[kStages][Config::KeyLayout::kBytes];
  alignas(1024) char v[kStages][Config::KeyLayout::kBytes];
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  uint64_t q_full, v_tail;
  QueryRows<T> rows;

  // By one thread, before the block synchronises.
  __device__ __forceinline__ void init_barriers() {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&k_full[stage], 1);
      mbarrier_init(&v_full[stage], 1);
      mbarrier_init(&k_empty[stage], Config::kWarps);
      mbarrier_init(&v_empty[stage], Config::kWarps);
    }
    mbarrier_init(&q_full, 1);
    mbarrier_init(&v_tail, 1);
    fence_mbarrier_init();
  }
};

// The copying warp's part. K runs one block ahead of V: its place is free as soon as the scores
// before are there, that of V only behind the softmax that follows them.
template <typename Config, typename Keys, typename Mask>
__device__ __forceinline__ void copy_keys(AttentionSm90Shared<Config>& shared, const Keys& keys,
                                          Mask& mask) {
  using Layout = typename Config::KeyLayout;
  const int lane = threadIdx.x % kWarpSize;
  const auto expect = [&](uint64_t* barrier) {
    if (lane == 0) mbarrier_arrive_expect(barrier, Layout::kBytes);
    __syncwarp();
  };
  RingPosition<kAttentionSm90Stages> k_ring, v_ring;
  const auto copy_k = [&](int block) {
    if (block == kNoBlock) return;
    uint64_t* const full = &shared.k_full[k_ring.stage];
    mbarrier_wait(&shared.k_empty[k_ring.stage], k_ring.parity ^ 1);
    expect(full);
    keys.copy_k(block, shared.k[k_ring.stage], full);
    k_ring.advance();
  };
  uint32_t tail_parity = 0;
  const auto copy_v = [&](int block) {
    char* const tile = shared.v[v_ring.stage];
    uint64_t* const full = &shared.v_full[v_ring.stage];
    const int count = keys.count(block);
    const bool tail = count < Config::kBlockN;
    uint64_t* const landed = tail ? &shared.v_tail : full;
    mbarrier_wait(&shared.v_empty[v_ring.stage], v_ring.parity ^ 1);
    v_ring.advance();
    expect(landed);
    keys.copy_v(block, tile, landed);
    if (!tail) return;
    // What follows the last key has weight 0, but may hold NaN.
    mbarrier_wait(landed, tail_parity);
    tail_parity ^= 1;
    for (int i = max(count, 0) * Layout::kChunks + lane; i < Config::kBlockN * Layout::kChunks;
         i += kWarpSize) {
      *reinterpret_cast<uint4*>(tile + Layout::offset(i / Layout::kChunks, i % Layout::kChunks)) =
          make_uint4(0, 0, 0, 0);
    }
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(full);
  };
  int block = mask.next();
  copy_k(block);
  while (block != kNoBlock) {
    const int next = mask.next();
    copy_k(next);
    copy_v(block);
    block = next;
  }
}

// The computing warpgroups' part.
template <typename Config, typename Mask>
class AttentionSm90Compute {
  using T = typename Config::T;
  using QueryLayout = typename Config::QueryLayout;
  using KeyLayout = typename Config::KeyLayout;
  using Scores = float[1][Config::kKeyTiles][4];
  static constexpr int kSpan = QueryLayout::kPanelBytes;
  static constexpr int kWarpgroupThreads = 4 * kWarpSize;
  static constexpr bool kSegmented = SegmentedMask<Mask>;
  // Named barriers of the two warpgroups: each its turn to issue products, and for itself alone.
  static constexpr int kTurn = 1, kAlone = kTurn + Config::kWarpgroups;

 public:
  __device__ __forceinline__ AttentionSm90Compute(AttentionSm90Shared<Config>& shared, Mask& mask,
                                                  float scale_log2, const SegmentsPlan& segments)
      : shared_(shared),
        mask_(mask),
        scale_log2_(scale_log2),
        totals_(segments),
        warpgroup_(warp_uniform(threadIdx.x / kWarpgroupThreads)) {}

  // The warpgroup's threads meet.
  __device__ __forceinline__ void sync() const {
    named_barrier_sync(kAlone + warpgroup_, kWarpgroupThreads);
  }

  __device__ __forceinline__ void run() {
    int block = warp_uniform(mask_.next());
    if (block == kNoBlock) return;
    Scores scores;
    float factor[Config::kSlots];
    mbarrier_wait(&shared_.k_full[k_.stage], k_.parity);
    wgmma_fence(scores[0]);
    issue_scores(scores);
    wgmma_wait<0>(scores[0]);
    release(shared_.k_empty, k_);
    weigh(block, scores, factor);

    // A product with V is waited for at the top of the loop, not where its results are needed: the
    // compiler moves a wait up to the start of its basic block, ahead of the softmax that is to run
    // meanwhile.
    bool first = true, segment_ended = false;
    block = warp_uniform(mask_.next());
    while (true) {
      wgmma_wait<0>(out_);
      if (!first) release(shared_.v_empty, v_);
      if constexpr (kSegmented) {
        if (segment_ended) totals_.store(out_);
      }
      rescale(factor);
      pack(scores);
      if (block == kNoBlock) break;
      const int next = warp_uniform(mask_.next());
      mbarrier_wait(&shared_.k_full[k_.stage], k_.parity);
      if (!first || warpgroup_ != 0) wait_for_turn();
      wgmma_fence(scores[0]);
      issue_scores(scores);
      mbarrier_wait(&shared_.v_full[v_.stage], v_.parity);
      wgmma_fence(out_);
      issue_output();
      if (next != kNoBlock || warpgroup_ != Config::kWarpgroups - 1) pass_turn();
      wgmma_wait<1>(scores[0]);
      release(shared_.k_empty, k_);
      if constexpr (kSegmented) {
        segment_ended = warp_uniform(mask_.begins_segment(block));
        if (segment_ended) end_segment();
      }
      weigh(block, scores, factor);
      first = false;
      block = next;
    }
    mbarrier_wait(&shared_.v_full[v_.stage], v_.parity);
    wgmma_fence(out_);
    issue_output();
    wgmma_wait<0>(out_);
    if constexpr (kSegmented) {
      end_segment();
      totals_.finish(out_);
    }
  }

  // The results, through the warp's own rows of the query tile, so that global stores are whole
  // 16-byte vectors.
  __device__ __forceinline__ void store() {
    const QueryRows<T>& rows = shared_.rows;
    sync();  // no warp's products read the tile any more
    if constexpr (kSegmented) {
      // Rows of the tile that only this warpgroup's products read.
      char* const statistics = shared_.q + warpgroup_ * kRowsPerWarpgroup * kSpan;
      static_assert(kRowsPerWarpgroup * kSpan >= kWarpgroupThreads * sizeof(float4));
      if (!totals_.gather(
              out_, reinterpret_cast<float4*>(statistics) + threadIdx.x % kWarpgroupThreads)) {
        return;
      }
    }
#pragma unroll
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      const float total = weights(slot), inverse = total == 0.0f ? 0.0f : 1.0f / total;
      const int row = Config::row_of_slot(slot);
      if (rows.lse != nullptr && Config::first_column() == 0 && rows.valid(row)) {
        rows.store_lse(row, log_sum_exp<T>(maximum(slot), total, scale_log2_));
      }
#pragma unroll
      for (int n = 0; n < Config::kDimTiles; ++n) {
        char* const target =
            shared_.q + QueryLayout::offset(row, n) + Config::first_column() * sizeof(T);
        *reinterpret_cast<uint32_t*>(target) =
            pack_pair<T>(out_[n][slot * 2] * inverse, out_[n][slot * 2 + 1] * inverse);
      }
    }
    __syncwarp();
    constexpr int kLanes = QueryLayout::kPanelChunks, kRows = kWarpSize / kLanes;
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
    for (int i = 0; i < Config::kRowsPerWarp; i += kRows) {
      const int row = threadIdx.x / kWarpSize * Config::kRowsPerWarp + i + lane / kLanes;
      if (!rows.valid(row)) continue;
      T* const target = rows.out_row(row);
#pragma unroll
      for (int chunk = lane % kLanes; chunk < QueryLayout::kChunks; chunk += kLanes) {
        *reinterpret_cast<uint4*>(target + chunk * QueryLayout::kChunkElements) =
            *reinterpret_cast<const uint4*>(shared_.q + QueryLayout::offset(row, chunk));
      }
    }
  }

 private:
  using Ring = RingPosition<kAttentionSm90Stages>;

  // The row's divisor.
  __device__ __forceinline__ float weights(int slot) const {
    if constexpr (kSegmented) {
      return quad_sum(totals_.weights(slot));
    } else {
      return softmax_.total(slot);
    }
  }

  // The largest of the row's scores, or close to it; times the scale.
  __device__ __forceinline__ float maximum(int slot) const {
    if constexpr (kSegmented) {
      return totals_.maximum(slot);
    } else {
      return softmax_.maximum[slot];
    }
  }

  // Ring tiles are read by all warps of both warpgroups.
  __device__ __forceinline__ void release(uint64_t* empty, Ring& ring) {
    if (threadIdx.x % kWarpSize == 0) mbarrier_arrive(&empty[ring.stage]);
    ring.advance();
  }

  __device__ __forceinline__ void wait_for_turn() const {
    named_barrier_sync(kTurn + warpgroup_, 2 * kWarpgroupThreads);
  }
  __device__ __forceinline__ void pass_turn() const {
    named_barrier_arrive(kTurn + (warpgroup_ ^ 1), 2 * kWarpgroupThreads);
  }

  __device__ __forceinline__ void issue_scores(Scores& scores) const {
    const uint32_t own = shared_address(shared_.q) + warpgroup_ * kRowsPerWarpgroup * kSpan;
    mllama::issue_scores<Config, QueryLayout, KeyLayout>(scores[0], own,
                                                         shared_address(shared_.k[k_.stage]));
  }

  __device__ __forceinline__ void issue_output() {
    const uint64_t v =
        wgmma_descriptor_mn<kSpan>(shared_address(shared_.v[v_.stage]), KeyLayout::kPanelPitch);
#pragma unroll
    for (int step = 0; step < Config::kBlockN / 16; ++step) {
      Wgmma<T, Config::kHeadDim>::template rs<WgmmaMajor::kMN, true>(
          out_, weights_[step], v + wgmma_step(step * 16 * kSpan));
    }
    wgmma_commit();
  }

  // Scores to weights, in place.
  __device__ __forceinline__ void weigh(int block, Scores& scores,
                                        float (&factor)[Config::kSlots]) {
    if (warp_uniform(mask_.enter(block))) {
#pragma unroll
      for (int n = 0; n < Config::kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // a select: a hidden score may be NaN
          scores[0][n][i] = mask_.visible(i / 2, n * 8 + i % 2) ? scores[0][n][i] : -INFINITY;
        }
      }
    }
    softmax_.update(scores, scale_log2_, factor);
  }

  // Before the mask enters a block of the next segment.
  __device__ __forceinline__ void end_segment() {
    totals_.end(softmax_, [&](int slot) { return mask_.sees(slot); });
  }

  __device__ __forceinline__ void rescale(const float (&factor)[Config::kSlots]) {
    if (!__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) return;
#pragma unroll
    for (int n = 0; n < Config::kDimTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[n][i] *= factor[i / 2];
    }
  }

  // Two neighbouring n8 tiles of weights are one k16 operand.
  __device__ __forceinline__ void pack(const Scores& scores) {
#pragma unroll
    for (int step = 0; step < Config::kBlockN / 16; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&w)[4] = scores[0][2 * step + i / 2];
        weights_[step][i] = pack_pair<T>(w[i % 2 * 2], w[i % 2 * 2 + 1]);
      }
    }
  }

  static constexpr int kRowsPerWarpgroup = Config::kBlockM / Config::kWarpgroups;

  AttentionSm90Shared<Config>& shared_;
  Mask& mask_;
  const float scale_log2_;
  const int warpgroup_;
  Ring k_, v_;
  OnlineSoftmax<T, Config::kSlots, true> softmax_;
  std::conditional_t<kSegmented, SegmentTotals<Config>, NoTotals> totals_;
  float out_[Config::kDimTiles][4] = {};
  uint32_t weights_[Config::kBlockN / 16][4];
};

// Query policies that are filled by tensor copies (attend_sm90 below).
template <typename Query>
concept CopiedQuery =
    requires(const Query& query, char* tile, uint64_t* barrier) { query.copy(tile, barrier); };

// Computes one block of query rows. All threads of the block call it, with shared.rows written and
// the barriers initialised, behind a __syncthreads(). The policies:
//
//   Query   load<Config>(tile, rows): see queries.cuh. Or all lanes of the copying warp
//           call copy(char* tile, uint64_t* barrier): start tensor copies of QueryLayout::kBytes.
//   Keys    The copying warp's lanes all call
//             copy_k, copy_v(int block, char* tile, uint64_t* barrier): start tensor copies of the
//               block's keys into the tile; KeyLayout::kBytes in all land on the barrier.
//             int count(int block): value rows from there on are zeroed once they have landed.
//               kBlockN where the copies themselves bring zeros behind the last key.
//   Mask    As in core_sm80.cuh; every thread, of the copying warp too, has its own. A mask that
//           hides rows gives their blocks in segments (SegmentedMask) and answers visible() as if
//           they saw the segment:
//             bool begins_segment(int block): whether the block is the first of its segment.
//             bool sees(int slot): whether the row sees the segment of the entered block.
//           `segments` says where totals are kept and who attends to which.
template <typename Config, typename Query, typename Keys, typename Mask>
__device__ __forceinline__ void attend_sm90(AttentionSm90Shared<Config>& shared, const Query& query,
                                            const Keys& keys, Mask& mask, float scale_log2,
                                            const SegmentsPlan& segments = {}) {
  static_assert(Mask::kHidesRows == SegmentedMask<Mask>, "products with V take part in every row");
  const int warp = warp_uniform(threadIdx.x / kWarpSize);
  if (warp >= Config::kWarps) {
    registers_release<Config::kCopyRegisters>();
    if (warp != Config::kWarps) return;
    if constexpr (CopiedQuery<Query>) {
      if (threadIdx.x % kWarpSize == 0) {
        mbarrier_arrive_expect(&shared.q_full, Config::QueryLayout::kBytes);
      }
      __syncwarp();
      query.copy(shared.q, &shared.q_full);
    }
    copy_keys<Config>(shared, keys, mask);
    return;
  }
  registers_acquire<Config::kComputeRegisters>();
  AttentionSm90Compute<Config, Mask> compute(shared, mask, scale_log2, segments);
  if constexpr (CopiedQuery<Query>) {
    mbarrier_wait(&shared.q_full, 0);
  } else {
    query.template load<Config>(shared.q, shared.rows);
    cp_async_commit();
    cp_async_wait<0>();
    fence_proxy_async();
    compute.sync();  // the warpgroup's rows are there
  }
  compute.run();
  compute.store();
}

// Calls f(T{}, std::integral_constant<int, head_dim>{}).
template <typename F>
cudaError_t dispatch_sm90(DType dtype, int64_t head_dim, const F& f) {
  return dispatch_half(dtype, [&](auto element) {
    return dispatch_head_dim(head_dim, [&](auto dim) { return f(element, dim); });
  });
}

}  // namespace mllama
