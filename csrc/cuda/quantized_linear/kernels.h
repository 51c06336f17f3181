// What quantized_linear.cu can call.
#pragma once

#include <cuda_runtime.h>

#include "../../quantized_linear.h"
#include "../few_rows/slab.h"
#include "layout.h"

namespace mllama {

// A call, with where the packed weight has what (layout.h).
struct QuantizedCall : QuantizedLinearParams {
  int64_t eight_bytes;              // of eight rows
  int32_t row_bytes;                // of these the blocks of columns
  int32_t block_bytes, half_bytes;  // of a block; of 512 columns of eight rows
  int32_t zeros;                    // int4: from a block's scales to its zeros
  int32_t parts;                    // of 64 columns

  explicit QuantizedCall(const QuantizedLinearParams& p)
      : QuantizedLinearParams(p),
        eight_bytes(mllama::eight_bytes(p.w)),
        row_bytes(static_cast<int32_t>(blocks_of_row(p.w) * mllama::block_bytes(p.w))),
        block_bytes(static_cast<int32_t>(mllama::block_bytes(p.w))),
        half_bytes(block_bytes * (512 / block_columns(p.w.encoding))),
        zeros(p.w.encoding == Encoding::kInt4
                  ? static_cast<int32_t>(kEight * int4_row_scales(p.w.group) *
                                         plane_type_size(p.w.scale))
                  : 0),
        parts(static_cast<int32_t>(blocks_of_row(p.w) * block_parts(p.w.encoding))) {}
};

// Without tensor cores: any call of up to kFewRows rows of x.
// `aligned`: all rows start and end on 16 bytes.
cudaError_t quantized_linear_simt(const QuantizedCall& p, bool aligned, int multiprocessors,
                                  cudaStream_t stream);

// 16 bits, up to kFewRows rows of x, which start and end on 16 bytes; with swiglu n a multiple
// of 8. One file per family: they take the compiler longest.
template <Family kFamily>
cudaError_t launch_mma(const QuantizedCall& p, int multiprocessors, cudaStream_t stream);

}  // namespace mllama
