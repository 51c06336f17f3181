// Gradient of rms_norm and add_rms_norm. With r = 1 / rms(total), n = r * total (n' rounded, as the
// forward rounds it) and g = weight * grad_y, a row's
//   grad_residual = r * (g - n * mean(g * n)) + grad_total,   grad_weight += grad_y * n',
// and behind a gate grad_x = tanh(gate) * row_mask * grad_residual and
//   grad_gate = (1 - tanh(gate)^2) * sum over visible rows of grad_residual * x.
// Nothing but inputs of the forward and its sum is needed: r comes out of the reduction that the
// mean takes anyway. Roundings count as the identity.
//
// Tiling     A team of threads owns a row, two 16-byte vectors per thread, and goes on
//            to other rows of its block, so that its share of grad_weight stays in registers: 16
//            lanes with one vector up to 16 vectors (head dims: millions of short rows), else whole
//            warps, up to 512 threads for 1024 vectors (8192 elements of 16 bits, 4096 of float32).
//            512 threads are one or more teams. While a row is worked on, the next one is on its
//            way into shared memory, where each thread reads back but what it has asked for itself.
//            At the end the teams' shares are added up in shared memory and written as one partial
//            row. Other rows take a whole block and two passes, the second out of L1 and L2, with
//            the shares in shared memory or, where that is too small, in the partial row itself;
//            and so do rows on a device that cannot hold the ring: 144 KB with a gate, 112 KB
//            without but with grad_total, of which sm_86 and sm_89 have 99 KB.
// Two stages One partial row per block of rows (rms_norm.h: norm_row_blocks), then a kernel that
//            adds them up by columns. The order of all sums follows from rows and dim: no atomics.
// Precision  float32 for 16-bit types; the sums of float32 rows and columns in double. Each result
//            is rounded once. The gate's sum is in double but for a thread's products in one row.
// Traffic    rms_norm 3 * rows * dim elements, add_rms_norm 4, with a gate 6; the partial rows are
//            written and read again in L2: 128 rows of float32, 4 % of the floor at 4096 x 4096
//            bf16 (101 MB, 23.4 us at 4.3 TB/s), 2 % at 16384 rows. The weight is read once per
//            block.
// In flight  dim 4096, 16 bits: two teams, of which each has a row of 16 KB (24 KB, 32 KB) on its
//            way while it works and two while it waits: 32 to 64 KB per multiprocessor from one
//            block, where the reads of 4.3 TB/s need 17 KB. A second block fits without a gate: 64
//            registers and 80 KB (112 KB) of shared memory each. One barrier per row and team.
// Launch     On Hopper before the previous kernel has ended (sm90.cuh: the rule); everything is
//            read behind the wait.
// Aliasing   Results overlap no input. Input rows may be strided, and of any alignment. A row that
//            row_mask hides is not read from x.

#include "../../rms_norm.h"
#include "../common/alignment.h"
#include "../common/device.h"
#include "../common/dispatch.cuh"
#include "../common/launch.h"
#include "../common/reduce.cuh"
#include "../common/rms.cuh"
#include "../common/rows.cuh"
#include "../common/sm90.cuh"
#include "../common/vec_math.cuh"
#include "partials.cuh"

namespace mllama {
namespace {

constexpr int kThreads = 512;
constexpr int kShortRowLanes = 16;
constexpr int kTeamVecs = 2;                 // of a row per thread of a team of whole warps
constexpr int kMaxSumsInShared = 144 << 10;  // bytes; an A100 has 163 KB
constexpr int kStages = 2;                   // of the ring of rows in shared memory

struct RowIndex {
  unsigned outer, inner;
};

__device__ __forceinline__ RowIndex split_row(const RmsNormBackwardParams& p, unsigned row) {
  const unsigned inner = static_cast<unsigned>(p.inner);
  return {row / inner, row % inner};
}

template <typename T>
__device__ __forceinline__ const T* row_of(const RowsView& rows, const RowIndex& at) {
  return static_cast<const T*>(rows.data) + at.outer * rows.outer_stride +
         at.inner * rows.inner_stride;
}

__device__ __forceinline__ bool is_visible(const RmsNormBackwardParams& p, unsigned row) {
  return p.row_mask == nullptr || p.row_mask[row];
}

__device__ __forceinline__ unsigned block_begin(int64_t rows, unsigned block) {
  return static_cast<unsigned>(rows * block / gridDim.x);
}

template <typename T>
struct RowSums {
  double squares;         // of total
  Statistic<T> products;  // weight * grad_y * total

