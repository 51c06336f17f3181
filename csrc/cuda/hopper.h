// Host side of the sm_90a kernels: whether they can run, tensor maps, and launches.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

#include "../common.h"

namespace mllama {

// Whether the current device is a Hopper and this library was compiled for sm_90a.
bool runs_sm90a();

// How elements of a box are spread over shared-memory banks; the inner box dimension is at most
// that many bytes. Boxes start at multiples of 1024 bytes (128), 512 (64) or 256 (32).
enum class Swizzle { kNone, k32, k64, k128 };

struct TensorMapDim {
  int64_t size;    // elements
  int64_t stride;  // elements; ignored for the innermost dimension, which is contiguous
  int64_t box;     // elements of one copy, at most 256
};

// Describes a tensor for tensor_copy(), innermost dimension first. The base is a multiple of 16
// bytes, and so are the strides. Pass the result to a kernel as a `const __grid_constant__
// CUtensorMap`.
cudaError_t make_tensor_map(CUtensorMap& map, DType dtype, const void* base,
                            std::initializer_list<TensorMapDim> dims, Swizzle swizzle);

struct LaunchOptions {
  unsigned cluster = 1;  // consecutive blocks per cluster, at most 16 (over 8 on Hopper only)
  // Start before the previous kernel of the stream has finished (hopper.cuh: the rule).
  bool overlap = false;
};

// Lets a kernel use this much dynamic shared memory.
template <typename... Params>
cudaError_t allow_shared(void (*kernel)(Params...), int64_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, int64_t shared_bytes,
                   cudaStream_t stream, const LaunchOptions& options, Args&&... args) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t status = allow_shared(kernel, shared_bytes);
    if (status != cudaSuccess) return status;
  }
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (options.cluster > 8) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (status != cudaSuccess) return status;
  }
  if (options.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = options.cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (options.overlap) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared_bytes,
                   cudaStream_t stream, const LaunchOptions& options, Args&&... args) {
  if (blocks <= 0 || blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                shared_bytes, stream, options, args...);
}

}  // namespace mllama
