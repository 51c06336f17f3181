// As much of the CUDA runtime as the kernels' host code asks for, on devices that a test makes up.
#pragma once

#include <cstddef>
#include <mutex>
#include <tuple>
#include <vector>

#define __device__
#define __forceinline__ inline

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMisalignedAddress = 716,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 11,
};
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct cudaFuncAttributes {
  std::size_t sharedSizeBytes;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace fake {

inline std::mutex mutex;
inline thread_local int device = 0;
inline thread_local cudaError_t last_error = cudaSuccess;
inline int most_shared = 227 * 1024, static_shared = 256, multiprocessors = 132;
// (kernel, device, attribute, value) of cudaFuncSetAttribute, and how often clusters were asked
// for.
inline std::vector<std::tuple<const void*, int, int, int>> settings;
inline int cluster_questions = 0;
inline int launches = 0;

inline cudaError_t failed(cudaError_t error) { return last_error = error; }

inline unsigned cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) {
      return config.attrs[i].val.clusterDim.x;
    }
  }
  return 1;
}

// What was set for the kernel on this thread's device, or what holds where nothing was.
inline int setting(const void* kernel, int attribute, int otherwise) {
  for (const auto& [of, on, what, value] : settings) {
    if (of == kernel && on == device && what == attribute) otherwise = value;
  }
  return otherwise;
}

inline bool allowed(const void* kernel, const cudaLaunchConfig_t& config) {
  const int shared = setting(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 48 * 1024);
  const int large = setting(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 0);
  return static_cast<int>(config.dynamicSmemBytes) <= shared &&
         cluster_of(config) <= (large ? 16u : 8u);
}

}  // namespace fake

inline cudaError_t cudaGetDevice(int* device) { return *device = fake::device, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = fake::most_shared, cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->sharedSizeBytes = static_cast<std::size_t>(fake::static_shared);
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute what, int value) {
  const std::lock_guard<std::mutex> lock(fake::mutex);
  if (what == cudaFuncAttributeMaxDynamicSharedMemorySize &&
      value + fake::static_shared > fake::most_shared) {
    return fake::failed(cudaErrorInvalidValue);
  }
  fake::settings.emplace_back(kernel, fake::device, what, value);
  return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                                  const cudaLaunchConfig_t* config) {
  const std::lock_guard<std::mutex> lock(fake::mutex);
  ++fake::cluster_questions;
  if (!fake::allowed(kernel, *config)) return fake::failed(cudaErrorInvalidValue);
  return *clusters = fake::multiprocessors / static_cast<int>(fake::cluster_of(*config)),
         cudaSuccess;
}
template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&...) {
  const std::lock_guard<std::mutex> lock(fake::mutex);
  const void* const address = reinterpret_cast<const void*>(kernel);
  if (!fake::allowed(address, *config) ||
      static_cast<int>(fake::cluster_of(*config)) > fake::multiprocessors) {
    return fake::failed(cudaErrorInvalidValue);
  }
  ++fake::launches;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = fake::last_error;
  fake::last_error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidValue";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
