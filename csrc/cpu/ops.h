// The CPU kernels, declared for each instruction set; dispatch.cpp picks one at run time.
#pragma once

#include "../cross_attention.h"
#include "../gated_residual.h"
#include "../linear_cross_entropy.h"
#include "../patch_embed.h"
#include "../quantize.h"
#include "../quantized_linear.h"
#include "../rms_norm.h"
#include "../rotary_attention.h"
#include "../sample.h"
#include "../skinny_linear.h"
#include "../swiglu.h"
#include "../vision_attention.h"

#define MLLAMA_CPU_KERNELS(X)                                        \
  X(cross_attention, CrossAttentionParams)                           \
  X(cross_attention_backward, CrossAttentionBackwardParams)          \
  X(gated_residual, GatedResidualParams)                             \
  X(gated_residual_backward, GatedResidualBackwardParams)            \
  X(linear_cross_entropy, LinearCrossEntropyParams)                  \
  X(linear_cross_entropy_backward, LinearCrossEntropyBackwardParams) \
  X(patch_embed, PatchEmbedParams)                                   \
  X(patch_embed_backward, PatchEmbedBackwardParams)                  \
  X(quantized_linear, QuantizedLinearParams)                         \
  X(quantized_pack, QuantizedPackParams)                             \
  X(quantized_rows, QuantizedRowsParams)                             \
  X(quantized_unpack, QuantizedUnpackParams)                         \
  X(quantize, QuantizeParams)                                        \
  X(rms_norm, RmsNormParams)                                         \
  X(rms_norm_backward, RmsNormBackwardParams)                        \
  X(rotary_attention, RotaryAttentionParams)                         \
  X(rotary_attention_backward, RotaryAttentionBackwardParams)        \
  X(sample, SampleParams)                                            \
  X(skinny_linear, SkinnyLinearParams)                               \
  X(swiglu, SwigluParams)                                            \
  X(swiglu_backward, SwigluBackwardParams)                           \
  X(vision_attention, VisionAttentionParams)                         \
  X(vision_attention_backward, VisionAttentionBackwardParams)

#define MLLAMA_DECLARE_KERNEL(op, Params) void op(const Params& p);

namespace mllama {

namespace generic {
MLLAMA_CPU_KERNELS(MLLAMA_DECLARE_KERNEL)
}
#ifdef MLLAMA_X86
namespace avx2 {
MLLAMA_CPU_KERNELS(MLLAMA_DECLARE_KERNEL)
}
namespace avx512 {
MLLAMA_CPU_KERNELS(MLLAMA_DECLARE_KERNEL)
}
#endif

}  // namespace mllama
