#include <cuda_runtime.h>

#include <utility>

#include "../../build_info.h"
#include "error_text.h"

namespace mllama {
namespace {

thread_local std::string reason;

}  // namespace

void explain_error(std::string text) { reason = std::move(text); }

void forget_error() {
  reason.clear();
  cudaGetLastError();
}

const char* take_cuda_error(int status) {
  thread_local std::string text;
  const auto error = static_cast<cudaError_t>(status);
  text = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  if (!reason.empty()) text += " (" + reason + ")";
  forget_error();
  return text.c_str();
}

}  // namespace mllama
