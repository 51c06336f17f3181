#include <cuda_runtime.h>

#include <string>

#include "../build_info.h"

const char* mllama::cuda_error_text(int status) {
  thread_local std::string text;
  const auto error = static_cast<cudaError_t>(status);
  text = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  return text.c_str();
}
