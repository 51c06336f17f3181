// A product with few rows of x by eight warps, which share the columns of every slab of the weight.
#pragma once

#include "../common/dispatch.cuh"
#include "../common/ptx.cuh"
#include "../common/reduce.cuh"
#include "activations.cuh"
#include "output.cuh"
#include "share.cuh"

namespace mllama {

// Sums of a round: 16 weight rows x 8 rows of x, or more weight rows where fewer rows of x.
constexpr int kRoundSums = kSlabRows * 8;

struct FewRowsShared {
  alignas(16) float sums[2][kSlabWarps][kRoundSums];  // two, so that one barrier per round suffices
  double squares[kFewRows][kSlabWarps];
};

// Tiles of a pass. With more, their sums would not leave enough of the 128 registers with which two
// blocks, and so two kernels, are on a multiprocessor at once.
constexpr int max_pass_tiles(int row_blocks) { return row_blocks == 1 ? 8 : 4; }

// Weight says what a slab is and multiplies by it:
//   Element, kRowBlocks, kSplit        as Activations has them
//   kTargetAhead                       registers allow to request what a sum needs before it is
//   made kSlabTiles                         tiles of a slab, a divisor of max_pass_tiles()
//   begin_chunk(x, chunk)              a chunk of x, in every pass
//   begin_slab(slab, first tile, end)  its tiles are [first tile, min(+ kSlabTiles, end))
//   multiply(sum, x, slab, tile of the slab, tile)
//   weight_row(i)                      the row of a half that row i of the product's operand is
//   Terms(weight, column)              what a column's sums need, requested where it is located,
//   for finish(terms, index, sum, up)      what they become before they are rounded
template <typename Params, typename Weight>
class FewRowsProduct {
  using T = typename Weight::Element;
  static constexpr int kRowBlocks = Weight::kRowBlocks;
  static constexpr int kMaxPassTiles = max_pass_tiles(kRowBlocks);
  static constexpr int kSlabTiles = Weight::kSlabTiles;
  using X = Activations<T, kRowBlocks, Weight::kSplit>;
  using Terms = typename Weight::Terms;

 public:
  __device__ __forceinline__ FewRowsProduct(const WeightShare<Params>& share, FewRowsShared& shared,
                                            Weight& weight)
      : p_(share.p), share_(share), shared_(shared), weight_(weight) {}

  template <typename Ring>
  __device__ __forceinline__ void run(Ring& ring) {
    typename X::Words next = X::load(p_, 0);  // on its way while the norm is measured
    X activations;
    if (p_.norm_weight != nullptr) activations.measure(p_, shared_.squares);
    if (Weight::kTargetAhead) gate_ = linear_gate<T>(p_);
    for (int first_tile = 0; first_tile < share_.tiles; first_tile += share_.pass_tiles) {
      const int tiles = min(share_.pass_tiles, share_.tiles - first_tile);
      const bool last_pass = first_tile + tiles == share_.tiles;
      Target target;
      if (Weight::kTargetAhead) target = locate(first_tile, tiles, 0, 0);
      float sum[kMaxPassTiles][kRowBlocks][4] = {};
      for (int chunk = 0; chunk < share_.chunks(); ++chunk) {
        const typename X::Words x = p_.norm_weight == nullptr ? next : activations.normalized(next);
        const int next_chunk = chunk + 1 < share_.chunks() ? chunk + 1 : 0;
        if (next_chunk != 0 || !last_pass) next = X::load(p_, next_chunk);
        weight_.begin_chunk(x, chunk);
#pragma unroll
        for (int i = 0; i < kMaxPassTiles; i += kSlabTiles) {
          if (i >= tiles) break;
          const char* const slab = ring.wait();
          weight_.begin_slab(slab, first_tile + i, first_tile + tiles);
#pragma unroll
          for (int t = 0; t < kSlabTiles; ++t) {
            if (i + t >= tiles) break;
            weight_.multiply(sum[i + t], x, slab, t, first_tile + i + t);
          }
          ring.release();
        }
      }
      if (!Weight::kTargetAhead) {
        gate_ = linear_gate<T>(p_);
        target = locate(first_tile, tiles, 0, 0);
      }
      reduce(sum, first_tile, tiles, target);
    }
  }

