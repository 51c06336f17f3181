// The public CPU entry points: the widest instruction set this machine has, chosen once.
#include <stdlib.h>
#include <string.h>

#ifdef MLLAMA_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <new>

#include "../build_info.h"
#include "kernels.h"

namespace mllama {

void out_of_memory() { throw std::bad_alloc(); }

#ifdef MLLAMA_X86
namespace {

enum class Isa { kGeneric, kAvx2, kAvx512 };

Isa detect() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  // Machines with AVX-512 but without its bfloat16 instructions take the AVX2 kernels.
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16");
  // For tests: MLLAMA_KERNELS_CPU_ISA=generic|avx2|avx512 asks for a narrower set than the
  // machine's. It is read once, and a set that the machine lacks is not used.
  const char* wanted = getenv("MLLAMA_KERNELS_CPU_ISA");
  if (wanted != nullptr && strcmp(wanted, "generic") == 0) return Isa::kGeneric;
  if (avx512 && (wanted == nullptr || strcmp(wanted, "avx2") != 0)) return Isa::kAvx512;
  return avx2 ? Isa::kAvx2 : Isa::kGeneric;
}

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

bool request_amx() {
#ifdef __linux__
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA: Linux gives a process its tiles on request.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & kBf16) == 0 || (edx & kTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

bool amx_available() {
  static const bool available = request_amx();
  return available;
}

#define MLLAMA_DISPATCH(op, Params) \
  void op##_cpu(const Params& p) {  \
    switch (isa()) {                \
      case Isa::kAvx512:            \
        return avx512::op(p);       \
      case Isa::kAvx2:              \
        return avx2::op(p);         \
      case Isa::kGeneric:           \
        return generic::op(p);      \
    }                               \
  }
#else
#define MLLAMA_DISPATCH(op, Params) \
  void op##_cpu(const Params& p) { generic::op(p); }
#endif

MLLAMA_DISPATCH(cross_attention, CrossAttentionParams)
MLLAMA_DISPATCH(cross_attention_backward, CrossAttentionBackwardParams)
MLLAMA_DISPATCH(gated_residual, GatedResidualParams)
MLLAMA_DISPATCH(gated_residual_backward, GatedResidualBackwardParams)
MLLAMA_DISPATCH(linear_cross_entropy, LinearCrossEntropyParams)
MLLAMA_DISPATCH(linear_cross_entropy_backward, LinearCrossEntropyBackwardParams)
MLLAMA_DISPATCH(patch_embed, PatchEmbedParams)
MLLAMA_DISPATCH(patch_embed_backward, PatchEmbedBackwardParams)
MLLAMA_DISPATCH(rms_norm, RmsNormParams)
MLLAMA_DISPATCH(rms_norm_backward, RmsNormBackwardParams)
MLLAMA_DISPATCH(rotary_attention, RotaryAttentionParams)
MLLAMA_DISPATCH(rotary_attention_backward, RotaryAttentionBackwardParams)
MLLAMA_DISPATCH(sample, SampleParams)
MLLAMA_DISPATCH(skinny_linear, SkinnyLinearParams)
MLLAMA_DISPATCH(swiglu, SwigluParams)
MLLAMA_DISPATCH(swiglu_backward, SwigluBackwardParams)
MLLAMA_DISPATCH(vision_attention, VisionAttentionParams)
MLLAMA_DISPATCH(vision_attention_backward, VisionAttentionBackwardParams)

}  // namespace mllama

extern "C" const char* mllama_kernels_instruction_set() {
#ifdef MLLAMA_X86
  if (mllama::isa() == mllama::Isa::kAvx512)
    return mllama::amx_available() ? "avx512 with amx" : "avx512";
  if (mllama::isa() == mllama::Isa::kAvx2) return "avx2";
#endif
  return "generic";
}
