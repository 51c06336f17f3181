// The kernels of quantized_linear with tensor cores; see quantized_linear.cu. One per family of
// encodings and type, compiled for the copies that an architecture has. Where codes are integers
// there is one more for x in 8-bit integers, of 1 to 16 rows, so that it is compiled once.
#pragma once

#include "../common/device.h"
#include "../common/launch.h"
#include "pipeline_sm80.cuh"
#include "pipeline_sm90.cuh"

namespace mllama {

// Bytes of a ring, on either path: sm_86 and sm_89 have 99 KB for a block, and a multiprocessor of
// sm_90 is to hold two blocks, this kernel's and the next one's.
template <Family kFamily, bool kSm90>
constexpr int kRingStages =
    ((kSm90 ? 96 : 80) * 1024 - (kFamily == Family::kTable4 ? 32 * 1024 : 0)) / slab_bytes(kFamily);

template <Family kFamily, bool kSm90>
struct MmaShared {
  using Ring = CopyRingShared<kRingStages<kFamily, kSm90>, slab_bytes(kFamily), 128>;
  Ring ring;  // of sm_80 its buffers alone
  FewRowsShared few_rows;
  QuantizedShared<kFamily> quantized;

  static constexpr bool fits(int size) {
    return kSm90 ? 2 * (size + 1024) <= 228 * 1024 : size <= 99 * 1024;
  }
};

// Blocks per multiprocessor, for which the compiler keeps to 128 registers: where it then spills,
// one.
#ifdef MLLAMA_SM90A_DEVICE
template <Family kFamily, int kRowBlocks>
constexpr int kMmaBlocks = kFamily == Family::kQ6_K && kRowBlocks == 2 ? 1 : 2;
constexpr int kInt8MmaBlocks = 2;
#else
template <Family kFamily, int kRowBlocks>
constexpr int kMmaBlocks = 1;
constexpr int kInt8MmaBlocks = 1;
#endif

// The body of a kernel.
template <typename Weight, Family kFamily>
__device__ __forceinline__ void multiply_slabs(const QuantizedCall& p) {
  extern __shared__ uint4 shared_memory[];
  const WeightShare<QuantizedCall> share(p, max_pass_tiles(Weight::kRowBlocks));
#ifdef MLLAMA_SM90A_DEVICE
  using Shared = MmaShared<kFamily, true>;
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  const BulkCopier<kFamily> copier(share);
  CopyRing<kQuantizedSlabTiles, NextKernel::kBehindLastRequest, WeightShare<QuantizedCall>,
           typename Shared::Ring, BulkCopier<kFamily>>
      ring(share, copier, shared.ring);
#else
  using Shared = MmaShared<kFamily, false>;
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  AsyncSlabRing<kFamily, Shared::Ring::kStages> ring(share, shared.ring.slabs);
#endif
  Weight weight(share, shared.quantized);
  FewRowsProduct<QuantizedCall, Weight>(share, shared.few_rows, weight).run(ring);
}

template <typename T, Family kFamily, int kRowBlocks>
__global__ void __launch_bounds__(kSlabThreads, (kMmaBlocks<kFamily, kRowBlocks>))
    quantized_linear_kernel(const QuantizedCall p) {
  multiply_slabs<QuantizedProductWeight<T, kFamily, kRowBlocks>, kFamily>(p);
}

template <typename T, Family kFamily>
__global__ void __launch_bounds__(kSlabThreads, kInt8MmaBlocks)
    quantized_linear_int8_kernel(const QuantizedCall p) {
  multiply_slabs<QuantizedProductWeight<T, kFamily, kFewRows / 8, true>, kFamily>(p);
}

template <Family kFamily>
cudaError_t launch_mma(const QuantizedCall& p, int multiprocessors, cudaStream_t stream) {
  static_assert(MmaShared<kFamily, true>::fits(sizeof(MmaShared<kFamily, true>)));
  static_assert(MmaShared<kFamily, false>::fits(sizeof(MmaShared<kFamily, false>)));
  const bool sm90 = runs_sm90a();
  const int64_t bytes = sm90 ? sizeof(MmaShared<kFamily, true>) : sizeof(MmaShared<kFamily, false>);
  const auto launch_it = [&](auto* kernel) {
    return launch(kernel, slab_blocks(p.n, multiprocessors), kSlabThreads, bytes, stream,
                  {.overlap = sm90}, p);
  };
  if constexpr (has_integer_codes(kFamily)) {
    if (p.int8_activations) {
      return dispatch_half(p.dtype, [&](auto element) {
        return launch_it(quantized_linear_int8_kernel<decltype(element), kFamily>);
      });
    }
  }
  return dispatch_few_rows(p.dtype, p.rows, [&](auto element, auto row_blocks) {
    return launch_it(quantized_linear_kernel<decltype(element), kFamily, row_blocks()>);
  });
}

}  // namespace mllama
