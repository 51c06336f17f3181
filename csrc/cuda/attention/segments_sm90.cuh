// Attention over keys that come in segments (image tiles), each of which every query row sees whole
// or not at all (core_sm90.cuh). A segment is attended to by itself, as if all rows saw it, and
// then added to the totals of the rows that do: hiding it takes no select per score, and whatever
// it holds, NaN included, stays out of the other rows. A row's result depends on the segments that
// it sees and on their order, not on the other rows, nor on whether one thread block or a cluster
// of them attends to the segments.
//
// Shared memory  The totals of all but the last segment, float32, a thread's own rows where only it
//                reads and writes them.
#pragma once

#include "../common/sm90.cuh"
#include "../common/softmax.cuh"

namespace mllama {

// Mask policies of keys in segments (attend_sm90).
template <typename Mask>
concept SegmentedMask = requires(Mask& mask, int block) { mask.begins_segment(block); };

// Where a block keeps totals, and with whom it shares the segments.
struct SegmentsPlan {
  char* totals;  // SegmentTotals::kBytes of shared memory
  int blocks;    // of the cluster, each with one segment at most; or 1, with all segments
};

// One thread's rows of what the segments add up to.
template <typename Config>
class SegmentTotals {
  using T = typename Config::T;
  using Softmax = OnlineSoftmax<T, Config::kSlots, true>;
  using Output = float[Config::kDimTiles][4];
  static constexpr int kThreads = Config::kWarps * kWarpSize;  // that compute
  static_assert(Config::kSlots == 2, "a tile's four elements are two of each slot");

 public:
  static constexpr int kBytes = Config::kDimTiles * kThreads * sizeof(float4);

  __device__ __forceinline__ explicit SegmentTotals(const SegmentsPlan& plan)
      : outputs_(reinterpret_cast<float4*>(plan.totals) + threadIdx.x), blocks_(plan.blocks) {
    clear();
  }

  // Behind the last scores of a segment: takes its statistics and clears them for the next one.
  // `sees(slot)`: whether the segment counts for the row.
  template <typename Sees>
  __device__ __forceinline__ void end(Softmax& softmax, const Sees& sees) {
    take(0, sees(0), softmax.maximum[0], softmax.sum[0]);
    take(1, sees(1), softmax.maximum[1], softmax.sum[1]);
    softmax = Softmax();
  }

  // Behind the last product of that segment: adds its output to the totals and clears it.
  __device__ __forceinline__ void store(Output& out) const {
#pragma unroll
    for (int n = 0; n < Config::kDimTiles; ++n) {
      outputs_[n * kThreads] = total(n, out[n]);
#pragma unroll
      for (int i = 0; i < 4; ++i) zero(out[n][i]);
    }
  }

  // The same behind the last segment: the totals become the output.
  __device__ __forceinline__ void finish(Output& out) const {
#pragma unroll
    for (int n = 0; n < Config::kDimTiles; ++n) set(out[n], total(n, out[n]));
  }

  // Behind finish(), or without it where there was no segment: adds up what the cluster's blocks
  // have. They share the work; true for the warps that got the results of their rows. `statistics`:
  // a place in shared memory for this thread.
  __device__ __forceinline__ bool gather(Output& out, float4* statistics) {
    if (blocks_ == 1) return true;
#pragma unroll
    for (int n = 0; n < Config::kDimTiles; ++n) {
      outputs_[n * kThreads] = make_float4(out[n][0], out[n][1], out[n][2], out[n][3]);
    }
    // NaN: nothing. No maximum is NaN, fmaxf ignores them.
    *statistics =
        make_float4(holds_[0] ? maximum_[0] : NAN, holds_[1] ? maximum_[1] : NAN, sum_[0], sum_[1]);
    cluster_sync();
    const bool mine = threadIdx.x / kWarpSize % blocks_ == cluster_rank();
    if (mine) {
      clear();
#pragma unroll 1
      for (int block = 0; block < blocks_; ++block) {
        const float4 s = cluster_load4(cluster_address(statistics, block));
        take(0, !isnan(s.x), s.x, s.z);
        take(1, !isnan(s.y), s.y, s.w);
        const uint32_t outputs = cluster_address(outputs_, block);
#pragma unroll
        for (int n = 0; n < Config::kDimTiles; ++n) {
          const float4 segment = cluster_load4(outputs + n * kThreads * sizeof(float4));
          const float4 kept = make_float4(out[n][0], out[n][1], out[n][2], out[n][3]);
          set(out[n], sum(kept, segment));
        }
      }
    }
    cluster_sync();  // no block leaves while others read what it has
    return mine;
  }

  // This lane's share of the row's divisor.
  __device__ __forceinline__ float weights(int slot) const { return sum_[slot]; }
  __device__ __forceinline__ float maximum(int slot) const { return maximum_[slot]; }

 private:
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      maximum_[slot] = -INFINITY;
      sum_[slot] = 0.0f;
      holds_[slot] = stored_[slot] = adds_[slot] = false;
    }
  }

  __device__ __forceinline__ void take(int slot, bool sees, float maximum, float weights) {
    stored_[slot] = holds_[slot];
    adds_[slot] = sees;
    if (!sees) return;
    const float larger = fmaxf(maximum_[slot], maximum);
    const float shift = larger == -INFINITY ? 0.0f : larger;
    kept_factor_[slot] = softmax_exp2<T>(maximum_[slot] - shift);
    segment_factor_[slot] = softmax_exp2<T>(maximum - shift);
    sum_[slot] = fmaf(sum_[slot], kept_factor_[slot], weights * segment_factor_[slot]);
    maximum_[slot] = larger;
    holds_[slot] = true;
  }

  // What is kept and the segment that was taken last. Selects, not factors of 0: what is left out
  // may be NaN.
  __device__ __forceinline__ float sum(int slot, float kept, float segment) const {
    if (!stored_[slot]) kept = 0.0f;
    return adds_[slot] ? fmaf(kept, kept_factor_[slot], segment * segment_factor_[slot]) : kept;
  }
  __device__ __forceinline__ float4 sum(float4 kept, float4 segment) const {
    return make_float4(sum(0, kept.x, segment.x), sum(0, kept.y, segment.y),
                       sum(1, kept.z, segment.z), sum(1, kept.w, segment.w));
  }

  __device__ __forceinline__ float4 total(int n, const float (&out)[4]) const {
    const float4 kept =
        stored_[0] || stored_[1] ? outputs_[n * kThreads] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    return sum(kept, make_float4(out[0], out[1], out[2], out[3]));
  }

  __device__ __forceinline__ static void set(float (&out)[4], float4 value) {
    out[0] = value.x;
    out[1] = value.y;
    out[2] = value.z;
    out[3] = value.w;
  }

  // A zero that the compiler knows would be merged into accumulators by moves while products run,
  // and it would then make the products wait for each other.
  __device__ __forceinline__ static void zero(float& x) {
    asm volatile("mov.f32 %0, 0f00000000;\n" : "=f"(x));
  }

  float4* const outputs_;
  const int blocks_;
  float maximum_[Config::kSlots], sum_[Config::kSlots];
  bool holds_[Config::kSlots];  // the totals count a segment
  // Of the segment that was taken last: what there was before it, and whether it counts.
  bool stored_[Config::kSlots], adds_[Config::kSlots];
  float kept_factor_[Config::kSlots], segment_factor_[Config::kSlots];
};

// Of keys in one piece.
struct NoTotals {
  __device__ __forceinline__ explicit NoTotals(const SegmentsPlan&) {}
};

}  // namespace mllama