  __device__ __forceinline__ void add(const Vec<T>& total, const Vec<T>& grad_y,
                                      const Vec<T>& weight) {
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      float t[kPerWord<T>], g[kPerWord<T>], w[kPerWord<T>];
      unpack_word(total, word, t);
      unpack_word(grad_y, word, g);
      unpack_word(weight, word, w);
#pragma unroll
      for (int i = 0; i < kPerWord<T>; ++i) {
        using S = Statistic<T>;
        products = fma(static_cast<S>(w[i] * g[i]), static_cast<S>(t[i]), products);
      }
    }
    squares += sum_of_squares(total);
  }
};

// Sums over the kShortRowLanes lanes, or the `lanes` threads, of a team. Calls in turn alternate
// `buffer`: a team may be one barrier apart.
template <typename T, bool kShort>
__device__ __forceinline__ RowSums<T> team_sums(RowSums<T> sums, int team, int lanes, int buffer) {
  constexpr int kLanes = kShort ? kShortRowLanes : kWarpSize;
  sums.squares = warp_sum<kLanes>(sums.squares);
  sums.products = warp_sum<kLanes>(sums.products);
  if constexpr (!kShort) {
    __shared__ RowSums<T> warp_sums[2][kThreads / kWarpSize];
    if (lanes == kWarpSize) return sums;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    if (threadIdx.x % kWarpSize == 0) warp_sums[buffer][warp] = sums;
    named_barrier_sync(1 + team, lanes);
    sums = {};
    for (int w = team * lanes / kWarpSize; w < (team + 1) * lanes / kWarpSize; ++w) {
      sums.squares += warp_sums[buffer][w].squares;
      sums.products += warp_sums[buffer][w].products;
    }
  }
  return sums;
}

// What the elements of a row share: r and mean(g * n); behind a gate its tanh and the row's sum.
template <typename T>
struct RowFactors {
  float rstd, mean, gate;
  bool visible;
  Statistic<T> gate_sum = 0;

  template <typename Dim>
  __device__ __forceinline__ RowFactors(const RowSums<T>& sums, Dim dim, double eps, float gate,
                                        bool visible)
      : gate(gate), visible(visible) {
    using S = Statistic<T>;
    rstd = inverse_rms<T>(sums.squares, dim, eps);
    mean = static_cast<float>(static_cast<S>(rstd) * (sums.products / static_cast<S>(dim)));
  }
};

template <typename T>
struct Gradients {
  Vec<T> sum, x;
};

// The gradients of the sum and, behind a gate, of x for one vector; adds to those of weight and
// gate.
template <typename T, bool kGated>
__device__ __forceinline__ Gradients<T> row_gradients(RowFactors<T>& row, const Vec<T>& total,
                                                      const Vec<T>& grad_y, const Vec<T>& weight,
                                                      const Vec<T>& grad_total, const Vec<T>& x,
                                                      WeightSums<T>& weight_sums) {
  using S = Statistic<T>;
  Gradients<T> result;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    constexpr int kSize = kPerWord<T>;
    float n[kSize], g[kSize], w[kSize], gradient[kSize];
    unpack_word(total, word, n);
    unpack_word(grad_y, word, g);
    unpack_word(weight, word, w);
    unpack_word(grad_total, word, gradient);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      n[i] *= row.rstd;
      gradient[i] = fmaf(row.rstd, fmaf(-n[i], row.mean, w[i] * g[i]), gradient[i]);
    }
    pack_word(result.sum, word, gradient);
    Vec<T> rounded;
    pack_word(rounded, word, n);
    unpack_word(rounded, word, n);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      S& sum = weight_sums[word * kSize + i];
      if constexpr (std::is_same_v<T, float>) {
        sum += static_cast<double>(g[i] * n[i]);
      } else {
        sum = fmaf(g[i], n[i], sum);
      }
    }
    if constexpr (kGated) {
      float values[kSize];
      unpack_word(x, word, values);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        // What a hidden row holds, or is given, must not get through, even as NaN.
        gradient[i] = row.visible ? gradient[i] : 0.0f;
        row.gate_sum = fma(static_cast<S>(gradient[i]), static_cast<S>(values[i]), row.gate_sum);
        gradient[i] = row.visible ? row.gate * gradient[i] : 0.0f;
      }
      pack_word(result.x, word, gradient);
    }
  }
  return result;
}

