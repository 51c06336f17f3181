#include <atomic>

#include "device.h"

namespace mllama {

bool runs_sm90a() {
#ifdef MLLAMA_SM90A
  // One answer per device, asked once: 0 unknown, 1 no, 2 yes.
  static std::atomic<char> known[64];
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0) return false;
  const bool cached = device < 64;
  if (cached && known[device] != 0) return known[device] == 2;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
    return false;
  }
  if (cached) known[device] = major == 9 ? 2 : 1;
  return major == 9;
#else
  return false;
#endif
}

cudaError_t count_multiprocessors(int& count) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace mllama
