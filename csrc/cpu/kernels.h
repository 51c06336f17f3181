// The CPU kernels of one instruction set, declared for each set; dispatch.cpp picks one at run
// time.
#pragma once

#include "../cross_attention.h"
#include "../gated_residual.h"
#include "../linear_cross_entropy.h"
#include "../patch_embed.h"
#include "../rms_norm.h"
#include "../rotary_attention.h"
#include "../sample.h"
#include "../skinny_linear.h"
#include "../swiglu.h"
#include "../vision_attention.h"

#define MLLAMA_DECLARE_KERNELS(isa)                                              \
  namespace mllama::isa {                                                        \
  void cross_attention(const CrossAttentionParams& p);                           \
  void cross_attention_backward(const CrossAttentionBackwardParams& p);          \
  void gated_residual(const GatedResidualParams& p);                             \
  void gated_residual_backward(const GatedResidualBackwardParams& p);            \
  void linear_cross_entropy(const LinearCrossEntropyParams& p);                  \
  void linear_cross_entropy_backward(const LinearCrossEntropyBackwardParams& p); \
  void patch_embed(const PatchEmbedParams& p);                                   \
  void patch_embed_backward(const PatchEmbedBackwardParams& p);                  \
  void rms_norm(const RmsNormParams& p);                                         \
  void rms_norm_backward(const RmsNormBackwardParams& p);                        \
  void rotary_attention(const RotaryAttentionParams& p);                         \
  void rotary_attention_backward(const RotaryAttentionBackwardParams& p);        \
  void sample(const SampleParams& p);                                            \
  void skinny_linear(const SkinnyLinearParams& p);                               \
  void swiglu(const SwigluParams& p);                                            \
  void swiglu_backward(const SwigluBackwardParams& p);                           \
  void vision_attention(const VisionAttentionParams& p);                         \
  void vision_attention_backward(const VisionAttentionBackwardParams& p);        \
  }

MLLAMA_DECLARE_KERNELS(generic)
#ifdef MLLAMA_X86
MLLAMA_DECLARE_KERNELS(avx2)
MLLAMA_DECLARE_KERNELS(avx512)
namespace mllama {
bool amx_available();  // bfloat16 tiles, on this machine and for this process
}
#endif

namespace mllama {
[[noreturn]] void out_of_memory();  // throws std::bad_alloc
int64_t last_cache_bytes();         // of the cache before memory, as much as the threads reach
}  // namespace mllama
