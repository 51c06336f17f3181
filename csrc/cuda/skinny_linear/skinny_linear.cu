// skinny_linear: out = x weight^T for at most 16 rows of x, with the norm before it and what stands
// behind it in a decoder layer. One kernel, bound by the reading of the weight.
//
// Tiling     One block of eight warps per multiprocessor. A block makes a run of columns of out, in
//            eights, equal to within one eight; where blocks have 4 or 3 (4096 columns on 132
//            multiprocessors), those with 3 leave their share of the bandwidth to the others. The
//            weight comes in slabs of 16 rows x 512 elements through a ring in shared memory; of
//            each slab a warp takes 64 elements of all rows. Slabs are the A operand of m16n8k16,
//            rows of x the B operand, one product for up to 8 rows, two for up to 16: M = 1 to 8
//            cost the same instructions. A pass over k takes up to 8 tiles of 16 weight rows (4
//            for more than 8 rows of x) at a time, whose sums stay in registers; behind it the
//            warps' sums are added in warp order. k is never split over blocks.
// x          Read straight into fragments, one chunk ahead, once per pass: what a block needs of
//            shared memory depends neither on M nor on k. The norm takes one more reading, before
//            the first pass, and normalises fragments as they are used.
// sm_90a     Ring of 6 slabs, 96 KB, by tensor copies, evicted first from L2. Two blocks fit on a
//            multiprocessor, so that the next kernel fills its ring while this one finishes: it
//            may start when a block has requested its last slab (NextKernel), and requests its
//            weight before the wait for the previous kernel where that is constant.
// sm_80      Ring of 5 slabs, 80 KB, by cp.async; each warp copies what it uses. Also where k is no
//            multiple of 64. float32 and rows that do not start and end on 16 bytes:
//            simt.cu.
// Precision  float32 sums; roundings of skinny_linear.h, rms_norm, swiglu and gated_residual. The
//            order of additions depends on k alone: a row's bits depend neither on the other rows
//            nor on the device.
// Traffic    From memory the weight once, x, residual and out. From L2 each block also reads x and
//            the norm's weight: M * k elements per pass, and per norm. No bank conflicts.
//
//              11B, bf16  weight    floor at     passes  read from L2 besides, 132 blocks,
//                                   4.3 TB/s             of the weight: M = 1, M = 8
//              qkv        50.3 MB   11.7 us      1       6 %, 36 %
//              o          33.6 MB    7.8 us      1       3 %, 26 %
//              gate, up    235 MB   54.6 us      2       2 %, 12 %
//              down        117 MB   27.3 us      1       3 %, 26 %
//              lm_head    1051 MB    244 us      8       2 %,  8 %
//
// Aliasing   out may be residual (one thread reads, then writes an element); it overlaps nothing
//            else.

#include "../../skinny_linear.h"
#include "../common/alignment.h"
#include "../common/device.h"
#include "../common/tensor_map_dims.h"
#include "kernels.h"

namespace mllama {
namespace {

bool runs_sm90(const SkinnyLinearParams& p) {
  return p.k % kWarpDepth == 0 && mappable(weight_rows(p), p.weight_row_stride, p.k, 2) &&
         runs_sm90a();
}

}  // namespace

int skinny_linear_cuda(const SkinnyLinearParams& p, CUstream_st* stream) {
  if (p.rows == 0 || p.n == 0) return cudaSuccess;
  if (p.rows > kSkinnyLinearMaxRows || p.n > INT32_MAX / 2 - kSlabRows ||
      p.k > INT32_MAX - kSlabDepth) {
    return cudaErrorInvalidValue;
  }
  int multiprocessors = 0;
  const cudaError_t status = count_multiprocessors(multiprocessors);
  if (status != cudaSuccess) return status;
  const bool aligned = p.k * element_size(p.dtype) % 16 == 0 &&
                       is_aligned16(p.x, p.rows > 1 ? p.x_row_stride : 0, p.dtype) &&
                       is_aligned16(p.weight, p.weight_row_stride, p.dtype) &&
                       is_aligned16(p.norm_weight, 0, p.dtype);
  if (p.dtype == DType::kFloat32 || !aligned || p.k == 0) {
    return skinny_linear_simt(p, aligned, multiprocessors, stream);
  }
  return runs_sm90(p) ? skinny_linear_sm90(p, multiprocessors, stream)
                      : skinny_linear_sm80(p, multiprocessors, stream);
}

}  // namespace mllama