template <typename T>
__device__ __forceinline__ float gate_factor(const RmsNormBackwardParams& p) {
  return p.gate == nullptr ? 1.0f : tanh_gate<T>(p.gate);
}

__device__ __forceinline__ void store_gate_partial(const RmsNormBackwardParams& p, double sum) {
  sum = block_sum_once(sum);
  if (p.gate_partials != nullptr && threadIdx.x == 0) p.gate_partials[blockIdx.x] = sum;
}

// Rows that start and end on 16 bytes. What all threads know comes as arguments, which take no
// registers.
struct Teams {
  int lanes, count;  // threads of a team, teams of a block
  int vecs;          // of a row
  int tensors;  // read per row: total, grad_y, grad_total if there is one, x if there is a gate
};

template <typename T, bool kGated, bool kShort>
__global__ void __launch_bounds__(kThreads, kGated ? 1 : 2)
    rms_norm_backward_kernel(const RmsNormBackwardParams p, const Teams teams) {
  constexpr int kVecs = kShort ? 1 : kTeamVecs, kSize = Vec<T>::kSize;
  extern __shared__ uint4 shared[];  // [weight, then stage and tensor][vector of a thread][thread]
  wait_for_previous_kernel();
  start_next_kernel();
  const int lanes = kShort ? kShortRowLanes : teams.lanes;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int team = thread / lanes, lane = thread % lanes, vecs = teams.vecs;
  const unsigned begin = block_begin(p.outer * p.inner, blockIdx.x);
  const unsigned end = block_begin(p.outer * p.inner, blockIdx.x + 1);
  const bool has_grad_total = p.grad_total.data != nullptr;
  const bool has_x = kGated && p.x.data != nullptr;
  const auto slot = [&](int tensor, int i) {
    return shared + (tensor * kVecs + i) * kThreads + thread;
  };
  const auto staged = [&](int tensor, int i) {
    return *reinterpret_cast<const Vec<T>*>(slot(tensor, i));
  };
  // Behind the row, and in rows that are none, zeros.
  const auto copy = [&](int tensor, const T* row, bool wanted) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int index = lane + i * lanes;
      cp_async_16(shared_address(slot(tensor, i)), row + index * kSize, wanted && index < vecs);
    }
  };
  const auto fetch = [&](unsigned row, int first_tensor) {
    const bool active = row < end;
    const RowIndex at = split_row(p, active ? row : begin);
    copy(first_tensor, row_of<T>(p.total, at), active);
    copy(first_tensor + 1, row_of<T>(p.grad_y, at), active);
    if (has_grad_total) copy(first_tensor + 2, row_of<T>(p.grad_total, at), active);
    const bool visible = kGated && active && is_visible(p, row);
    if (has_x) copy(first_tensor + teams.tensors - 1, row_of<T>(p.x, at), visible);
    cp_async_commit();
    return visible;
  };

  copy(0, static_cast<const T*>(p.weight), true);
  bool visible = fetch(begin + team, 1);
  WeightSums<T> weight_sums[kVecs] = {};
  const float gate = kGated ? gate_factor<T>(p) : 1.0f;
  double gate_sum = 0;
  int stage = 0;
  for (unsigned first = begin; first < end; first += teams.count) {
    const bool next_visible = fetch(first + teams.count + team, 1 + (stage ^ 1) * teams.tensors);
    cp_async_wait<1>();
    const int total = 1 + stage * teams.tensors;  // the first of the row's tensors
    RowSums<T> sums{};
#pragma unroll 1  // a vector at a time: registers matter more
    for (int i = 0; i < kVecs; ++i) sums.add(staged(total, i), staged(total + 1, i), staged(0, i));
    RowFactors<T> factors(team_sums<T, kShort>(sums, team, lanes, stage), vecs * kSize, p.eps, gate,
                          visible);
    const unsigned row = first + team;
    if (row < end) {  // a row of none would add 0 * infinity to the weight's gradient at eps 0
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const int index = lane + i * lanes;
        const Gradients<T> gradients = row_gradients<T, kGated>(
            factors, staged(total, i), staged(total + 1, i), staged(0, i),
            has_grad_total ? staged(total + 2, i) : zero_vec<T>(),
            has_x ? staged(total + teams.tensors - 1, i) : zero_vec<T>(), weight_sums[i]);
        if (index >= vecs) continue;
        const int64_t element = row * p.dim + index * kSize;
        store_vec(static_cast<T*>(p.grad_residual) + element, gradients.sum);
        if constexpr (kGated) store_vec(static_cast<T*>(p.grad_x) + element, gradients.x);
      }
    }
    gate_sum += factors.gate_sum;
    visible = next_visible;
    stage ^= 1;
  }

  cp_async_wait<0>();
  __syncthreads();
  Chunk<T>* shares = reinterpret_cast<Chunk<T>*>(shared);  // [team][half][vector]
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int index = lane + i * lanes;
    if (index >= vecs) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      shares[(team * 2 + half) * vecs + index] = weight_sums[i].half[half];
    }
  }
  __syncthreads();
  for (int chunk = thread; chunk < 2 * vecs; chunk += threads) {
    Chunk<T> sum = shares[chunk];
    for (int other = 1; other < teams.count; ++other) {
#pragma unroll
      for (int i = 0; i < Chunk<T>::kSize; ++i) {
        sum.data[i] += shares[other * 2 * vecs + chunk].data[i];
      }
    }
    static_cast<Chunk<T>*>(p.weight_partials)[static_cast<int64_t>(blockIdx.x) * 2 * vecs + chunk] =
        sum;
  }
  if constexpr (kGated) store_gate_partial(p, gate_sum);
}

