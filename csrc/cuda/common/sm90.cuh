// The instructions of sm_90a that the Hopper kernels share: mbarriers, bulk and tensor copies
// (TMA), named barriers, thread-block clusters, register reallocation, and programmatic dependent
// launch. PTX ISA 8.0 and later; the matrix products are in wgmma.cuh.
//
// A kernel that uses them has its body inside `#ifdef MLLAMA_SM90A_DEVICE`: for other architectures
// there is only a trap, and runs_sm90a() (device.h) keeps it from being launched there.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ptx.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MLLAMA_SM90A_DEVICE 1
#endif

namespace mllama {

// ---- mbarriers. A phase completes when `count` threads arrived and all expected bytes landed.

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
               "r"(count)
               : "memory");
}

// Makes initialised barriers visible to the asynchronous proxy and to other blocks of the cluster.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile(
      "mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier))
      : "memory");
}

// Arrives once and adds `bytes` to what the current phase waits for.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;\n" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Waits until the phase of the given parity (0 for the first) has completed.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Position in a ring of kStages buffers with one barrier each.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Orders ordinary accesses to shared memory before later ones by TMA or wgmma.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// ---- copies. `bytes` and both addresses are multiples of 16; the barrier counts what has landed.

// What is read once leaves L2 first.
__device__ __forceinline__ uint64_t l2_evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void bulk_copy(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], %2, [%3], %4;\n" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// A box of a tensor (tensor_map.h) to shared memory; coordinates count elements, innermost
// first. Elements outside the tensor arrive as zeros, and count as bytes.
__device__ __forceinline__ void tensor_copy(void* shared, const void* map, uint64_t* barrier,
                                            int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%3, %4, %5, %6}], [%2];\n" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
// Of three dimensions, with a policy as above.
__device__ __forceinline__ void tensor_copy_with_policy(void* shared, const void* map,
                                                        uint64_t* barrier, int c0, int c1, int c2,
                                                        uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_"
      "hint [%0], [%1, {%3, %4, %5}], [%2], %6;\n" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "l"(policy)
      : "memory");
}

// Of two, to the same place in the shared memory of every block of the cluster whose bit is
// set in `blocks`; each block's own barrier, at the same place too, counts its bytes.
__device__ __forceinline__ void tensor_copy_multicast(void* shared, const void* map,
                                                      uint64_t* barrier, uint16_t blocks, int c0,
                                                      int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes."
      "multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;\n" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "h"(blocks)
      : "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// ---- warps among each other

// Named barrier `id` (1 to 15; 0 is __syncthreads) for `threads` threads, a multiple of 32.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// One lane of a converged warp, the same each time.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// Ends the thread. Where warps that gave registers away went on to code that others share, the
// compiler would give that code no more registers than are left.
[[noreturn]] __device__ __forceinline__ void exit_thread() {
  asm volatile("exit;\n");
  __builtin_unreachable();
}

#ifdef MLLAMA_SM90A_DEVICE
// Registers per thread of the calling warpgroup, a multiple of 8 from 24 to 240.
template <int kCount>
__device__ __forceinline__ void registers_release() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void registers_acquire() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kCount));
}
#endif

// ---- clusters

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster; orders shared-memory accesses before it. In two halves
// where something is to happen in between.
__device__ __forceinline__ void cluster_sync_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void cluster_sync_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void cluster_sync() {
  cluster_sync_arrive();
  cluster_sync_wait();
}

// The address of the same variable in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ uint32_t cluster_address(const void* shared, uint32_t rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n"
               : "=r"(address)
               : "r"(shared_address(shared)), "r"(rank));
  return address;
}

// Arrives at a barrier of any block of the cluster, by its cluster_address(): whoever waits there
// may copy over what this thread has read. Writes are released to the own block alone; to all of
// the cluster would take a fence for the whole device.
__device__ __forceinline__ void cluster_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cluster.b64 _, [%0];\n" ::"r"(barrier)
               : "memory");
}

__device__ __forceinline__ float cluster_load(uint32_t address) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];\n" : "=f"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ float4 cluster_load4(uint32_t address) {
  float4 value;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ uint64_t cluster_load_u64(uint32_t address) {
  uint64_t value;
  asm volatile("ld.shared::cluster.u64 %0, [%1];\n" : "=l"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void cluster_store(uint32_t address, float value) {
  asm volatile("st.shared::cluster.f32 [%0], %1;\n" ::"r"(address), "f"(value) : "memory");
}
__device__ __forceinline__ void cluster_store(uint32_t address, float2 value) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};\n" ::"r"(address), "f"(value.x),
               "f"(value.y)
               : "memory");
}

// ---- programmatic dependent launch (launches with LaunchOptions::overlap)
//
// The rule that makes it safe: every block calls wait_for_previous_kernel(), those that return
// early and those with nothing to do included; every thread calls it before it reads or writes
// global memory which another kernel may write or read; and start_next_kernel() stands only behind
// the wait of its own thread. Then a kernel is complete only when its predecessor is, so that
// whatever ran two kernels earlier is complete when a kernel starts, and what it touches before its
// wait needs only be independent of its direct predecessor. Were all blocks of a kernel to end
// without a wait, its successor would wait for it alone, and could run beside the kernel before.

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}
__device__ __forceinline__ void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

}  // namespace mllama
