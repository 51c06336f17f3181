// What this binary was built with and runs on, for `python -m mllama_kernels.info` and error texts.
#pragma once

namespace mllama {

const char* cuda_error_text(int status);  // "cudaErrorInvalidValue: invalid argument"

}  // namespace mllama

extern "C" {
__attribute__((visibility("default"))) const char* mllama_kernels_build_info();  // a JSON object
// The instruction set of the CPU kernels, by the names that MLLAMA_KERNELS_CPU_ISA takes.
__attribute__((visibility("default"))) const char* mllama_kernels_instruction_set();
}