// Any row: a block and two passes.
template <typename T, bool kGated>
__global__ void __launch_bounds__(kThreads, 1)
    rms_norm_backward_two_pass_kernel(const RmsNormBackwardParams p, const bool vectorized,
                                      const bool sums_in_shared) {
  extern __shared__ uint4 shared[];
  wait_for_previous_kernel();
  start_next_kernel();
  const int threads = static_cast<int>(blockDim.x);
  const int64_t vecs = row_vecs<T>(p);
  const int64_t rows = p.outer * p.inner;
  const unsigned end = block_begin(rows, blockIdx.x + 1);
  Chunk<T>* partial = static_cast<Chunk<T>*>(p.weight_partials) + blockIdx.x * 2 * vecs;
  Chunk<T>* weight_sums = sums_in_shared ? reinterpret_cast<Chunk<T>*>(shared) : partial;
  for (int64_t i = threadIdx.x; i < vecs; i += threads) {
    weight_sums[i] = weight_sums[vecs + i] = Chunk<T>{};
  }
  const float gate = kGated ? gate_factor<T>(p) : 1.0f;
  double gate_sum = 0;
  for (unsigned row = block_begin(rows, blockIdx.x); row < end; ++row) {
    const RowIndex at = split_row(p, row);
    const bool visible = kGated && is_visible(p, row);
    const auto load = [&](const T* row_begin, int64_t i) {
      return load_any<T>(row_begin, 0, i, p.dim, vectorized);
    };
    const T *total = row_of<T>(p.total, at), *grad_y = row_of<T>(p.grad_y, at);
    const T *grad_total = row_of<T>(p.grad_total, at), *x = row_of<T>(p.x, at);
    const T* weight = static_cast<const T*>(p.weight);
    RowSums<T> sums{};
    for (int64_t i = threadIdx.x; i < vecs; i += threads) {
      sums.add(load(total, i), load(grad_y, i), load(weight, i));
    }
    RowFactors<T> factors(team_sums<T, false>(sums, 0, threads, static_cast<int>(row & 1)), p.dim,
                          p.eps, gate, visible);
    for (int64_t i = threadIdx.x; i < vecs; i += threads) {
      WeightSums<T> share{weight_sums[i], weight_sums[vecs + i]};
      const Gradients<T> gradients =
          row_gradients<T, kGated>(factors, load(total, i), load(grad_y, i), load(weight, i),
                                   p.grad_total.data ? load(grad_total, i) : zero_vec<T>(),
                                   visible && p.x.data ? load(x, i) : zero_vec<T>(), share);
      weight_sums[i] = share.half[0];
      weight_sums[vecs + i] = share.half[1];
      store_any(p.grad_residual, row * p.dim, i, p.dim, vectorized, gradients.sum);
      if constexpr (kGated) store_any(p.grad_x, row * p.dim, i, p.dim, vectorized, gradients.x);
    }
    gate_sum += factors.gate_sum;
  }
  if (sums_in_shared) {
    for (int64_t i = threadIdx.x; i < vecs; i += threads) {
      partial[i] = weight_sums[i];
      partial[vecs + i] = weight_sums[vecs + i];
    }
  }
  if constexpr (kGated) store_gate_partial(p, gate_sum);
}

