// From run-time element types and head dims to the ones kernels are compiled for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "../../common.h"

namespace mllama {

// f(T{}) for a 16-bit element type.
template <typename F>
cudaError_t dispatch_half(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(__half{});
    case DType::kBFloat16:
      return f(__nv_bfloat16{});
    default:
      return cudaErrorInvalidValue;
  }
}

// f(T{}) for the element type of `dtype`; CUDA kernels take no float64.
template <typename F>
cudaError_t dispatch_dtype(DType dtype, const F& f) {
  return dtype == DType::kFloat32 ? f(float{}) : dispatch_half(dtype, f);
}

// f(std::integral_constant<int, head_dim>{}) for the head dims Mllama needs.
template <typename F>
cudaError_t dispatch_head_dim(int64_t head_dim, const F& f) {
  switch (head_dim) {
    case 64:
      return f(std::integral_constant<int, 64>{});
    case 80:
      return f(std::integral_constant<int, 80>{});
    case 128:
      return f(std::integral_constant<int, 128>{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace mllama
