// The warps of skinny_linear that multiply: eight, sharing the elements of every slab.
#pragma once

#include "../common/dispatch.cuh"
#include "../common/ptx.cuh"
#include "../common/reduce.cuh"
#include "../common/rms.cuh"
#include "output.cuh"
#include "weights.cuh"

namespace mllama {

// Sums of a round: 16 weight rows x 8 rows of x, or more weight rows where fewer rows of x.
constexpr int kRoundSums = kSlabRows * 8;

struct SkinnyShared {
  alignas(16) float sums[2][kSlabWarps][kRoundSums];  // two, so that one barrier per round suffices
  double squares[kSkinnyLinearMaxRows][kSlabWarps];
};

// kRowBlocks: eights of rows of x.
template <typename T, int kRowBlocks>
class SlabMultiplier {
 public:
  // Tiles of a pass. With more, their sums would not leave enough of the 128 registers with which
  // two blocks, and so two kernels, are on a multiprocessor at once.
  static constexpr int kMaxPassTiles = kRowBlocks == 1 ? 8 : 4;

  __device__ __forceinline__ SlabMultiplier(const SkinnyLinearParams& p, const WeightShare& share,
                                            SkinnyShared& shared)
      : p_(p), share_(share), shared_(shared) {}

  template <typename Ring>
  __device__ __forceinline__ void run(Ring& ring) {
    Activations next = load(0);  // on its way while the norm is measured
    if (p_.norm_weight != nullptr) measure_rows();
    gate_ = skinny_gate<T>(p_);
    for (int first_tile = 0; first_tile < share_.tiles; first_tile += share_.pass_tiles) {
      const int tiles = min(share_.pass_tiles, share_.tiles - first_tile);
      const bool last_pass = first_tile + tiles == share_.tiles;
      const SkinnyOutput<T> output = locate(first_tile, tiles, 0, 0);
      float sum[kMaxPassTiles][kRowBlocks][4] = {};
      for (int chunk = 0; chunk < share_.chunks(); ++chunk) {
        const Activations x = p_.norm_weight == nullptr ? next : normalized(next);
        const int next_chunk = chunk + 1 < share_.chunks() ? chunk + 1 : 0;
        if (next_chunk != 0 || !last_pass) next = load(next_chunk);
#pragma unroll
        for (int i = 0; i < kMaxPassTiles; ++i) {
          if (i >= tiles) break;
          multiply(sum[i], x, ring.wait(), first_tile + i);
          ring.release();
        }
      }
      reduce(sum, first_tile, tiles, output);
    }
  }

 private:
  // A warp's part of a chunk of x, as the B operands of its products: lane l holds elements
  // l % 4 * 8 to + 7 of row l / 4 of each 32 elements, which takes the order of k within the 32
  // from the instruction's to that of 16-byte vectors. The weight is read in the same order.
  // They are kept as words, which nothing takes apart before their chunk's turn: as vectors of
  // elements the compiler would wait for them where they are loaded.
  static constexpr int kVecs = kWarpDepth / 32;
  struct Activations {
    uint4 x[kRowBlocks][kVecs];
    uint4 norm_weight[kVecs];
  };

  __device__ __forceinline__ static int warp() { return threadIdx.x / kWarpSize; }
  __device__ __forceinline__ static int lane() { return threadIdx.x % kWarpSize; }
  // First element, within a chunk, of a lane's vector.
  __device__ __forceinline__ static int vec_begin(int vec) {
    return warp() * kWarpDepth + vec * 32 + lane() % 4 * 8;
  }

  __device__ __forceinline__ Activations load(int chunk) const {
    Activations a;
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const int k = chunk * kSlabDepth + vec_begin(v);
#pragma unroll
      for (int b = 0; b < kRowBlocks; ++b) {
        const int row = b * 8 + lane() / 4;
        a.x[b][v] = load_words_if(row < p_.rows && k < share_.depth(),
                                  static_cast<const T*>(p_.x) + row * p_.x_row_stride + k);
      }
      a.norm_weight[v] = load_words_if(p_.norm_weight != nullptr && k < share_.depth(),
                                       static_cast<const T*>(p_.norm_weight) + k);
    }
    return a;
  }

  __device__ __forceinline__ Activations normalized(Activations a) const {
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const Vec<T>& weight = *reinterpret_cast<const Vec<T>*>(&a.norm_weight[v]);
#pragma unroll
      for (int b = 0; b < kRowBlocks; ++b) {
        Vec<T>& x = *reinterpret_cast<Vec<T>*>(&a.x[b][v]);
        x = normalize(x, weight, rstd_[b]);
      }
    }
    return a;
  }

  // The factors of the norm. All warps share every row.
  __device__ __forceinline__ void measure_rows() {
    constexpr int kRows = 4, kAhead = 2;  // rows, and vectors of each, under way
    const int vecs = share_.depth() / Vec<T>::kSize;
    const T* const x = static_cast<const T*>(p_.x);
#pragma unroll 1
    for (int first_row = 0; first_row < p_.rows; first_row += kRows) {
      double sum[kRows] = {};
#pragma unroll 1
      for (int first = threadIdx.x; first < vecs; first += kAhead * kSlabThreads) {
        Vec<T> part[kAhead][kRows];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int v = first + i * kSlabThreads;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            part[i][r] = load_vec_if(v < vecs && first_row + r < p_.rows,
                                     x + (first_row + r) * p_.x_row_stride + v * Vec<T>::kSize);
          }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (first_row + r >= p_.rows) break;
#pragma unroll
          for (int i = 0; i < kAhead; ++i) sum[r] += sum_of_squares(part[i][r]);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (first_row + r >= p_.rows) break;
        const double total = warp_sum(sum[r]);
        if (lane() == 0) shared_.squares[first_row + r][warp()] = total;
      }
    }
    __syncthreads();