template <typename T, bool kGated>
cudaError_t launch_rows(const RmsNormBackwardParams& p, int64_t blocks, cudaStream_t stream,
                        const LaunchOptions& options) {
  const auto aligned = [&](const RowsView& rows) {
    return rows_aligned16(rows.data, rows.outer_stride, rows.inner_stride, p.outer, p.inner,
                          p.dtype);
  };
  const bool vectorized =
      p.dim % Vec<T>::kSize == 0 && aligned(p.total) && aligned(p.grad_y) &&
      aligned(p.grad_total) && aligned(p.x) && is_aligned16(p.weight, 0, p.dtype) &&
      is_aligned16(p.grad_residual, 0, p.dtype) && is_aligned16(p.grad_x, 0, p.dtype);
  const int64_t vecs = ceil_div<int64_t>(p.dim, Vec<T>::kSize);
  const int64_t lanes = round_up<int64_t>(ceil_div<int64_t>(vecs, kTeamVecs), kWarpSize);
  if (vectorized && lanes <= kThreads) {
    const bool is_short = vecs <= kShortRowLanes;
    Teams teams;
    teams.lanes = is_short ? kShortRowLanes : static_cast<int>(lanes);
    teams.count = kThreads / teams.lanes;
    teams.vecs = static_cast<int>(vecs);
    teams.tensors = 2 + (p.grad_total.data != nullptr) + (p.x.data != nullptr);
    const int threads = teams.count * teams.lanes;
    const int bytes = (1 + kStages * teams.tensors) * (is_short ? 1 : kTeamVecs) * kThreads * 16;
    const auto kernel = is_short ? rms_norm_backward_kernel<T, kGated, true>
                                 : rms_norm_backward_kernel<T, kGated, false>;
    if (holds_cluster(address_of(kernel), threads, bytes, 1)) {
      return launch(kernel, blocks, threads, bytes, stream, options, p, teams);
    }
  }
  const auto kernel = rms_norm_backward_two_pass_kernel<T, kGated>;
  const int64_t bytes = vecs * static_cast<int64_t>(sizeof(WeightSums<T>));
  const int threads = static_cast<int>(std::min<int64_t>(kThreads, lanes));
  const bool in_shared =
      bytes <= kMaxSumsInShared && holds_cluster(address_of(kernel), threads, bytes, 1);
  return launch(kernel, blocks, threads, in_shared ? bytes : 0, stream, options, p, vectorized,
                in_shared);
}

}  // namespace

int rms_norm_backward_cuda(const RmsNormBackwardParams& p, CUstream_st* stream) {
  return dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    const LaunchOptions options{.overlap = runs_sm90a()};
    const int64_t rows = p.outer * p.inner, blocks = norm_row_blocks(rows);
    if (rows > INT32_MAX) return cudaErrorInvalidValue;
    if (rows > 0) {
      const cudaError_t status = p.grad_x == nullptr
                                     ? launch_rows<T, false>(p, blocks, stream, options)
                                     : launch_rows<T, true>(p, blocks, stream, options);
      if (status != cudaSuccess) return status;
    }
    // Without rows the gradients are zero, and have to be written all the same.
    const int64_t chunks = std::max<int64_t>(1, 2 * ceil_div<int64_t>(p.dim, Vec<T>::kSize));
    return launch(norm_weight_gradient_kernel<T>, ceil_div<int64_t>(chunks, kColumnChunks),
                  kColumnThreads, 0, stream, options, p, static_cast<int>(blocks));
  });
}

}  // namespace mllama
