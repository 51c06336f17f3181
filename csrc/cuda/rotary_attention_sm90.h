// The prefill of rotary_attention for sm_90a.
#pragma once

#include "../rotary_attention.h"

namespace mllama {

// Whether it takes a call on a device for which runs_sm90a() holds. It needs 16-bit elements.
constexpr bool uses_rotary_sm90(const RotaryAttentionParams& p) {
  return element_size(p.dtype) == 2;
}

// Attention alone, over keys that have been rotated and appended already. Returns a cudaError_t.
int rotary_attention_sm90(const RotaryAttentionParams& p, CUstream_st* stream);

}  // namespace mllama
