// Cross entropy of rows of logits and, in their place, its gradient by them.
//
// Tiling     One block of up to 1024 threads per row, 16-byte vectors, four in flight per thread.
//            With a gradient the row is looked at twice: largest logit and sum of exponentials
//            (online: Milakov, Gimelshein 2018, arXiv 1805.02867), then the gradient. What fits
//            into shared memory stays there in between, 226 of the 257 KB of a row of 128256 16-bit
//            logits on Hopper, 162 on A100; the rest is read again, from L2, where the rows of all
//            multiprocessors together have 3 MB on Hopper and 10 MB on A100.
// Precision  float32, exponentials of 16-bit logits by the approximate power of 2; sums over a row
//            of float32 logits in float64 (reduce.cuh). The order depends on vocab alone. The loss
//            is finished in float64; the gradient is rounded once.
// Traffic    2 * rows * vocab elements and the rows' rest from L2. 1024 x 128256 bf16: 525 MB,
//            122 us at 4.3 TB/s, beside two matrix products of 1.1 TFLOP each. Without a gradient
//            half.
// Banks      A thread reads back the 16 bytes it wrote, neighbours beside each other: no conflicts.
// Launch     On Hopper before the previous kernel has ended (sm90.cuh: the rule).

#include <algorithm>

#include "../common/alignment.h"
#include "../common/device.h"
#include "../common/dispatch.cuh"
#include "../common/launch.h"
#include "../common/reduce.cuh"
#include "../common/sm90.cuh"
#include "cross_entropy.cuh"

namespace mllama {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kUnroll = 4;
constexpr int kWarps = kMaxThreads / kWarpSize;

// The largest of some logits, the sum of exp(x - largest), and their own sum for label smoothing.
template <typename T>
struct Sums {
  float maximum = -INFINITY;
  Statistic<T> weights = 0, plain = 0;

  // exp(-inf - -inf) is never formed.
  __device__ __forceinline__ ShiftedExp<T> exponential() const {
    return ShiftedExp<T>(maximum == -INFINITY ? 0.0f : maximum);
  }

  // Makes `larger` the maximum.
  __device__ __forceinline__ void raise(float larger) {
    if (maximum == larger) return;
    weights *= ShiftedExp<T>(larger)(maximum);
    maximum = larger;
  }

  template <int kCount>
  __device__ __forceinline__ void add(const float (&x)[kCount], bool smooth) {
    float larger = maximum;
#pragma unroll
    for (int i = 0; i < kCount; ++i) larger = fmaxf(larger, x[i]);
    raise(larger);
    const ShiftedExp<T> exponential = this->exponential();
#pragma unroll
    for (int i = 0; i < kCount; ++i) weights += exponential(x[i]);
    if (smooth) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) plain += x[i];
    }
  }

  // Over the lanes of a warp; every lane gets it.
  __device__ __forceinline__ void merge_lanes() {
    raise(warp_max(maximum));
    weights = warp_sum(weights);
    plain = warp_sum(plain);
  }
};

template <typename T>
struct SharedSums {
  float maximum[kWarps];
  Statistic<T> weights[kWarps], plain[kWarps];
};

// Over the block; every thread gets it.
template <typename T>
__device__ __forceinline__ Sums<T> merge_block(Sums<T> sums, SharedSums<T>& shared) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  sums.merge_lanes();
  if (lane == 0) {
    shared.maximum[warp] = sums.maximum;
    shared.weights[warp] = sums.weights;
    shared.plain[warp] = sums.plain;
  }
  __syncthreads();
  Sums<T> all;
  if (lane < blockDim.x / kWarpSize) {
    all.maximum = shared.maximum[lane];
    all.weights = shared.weights[lane];
    all.plain = shared.plain[lane];
  }
  all.merge_lanes();
  return all;
}

// The logits of one row, as this block's threads share them out: whole vectors, then elements.
template <typename T>
struct Row {
  T* logits;
  int vecs, tail;

  // f(index, vector) for this thread's whole vectors of [begin, end).
  template <typename F>
  __device__ __forceinline__ void for_vectors(int begin, int end, const F& f) const {
    const int step = static_cast<int>(blockDim.x);
    for (int base = begin + static_cast<int>(threadIdx.x); base < end; base += kUnroll * step) {
      Vec<T> v[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int index = base + i * step;
        v[i] = load_vec_if(index < end, logits + int64_t{index} * Vec<T>::kSize);
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (base + i * step < end) f(base + i * step, v[i]);
      }
    }
  }

  __device__ __forceinline__ bool has_tail() const { return static_cast<int>(threadIdx.x) < tail; }
  __device__ __forceinline__ int64_t tail_element() const {
    return int64_t{vecs} * Vec<T>::kSize + threadIdx.x;
  }
};

template <typename T>
__device__ __forceinline__ void unpack(const Vec<T>& v, float (&x)[Vec<T>::kSize]) {
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) x[i] = to_f32(v.data[i]);
}

// One load of 16 bytes: the compiler makes four of an assignment to a Vec.
template <typename T>
__device__ __forceinline__ Vec<T> load_staged(const uint4* address) {
  uint4 words;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(shared_address(address))
               : "memory");
  return *reinterpret_cast<const Vec<T>*>(&words);
}

