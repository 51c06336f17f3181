// vision_attention for sm_90a.
#pragma once

#include "../vision_attention.h"

namespace mllama {

// Whether it takes a call on a device for which runs_sm90a() holds. It needs 16-bit elements.
constexpr bool uses_vision_sm90(const VisionAttentionParams& p) {
  return element_size(p.dtype) == 2;
}

// Returns a cudaError_t.
int vision_attention_sm90(const VisionAttentionParams& p, CUstream_st* stream);

}  // namespace mllama
