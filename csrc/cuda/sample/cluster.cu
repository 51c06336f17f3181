// sample on Hopper: a cluster of up to 16 blocks per row. The algorithm is in sample.cuh.
//
// Tiling     A row's scaled logits, then its levels, stay in the shared memory of the cluster, 4
//            bytes per token: 32 KB per block for 128256 tokens over 16 blocks. A warp reads and
//            writes its own 512 bytes per step, without bank conflicts.
// Exchange   Between two passes the cluster meets once; each block then reads the bins of all
//            others (2 KB from each; a load takes 64 bytes from each of four blocks) and comes to
//            the same cut by itself.
// Traffic    rows * vocab elements, once; of a row that has them, seen (1 byte a token), counts (4)
//            and allowed (1/8), once. 128256 bf16: 257 KB, 0.06 us at 4.3 TB/s; what takes time are
//            3 meetings of the cluster (one row, no filter) to 11, and the passes between. What
//            log-probabilities add is in likeliest.cuh.
// Aliasing   Tokens are written when all logits have been read.

#include "../common/dispatch.cuh"
#include "../common/launch.h"
#include "kernels.h"
#include "sample.cuh"

namespace mllama {
namespace {

constexpr int kMaxCluster = 16;
constexpr int kMinTokens = 4096;                // of a block, before a row takes more blocks
constexpr int kMaxBlocks = 128;                 // of all rows, before rows take fewer blocks
constexpr int64_t kMaxStageBytes = 200 * 1024;  // leaves room for SampleShared

int64_t span_of(int64_t vocab, int cluster) {
  return round_up<int64_t>(ceil_div<int64_t>(vocab, cluster * kSampleWarps), kTokensPerStep);
}

int64_t stage_bytes(int64_t vocab, int cluster) {
  return span_of(vocab, cluster) * kSampleWarps * static_cast<int64_t>(sizeof(uint32_t));
}

// Blocks per row, a power of two.
int choose_cluster(int64_t rows, int64_t vocab, int widest) {
  int cluster = 1;
  while (cluster < widest &&
         (stage_bytes(vocab, cluster) > kMaxStageBytes ||
          (vocab > int64_t{kMinTokens} * cluster && rows * cluster * 2 <= kMaxBlocks))) {
    cluster *= 2;
  }
  return cluster;
}

#ifdef MLLAMA_SM90A_DEVICE
struct Cluster {
  int blocks;

  __device__ int rank() const { return static_cast<int>(cluster_rank()); }
  __device__ int size() const { return blocks; }
  __device__ void sync() const { cluster_sync(); }
  __device__ uint64_t load(const uint64_t* shared, int rank) const {
    return cluster_load_u64(cluster_address(shared, rank));
  }
};

// One store of 16 bytes: the compiler makes four of an assignment behind an unrolled loop.
__device__ __forceinline__ void stage4(uint32_t* address, const uint32_t (&x)[kTokensPerLane]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(shared_address(address)),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

struct StagedLevels {
  const uint32_t* stage;  // of this lane, in the first step

  __device__ StagedLevels pass() const { return *this; }
  __device__ void get(int step, uint32_t (&level)[kTokensPerLane]) const {
    const uint4 levels = *reinterpret_cast<const uint4*>(stage + step * kTokensPerStep);
    level[0] = levels.x, level[1] = levels.y, level[2] = levels.z, level[3] = levels.w;
  }
};
#endif

template <typename T>
__global__ void __launch_bounds__(kSampleThreads)
    sample_cluster_kernel(const SampleParams p, const bool vectorized, const int span,
                          const int blocks) {
#ifdef MLLAMA_SM90A_DEVICE
  extern __shared__ uint4 stages[];
  __shared__ SampleShared shared;
  const Cluster cluster{blocks};
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  uint32_t* stage = reinterpret_cast<uint32_t*>(stages) + warp * span + lane * kTokensPerLane;
  sample_row<T>(
      p, blockIdx.x / blocks, vectorized, span, shared, cluster,
      [&](int step, const float (&z)[kTokensPerLane]) {
        stage4(stage + step * kTokensPerStep, {__float_as_uint(z[0]), __float_as_uint(z[1]),
                                               __float_as_uint(z[2]), __float_as_uint(z[3])});
      },
      [&](const ScaledRow<T>&, int64_t, int steps, float largest) {
        for (int step = 0; step < steps; ++step) {
          uint32_t* own = stage + step * kTokensPerStep;
          const float4 z = *reinterpret_cast<const float4*>(own);
          stage4(own, {level_of(z.x, largest), level_of(z.y, largest), level_of(z.z, largest),
                       level_of(z.w, largest)});
        }
        return StagedLevels{stage};
      });
  cluster.sync();  // the others may still read this block's shared memory
#else
  __trap();
#endif
}

template <typename T>
cudaError_t launch_clusters(const SampleParams& p, int cluster, cudaStream_t stream) {
  return launch(sample_cluster_kernel<T>, p.rows * cluster, kSampleThreads,
                stage_bytes(p.vocab, cluster), stream,
                {.cluster = static_cast<unsigned>(cluster), .overlap = true}, p, reads_quads(p),
                static_cast<int>(span_of(p.vocab, cluster)), cluster);
}

// Blocks of the largest cluster that the current device can hold, a power of two.
int widest_cluster() {
  int cluster = kMaxCluster;
  while (cluster > 1 && !holds_cluster(address_of(sample_cluster_kernel<float>), kSampleThreads,
                                       kMaxStageBytes, cluster)) {
    cluster /= 2;
  }
  return cluster;
}

}  // namespace

bool fits_sample_cluster(int64_t vocab) {
  return stage_bytes(vocab, widest_cluster()) <= kMaxStageBytes;
}

cudaError_t sample_in_clusters(const SampleParams& p, cudaStream_t stream) {
  return dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    return launch_clusters<T>(p, choose_cluster(p.rows, p.vocab, widest_cluster()), stream);
  });
}

}  // namespace mllama