 private:
  struct Target {
    LinearOutput<T> output;
    Terms terms;
  };

  __device__ __forceinline__ static int warp() { return threadIdx.x / kWarpSize; }
  __device__ __forceinline__ static int lane() { return threadIdx.x % kWarpSize; }

  // A round adds up to 128 sums over the warps: those of a block of eight rows of x, of which
  // 2^columns_log2, at least two, are kept, for 8 / 2^columns_log2 tiles.
  __device__ __forceinline__ int columns_log2(int row_block) const {
    const int rows = static_cast<int>(p_.rows) - row_block * 8;
    return 1 + (rows > 2) + (rows > 4);
  }

  // The element of out that this thread makes in a round.
  __device__ __forceinline__ Target locate(int first_tile, int tiles, int row_block,
                                           int round) const {
    const int log2 = columns_log2(row_block), thread = threadIdx.x;
    const int row = row_block * 8 + (thread & ((1 << log2) - 1));
    const int slot = (thread >> log2) % kSlabRows;
    const int tile_column = slot / 8 * 8 + Weight::weight_row(slot % 8);
    const int tile = round * (8 >> log2) + thread / kSlabRows / (1 << log2);
    if (thread >= kRoundSums || row >= p_.rows || tile >= tiles ||
        tile_column >= min(share_.tile_columns(), share_.columns_from(first_tile + tile))) {
      return {};
    }
    const int column =
        share_.first_column + (first_tile + tile) * share_.tile_columns() + tile_column;
    return {{p_, row, column}, {weight_, column}};
  }

  __device__ __forceinline__ void reduce(const float (&sum)[kMaxPassTiles][kRowBlocks][4],
                                         int first_tile, int tiles, Target target) {
#pragma unroll
    for (int b = 0; b < kRowBlocks; ++b) {
      const int log2 = columns_log2(b), round_tiles = 8 >> log2;
      const int rounds = (tiles + round_tiles - 1) / round_tiles;
      for (int round = 0; round < rounds; ++round) {
        float2* const own = reinterpret_cast<float2*>(shared_.sums[buffer_][warp()]);
#pragma unroll
        for (int i = 0; i < kMaxPassTiles; ++i) {
          const int tile = i - round * round_tiles;
          if (tile < 0 || tile >= round_tiles) continue;
          const int column = lane() % 4 * 2;
          if (column >= 1 << log2) continue;
          // Pairs as an index of float2: through a float address the compiler stores halves.
          const int low = (tile * kSlabRows + lane() / 4) << (log2 - 1);
          own[low + column / 2] = make_float2(sum[i][b][0], sum[i][b][1]);
          own[low + (8 << (log2 - 1)) + column / 2] = make_float2(sum[i][b][2], sum[i][b][3]);
        }
        __syncthreads();
        if (target.output.index >= 0) {
          float total = 0.0f, up = 0.0f;
#pragma unroll
          for (int w = 0; w < kSlabWarps; ++w) {
            const float* const other = shared_.sums[buffer_][w] + threadIdx.x;
            total += other[0];
            if (p_.swiglu) up += other[8 << log2];
          }
          weight_.finish(target.terms, target.output.index, total, up);
          target.output.store(p_, gate_, total, up);
        }
        buffer_ ^= 1;
        const bool last = round + 1 == rounds;
        target = locate(first_tile, tiles, last ? b + 1 : b, last ? 0 : round + 1);
      }
    }
  }

  const Params& p_;
  const WeightShare<Params>& share_;
  FewRowsShared& shared_;
  Weight& weight_;
  float gate_ = 1.0f;
  int buffer_ = 0;
};

// f(T{}, std::integral_constant<int, eights of rows of x>{}).
template <typename F>
cudaError_t dispatch_few_rows(DType dtype, int64_t rows, const F& f) {
  return dispatch_half(dtype, [&](auto element) {
    return rows <= 8 ? f(element, std::integral_constant<int, 1>{})
                     : f(element, std::integral_constant<int, 2>{});
  });
}

}  // namespace mllama
