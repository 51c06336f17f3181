// What this binary was built with and runs on, for `python -m mllama_kernels.info` and error texts.
#pragma once

namespace mllama {

// "cudaErrorInvalidValue: invalid argument", with the reason where the kernels' host code knows it.
// The runtime forgets the error: nobody else has it reported as their own.
const char* take_cuda_error(int status);

}  // namespace mllama

extern "C" {
__attribute__((visibility("default"))) const char* mllama_kernels_build_info();  // a JSON object
// The instruction set of the CPU kernels, by the names that MLLAMA_KERNELS_CPU_ISA takes.
__attribute__((visibility("default"))) const char* mllama_kernels_instruction_set();
}
