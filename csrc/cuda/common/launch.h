// How every kernel is launched. What a kernel may use, shared memory and clusters of more than 8
// blocks, is set once per kernel and device, to the most there is: it is one value for all threads,
// so that a value set for one launch could refuse the launch of another. No launch asks
// cudaGetLastError, which would answer with the failure of any call before it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mllama {

struct LaunchOptions {
  unsigned cluster = 1;  // consecutive blocks per cluster, at most 16 (over 8 on Hopper only)
  // Start before the previous kernel of the stream has finished (sm90.cuh: the rule).
  bool overlap = false;
};

constexpr int64_t kPlainSharedBytes = 48 * 1024;  // dynamic shared memory that needs no permission
constexpr unsigned kPlainCluster = 8;             // blocks of a cluster, likewise

// Lets a kernel use all dynamic shared memory of the current device; an error that says so if that
// is less than `bytes`.
cudaError_t allow_shared(const void* kernel, int64_t bytes);
cudaError_t allow_large_clusters(const void* kernel);

// Whether the current device can hold a cluster of so many blocks of a kernel: a slice of a GPU may
// not have the multiprocessors. Asked of the driver once.
bool holds_cluster(const void* kernel, int threads, int64_t shared_bytes, unsigned cluster);

template <typename... Params>
const void* address_of(void (*kernel)(Params...)) {
  return reinterpret_cast<const void*>(kernel);
}

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, int64_t shared_bytes,
                   cudaStream_t stream, const LaunchOptions& options, Args&&... args) {
  if (shared_bytes > kPlainSharedBytes) {
    const cudaError_t status = allow_shared(address_of(kernel), shared_bytes);
    if (status != cudaSuccess) return status;
  }
  if (options.cluster > kPlainCluster) {
    const cudaError_t status = allow_large_clusters(address_of(kernel));
    if (status != cudaSuccess) return status;
  }
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
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
