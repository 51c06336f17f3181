// Why a call failed, in words beside its cudaError_t; take_cuda_error (build_info.h) joins the two.
#pragma once

#include <string>

namespace mllama {

// Of the failure that the calling thread is about to return.
void explain_error(std::string reason);

// For a failure that is an answer: neither its reason nor the runtime's memory of it outlives it.
void forget_error();

}  // namespace mllama
