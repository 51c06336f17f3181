#include <map>
#include <mutex>
#include <tuple>

#include "error_text.h"
#include "launch.h"

namespace mllama {
namespace {

// Answers about kernels on devices, each asked for once.
template <typename Key, typename Answer>
class Known {
 public:
  // ask(answer) returns a cudaError_t; failures are not kept.
  template <typename Ask>
  cudaError_t get(const Key& key, Answer& answer, const Ask& ask) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = answers_.find(key);
    if (found != answers_.end()) {
      answer = found->second;
      return cudaSuccess;
    }
    const cudaError_t status = ask(answer);
    if (status == cudaSuccess) answers_.emplace(key, answer);
    return status;
  }

 private:
  std::mutex mutex_;
  std::map<Key, Answer> answers_;
};

using KernelOnDevice = std::tuple<const void*, int>;

// Sets the limit to what the kernel's own shared memory leaves, and returns it.
cudaError_t set_shared_limit(const void* kernel, int device, int& limit) {
  cudaFuncAttributes attributes{};
  cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  limit -= static_cast<int>(attributes.sharedSizeBytes);
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
}

cudaError_t ask_cluster(const void* kernel, int threads, int64_t shared_bytes, unsigned cluster,
                        bool& holds) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(cluster);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 1;  // a cluster of one is any block that has its shared memory
  holds =
      (cluster <= kPlainCluster || allow_large_clusters(kernel) == cudaSuccess) &&
      (shared_bytes <= kPlainSharedBytes || allow_shared(kernel, shared_bytes) == cudaSuccess) &&
      (cluster == 1 || cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess) &&
      clusters > 0;
  if (!holds) forget_error();  // a refusal is an answer
  return cudaSuccess;
}

}  // namespace

cudaError_t allow_shared(const void* kernel, int64_t bytes) {
  static Known<KernelOnDevice, int> limits;
  int device = 0, limit = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = limits.get({kernel, device}, limit,
                      [&](int& answer) { return set_shared_limit(kernel, device, answer); });
  if (status != cudaSuccess || bytes <= limit) return status;
  explain_error("a block needs " + std::to_string(bytes) +
                " bytes of shared memory, this device has " + std::to_string(limit));
  return cudaErrorInvalidValue;
}

cudaError_t allow_large_clusters(const void* kernel) {
  static Known<KernelOnDevice, bool> allowed;
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  bool answer = false;
  return allowed.get({kernel, device}, answer, [&](bool& is_allowed) {
    is_allowed = true;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  });
}

bool holds_cluster(const void* kernel, int threads, int64_t shared_bytes, unsigned cluster) {
  static Known<std::tuple<const void*, int, int, int64_t, unsigned>, bool> known;
  int device = 0;
  bool holds = false;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  known.get({kernel, device, threads, shared_bytes, cluster}, holds, [&](bool& answer) {
    return ask_cluster(kernel, threads, shared_bytes, cluster, answer);
  });
  return holds;
}

}  // namespace mllama
