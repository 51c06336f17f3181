// Tensor maps, made on the host for tensor_copy() (sm90.cuh).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <initializer_list>

#include "../../common.h"
#include "tensor_map_dims.h"

namespace mllama {

// How elements of a box are spread over shared-memory banks; the inner box dimension is at most
// that many bytes. Boxes start at multiples of 1024 bytes (128), 512 (64) or 256 (32).
enum class Swizzle { kNone, k32, k64, k128 };

// Describes a tensor for tensor_copy(), innermost dimension first. The base is a multiple of 16
// bytes; tensor_map_dims.h has what the dimensions must be. Pass the result to a kernel as a `const
// __grid_constant__ CUtensorMap`.
cudaError_t make_tensor_map(CUtensorMap& map, DType dtype, const void* base,
                            std::initializer_list<TensorMapDim> dims, Swizzle swizzle);

}  // namespace mllama