#pragma unroll
    for (int b = 0; b < kRowBlocks; ++b) {
      const int row = min(b * 8 + lane() / 4, static_cast<int>(p_.rows) - 1);
      double total = 0;
#pragma unroll
      for (int w = 0; w < kSlabWarps; ++w) total += shared_.squares[row][w];
      rstd_[b] = inverse_rms<T>(total, p_.k, p_.eps);
    }
  }

  // Row i of the product's operand is row weight_row(i) of a half: of two neighbours, the chunks of
  // one are in the first 64 bytes then, and those of the other in the second, so that eight lanes
  // reading 16 bytes each meet all banks once.
  __device__ __forceinline__ static int weight_row(int i) { return i / 2 + i % 2 * 4; }

  __device__ __forceinline__ void multiply(float (&sum)[kRowBlocks][4], const Activations& x,
                                           const char* slab, int tile) const {
    const char* const own = slab + warp() * kWarpBytes;
    // A half that is not there is replaced by the first.
    const char* const high_half = own + (share_.halves(tile) - 1) * kHalfBytes;
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const int offset = chunk_offset(weight_row(lane() / 4), v * 4 + lane() % 4);
      const uint4 low = *reinterpret_cast<const uint4*>(own + offset);
      const uint4 high = *reinterpret_cast<const uint4*>(high_half + offset);
#pragma unroll
      for (int b = 0; b < kRowBlocks; ++b) {
        const uint4 operand = x.x[b][v];
        mma_m16n8k16<T>(sum[b], {low.x, high.x, low.y, high.y}, operand.x, operand.y);
        mma_m16n8k16<T>(sum[b], {low.z, high.z, low.w, high.w}, operand.z, operand.w);
      }
    }
  }

  // A round adds up to 128 sums over the warps: those of a block of eight rows of x, of which
  // 2^columns_log2, at least two, are kept, for 8 / 2^columns_log2 tiles.
  __device__ __forceinline__ int columns_log2(int row_block) const {
    const int rows = static_cast<int>(p_.rows) - row_block * 8;
    return 1 + (rows > 2) + (rows > 4);
  }

  // The element of out that this thread makes in a round.
  __device__ __forceinline__ SkinnyOutput<T> locate(int first_tile, int tiles, int row_block,
                                                    int round) const {
    const int log2 = columns_log2(row_block), thread = threadIdx.x;
    const int row = row_block * 8 + (thread & ((1 << log2) - 1));
    const int slot = (thread >> log2) % kSlabRows;
    const int tile_column = slot / 8 * 8 + weight_row(slot % 8);
    const int tile = round * (8 >> log2) + thread / kSlabRows / (1 << log2);
    if (thread >= kRoundSums || row >= p_.rows || tile >= tiles ||
        tile_column >= min(share_.tile_columns(), share_.columns_from(first_tile + tile))) {
      return {};
    }
    const int column = (first_tile + tile) * share_.tile_columns() + tile_column;
    return {p_, row, share_.first_column + column};
  }

  __device__ __forceinline__ void reduce(const float (&sum)[kMaxPassTiles][kRowBlocks][4],
                                         int first_tile, int tiles, SkinnyOutput<T> output) {
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
        if (output.index >= 0) {
          float total = 0.0f, up = 0.0f;
#pragma unroll
          for (int w = 0; w < kSlabWarps; ++w) {
            const float* const other = shared_.sums[buffer_][w] + threadIdx.x;
            total += other[0];
            if (p_.swiglu) up += other[8 << log2];
          }
          output.store(p_, gate_, total, up);
        }
        buffer_ ^= 1;
        const bool last = round + 1 == rounds;
        output = locate(first_tile, tiles, last ? b + 1 : b, last ? 0 : round + 1);
      }
    }
  }

  const SkinnyLinearParams& p_;
  const WeightShare& share_;
  SkinnyShared& shared_;
  float gate_ = 1.0f;
  float rstd_[kRowBlocks] = {};
  int buffer_ = 0;
};

// f(T{}, std::integral_constant<int, eights of rows of x>{}).
template <typename F>
cudaError_t dispatch_mma(const SkinnyLinearParams& p, const F& f) {
  return dispatch_half(p.dtype, [&](auto element) {
    return p.rows <= 8 ? f(element, std::integral_constant<int, 1>{})
                       : f(element, std::integral_constant<int, 2>{});
  });
}

}  // namespace mllama