// The first `staged` vectors of the row are kept in shared memory for the gradient.
template <typename T, bool kGradient>
__global__ void __launch_bounds__(kMaxThreads)
    linear_cross_entropy_kernel(const LinearCrossEntropyParams p, const int staged) {
  extern __shared__ uint4 stage[];
  __shared__ SharedSums<T> shared;
  wait_for_previous_kernel();
  start_next_kernel();
  const int64_t index = blockIdx.x;
  const int64_t label = p.labels[index];
  const CrossEntropyTerms& terms = p.terms;
  const Row<T> row{static_cast<T*>(p.logits) + index * p.logits_row_stride,
                   static_cast<int>(terms.vocab / Vec<T>::kSize),
                   static_cast<int>(terms.vocab % Vec<T>::kSize)};
  float* loss = static_cast<float*>(p.loss) + index;
  float* maximum = static_cast<float*>(p.maximum) + index;
  float* sum = static_cast<float*>(p.sum) + index;

  if (ignores(terms, label)) {
    if (threadIdx.x == 0) *loss = *maximum = *sum = 0.0f;
    if constexpr (kGradient) {
      for (int i = threadIdx.x; i < row.vecs; i += blockDim.x) {
        store_vec(row.logits + int64_t{i} * Vec<T>::kSize, zero_vec<T>());
      }
      if (row.has_tail()) row.logits[row.tail_element()] = from_f32<T>(0.0f);
    }
    return;
  }

  const bool is_class = label >= 0 && label < terms.vocab;
  // Before anyone overwrites it.
  const float target = threadIdx.x == 0 && is_class ? to_f32(row.logits[label]) : 0.0f;
  const bool smooth = terms.label_smoothing != 0;
  Sums<T> sums;
  row.for_vectors(0, row.vecs, [&](int i, const Vec<T>& v) {
    if constexpr (kGradient) {
      if (i < staged) stage[i] = *reinterpret_cast<const uint4*>(&v);
    }
    float x[Vec<T>::kSize];
    unpack(v, x);
    sums.add(x, smooth);
  });
  if (row.has_tail()) {
    const float x[1] = {to_f32(row.logits[row.tail_element()])};
    sums.add(x, smooth);
  }
  sums = merge_block(sums, shared);
  if (!is_class) sums.weights = NAN;

  if (threadIdx.x == 0) {
    const double vocab = static_cast<double>(terms.vocab);
    const double lse = sums.maximum + log(static_cast<double>(sums.weights));
    *loss =
        static_cast<float>(lse - (1 - terms.label_smoothing) * target -
                           terms.label_smoothing * (sums.plain / vocab) + terms.z_loss * lse * lse);
    *maximum = sums.maximum;
    *sum = static_cast<float>(sums.weights);
  }
  if constexpr (kGradient) {
    const LogitGradient<T> gradient(terms, sums.maximum, static_cast<float>(sums.weights), 1.0f);
    const auto replace = [&](int i, const Vec<T>& v) {
      const int64_t first = int64_t{i} * Vec<T>::kSize;
      store_vec(row.logits + first, gradient(v, first, label));
    };
    row.for_vectors(staged, row.vecs, replace);  // first: it was read last, and is in L2
    for (int i = threadIdx.x; i < staged; i += blockDim.x) {
      replace(i, load_staged<T>(&stage[i]));
    }
    if (row.has_tail()) {
      const int64_t element = row.tail_element();
      const float x = gradient(to_f32(row.logits[element]));
      row.logits[element] = from_f32<T>(element == label ? x - gradient.target : x);
    }
  }
}

// How much dynamic shared memory a block of the kernel may have.
cudaError_t stage_limit(int64_t& bytes) {
  int device = 0, most = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  bytes = most - static_cast<int64_t>(sizeof(SharedSums<float>));
  return status;
}

}  // namespace

int linear_cross_entropy_cuda(const LinearCrossEntropyParams& p, CUstream_st* stream) {
  if (p.rows == 0) return cudaSuccess;
  if (!is_aligned16(p.logits, p.rows > 1 ? p.logits_row_stride : 0, p.dtype) ||
      p.terms.vocab > INT32_MAX / 2) {
    return cudaErrorInvalidValue;
  }
  return dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t vecs = p.terms.vocab / Vec<T>::kSize;
    const int threads = static_cast<int>(std::clamp<int64_t>(
        round_up<int64_t>(ceil_div<int64_t>(vecs, kUnroll), kWarpSize), kWarpSize, kMaxThreads));
    const LaunchOptions options{.overlap = runs_sm90a()};
    if (!p.with_grad) {
      return launch(linear_cross_entropy_kernel<T, false>, p.rows, threads, 0, stream, options, p,
                    0);
    }
    int64_t limit = 0;
    const cudaError_t status = stage_limit(limit);
    if (status != cudaSuccess) return status;
    constexpr int64_t kVecBytes = sizeof(Vec<T>);
    const int64_t staged = std::min(vecs, limit / kVecBytes);
    return launch(linear_cross_entropy_kernel<T, true>, p.rows, threads, staged * kVecBytes, stream,
                  options, p, static_cast<int>(staged));
  });
}

}  // namespace mllama
