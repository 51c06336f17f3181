// quantized_linear: skinny_linear for a weight of 4, 6 or 8 bits. One kernel per family of
// encodings, bound by the reading of the weight; 16 rows of x at a time.
//
// Tiling     As skinny_linear.cu, with which it shares ../few_rows: one block of eight warps per
//            multiprocessor, a run of columns of out each, k never split over blocks. The weight is
//            packed (layout.h) so that a lane's codes of 8 rows x 64 columns are one load, in the
//            order of m16n8k16's A operand; slabs are two tiles of 16 rows x 512 columns. Codes
//            become 16-bit integers in registers (codes.cuh); tensor cores multiply even at M = 1,
//            into fresh sums per 32 columns (q6_k: 16), which are multiplied by the scale in
//            float32: nothing is rounded. A code of 4 bits comes less its zero, to the half, and a
//            table's value as two terms, so that there are two products. Scales are unpacked once
//            per slab, a row per lane, to float32 in shared memory. What the half leaves of minima
//            and zeros is one more term, offset * sum of x.
// sm_90a     Ring of 96 KB (tables 64) by bulk copies, one per half of a tile, requested before the
//            wait for the previous kernel where the weight is constant; two blocks on a
//            multiprocessor, but for q6_k with more than 8 rows of x.
// sm_80      Ring of 80 KB (tables 48) by cp.async, below the 99 KB of sm_86 and sm_89.
//            float32, rows that do not start and end on 16 bytes, SwiGLU of columns that are no
//            whole eights: simt.cu.
// 8-bit x    With int8_activations: integers of x and their scales are made in registers, chunk by
//            chunk (int8.cuh); m16n8k32 multiplies them with the codes as signed bytes, for which
//            a mask or two suffice, and sums of 32 columns are multiplied by both scales in
//            float32. One kernel for 1 to 16 rows, which leaves the upper eight out where there are
//            none. More than kQuantizedLinearMaxRows: round.cu, then the library.
// Precision  float32 sums, of numbers exact in 16 bits, of a table's in two times 16; the order of
//            additions depends on k alone. Weights keep their sign and are zero where the decoded
//            ones are, so that neither an outlier of x on a zero column costs the others digits,
//            nor does an infinite x become NaN. Infinite scales are taken for NaN. NaN in fp8 make
//            their row's scale NaN when it is packed, since the product takes them for numbers.
// Traffic    The weight once: bits of a code and scales, no padding where k is whole blocks and n
//            whole eights. x as skinny_linear, from L2: with 16 rows as many bytes as 4 bits of a
//            weight of 4 tiles.
//
//              11B          q8_0     q6_k     4 bits   floor at 4.3 TB/s
//              qkv          26.7 MB  20.6 MB  14.2 MB  6.2, 4.8, 3.3 us
//              o            17.8     13.8      9.4     4.1, 3.2, 2.2
//              gate, up     125      96.3     66.1     29.0, 22.4, 15.4
//              down         62.4     48.2     33.0     14.5, 11.2, 7.7
//              lm_head      558      431      295      130, 100, 69
//
// Issue      Counted in the machine code of sm_90a, not timed: a slab of q4_k takes a warp some
//            290 instructions in bfloat16, M = 1 to 8: 186 for its two tiles, 87 for their scales,
//            16 for the ring, 4.5 per lane and weight. At 4.3 TB/s and 4.5 bits a multiprocessor
//            has 34 weights per clock, which take 154 of the 128 lanes it issues to: at 78 % of the
//            bandwidth, the goal, 120. Tables read 8 bytes of shared memory per pair: with codes
//            and copies 130 of 128 bytes per clock at 78 %, so that they end near 75 %.
// Rejected   One offset per 32 columns for all of a zero: an outlier of 1e5 on a zero column then
//            costs a bfloat16 sum more than its rounding. A table in one term: its errors add up
//            over a row of x with a mean, to 14 times those of plain PyTorch at k = 14336. Masks
//            and constants as two expressions: 16 instructions more per tile. Scales unpacked by
//            each of the four lanes of a row: by count some 25 more.
//
// Aliasing   out may be residual (one thread reads, then writes an element); it overlaps nothing
//            else.

#include "../../quantized_linear.h"
#include "../common/alignment.h"
#include "../common/device.h"
#include "kernels.h"

namespace mllama {
namespace {

cudaError_t launch_family(const QuantizedCall& p, int multiprocessors, cudaStream_t stream) {
  switch (family_of(p.w.encoding)) {
    case Family::kInt8:
      return launch_mma<Family::kInt8>(p, multiprocessors, stream);
    case Family::kFp8:
      return launch_mma<Family::kFp8>(p, multiprocessors, stream);
    case Family::kQ8_0:
      return launch_mma<Family::kQ8_0>(p, multiprocessors, stream);
    case Family::kQ6_K:
      return launch_mma<Family::kQ6_K>(p, multiprocessors, stream);
    case Family::kInt4:
      return launch_mma<Family::kInt4>(p, multiprocessors, stream);
    case Family::kTable4:
      return launch_mma<Family::kTable4>(p, multiprocessors, stream);
  }
  return cudaErrorInvalidValue;
}

// Rows of x and of what follows, from the `first` on.
QuantizedLinearParams rows_from(const QuantizedLinearParams& p, int64_t first) {
  const auto skip = [&](const void* rows, int64_t stride) -> const char* {
    return rows == nullptr
               ? nullptr
               : static_cast<const char*>(rows) + first * stride * element_size(p.dtype);
  };
  QuantizedLinearParams part = p;
  part.rows = std::min<int64_t>(p.rows - first, kFewRows);
  part.x = skip(p.x, p.x_row_stride);
  part.residual = skip(p.residual, p.residual_row_stride);
  part.out = const_cast<char*>(skip(p.out, p.n));
  if (p.row_mask != nullptr) part.row_mask = p.row_mask + first;
  return part;
}

}  // namespace

int quantized_linear_cuda(const QuantizedLinearParams& p, CUstream_st* stream) {
  if (p.rows == 0 || p.n == 0) return cudaSuccess;
  if (p.rows > kQuantizedLinearMaxRows || p.n > INT32_MAX / 2 - kSlabRows ||
      eight_bytes(p.w) > INT32_MAX / 2 ||
      (p.int8_activations && !has_integer_codes(p.w.encoding))) {
    return cudaErrorInvalidValue;
  }
  int multiprocessors = 0;
  cudaError_t status = count_multiprocessors(multiprocessors);
  // Of which rows are not asked: a row has the same bits in any batch.
  const bool aligned = p.k * element_size(p.dtype) % 16 == 0 &&
                       is_aligned16(p.x, p.rows > 1 ? p.x_row_stride : 0, p.dtype) &&
                       is_aligned16(p.norm_weight, 0, p.dtype);
  const bool whole_eights = !p.swiglu || p.n % kEight == 0;
  const bool mma = p.dtype != DType::kFloat32 && aligned && whole_eights && p.k > 0;
  for (int64_t first = 0; first < p.rows && status == cudaSuccess; first += kFewRows) {
    const QuantizedCall part(rows_from(p, first));
    status = mma ? launch_family(part, multiprocessors, stream)
                 : quantized_linear_simt(part, aligned, multiprocessors, stream);
  }
  return status;
}

}  // namespace mllama
