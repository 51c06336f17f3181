// The public CPU entry points: the widest instruction set this machine has, chosen once.
#include <stdlib.h>
#include <string.h>

#include "../build_info.h"
#include "common/machine.h"
#include "ops.h"
#include "quantized_layout.h"

namespace mllama {

#ifdef MLLAMA_X86
namespace {

enum class Isa { generic, avx2, avx512 };

Isa detect() {
#ifdef MLLAMA_ONLY_ISA  // a build for one instruction set, such as that for the sanitizers
  return Isa::MLLAMA_ONLY_ISA;
#else
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  // Machines with AVX-512 but without its bfloat16 and integer instructions take the AVX2 kernels.
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("avx512bf16");
  // For tests: MLLAMA_KERNELS_CPU_ISA=generic|avx2|avx512 asks for a narrower set than the
  // machine's. It is read once, and a set that the machine lacks is not used.
  const char* wanted = getenv("MLLAMA_KERNELS_CPU_ISA");
  if (wanted != nullptr && strcmp(wanted, "generic") == 0) return Isa::generic;
  if (avx512 && (wanted == nullptr || strcmp(wanted, "avx2") != 0)) return Isa::avx512;
  return avx2 ? Isa::avx2 : Isa::generic;
#endif
}

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

}  // namespace

#ifdef MLLAMA_ONLY_ISA
#define MLLAMA_DISPATCH(op, Params) \
  void op##_cpu(const Params& p) { MLLAMA_ONLY_ISA::op(p); }
#else
#define MLLAMA_DISPATCH(op, Params) \
  void op##_cpu(const Params& p) {  \
    switch (isa()) {                \
      case Isa::avx512:             \
        return avx512::op(p);       \
      case Isa::avx2:               \
        return avx2::op(p);         \
      case Isa::generic:            \
        return generic::op(p);      \
    }                               \
  }
#endif
#else
#define MLLAMA_DISPATCH(op, Params) \
  void op##_cpu(const Params& p) { generic::op(p); }
#endif

MLLAMA_CPU_KERNELS(MLLAMA_DISPATCH)

int64_t quantized_packed_bytes_cpu(const QuantizedWeight& w) {
  return MLLAMA_ISA::PackedLayout(w).bytes;
}

}  // namespace mllama

extern "C" const char* mllama_kernels_instruction_set() {
#ifdef MLLAMA_X86
  if (mllama::isa() == mllama::Isa::avx512)
    return mllama::amx_available() ? "avx512 with amx" : "avx512";
  if (mllama::isa() == mllama::Isa::avx2) return "avx2";
#endif
  return "generic";
}
