// What this binary was built with, for `python -m mllama_kernels.info` and for error texts.
#pragma once

namespace mllama {

const char* cuda_error_text(int status);  // "cudaErrorInvalidValue: invalid argument"

}  // namespace mllama

extern "C" {
__attribute__((visibility("default"))) const char* mllama_kernels_build_info();  // a JSON object
}
