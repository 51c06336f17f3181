// Warpgroup matrix products of sm_90a (PTX ISA 8.0, wgmma.mma_async): d (+)= a * b for a 64 x 16,
// b 16 x N, d 64 x N in float32; 16-bit a from shared memory or registers, b from shared memory.
// Four warps, the first a multiple of four, issue each product together.
//
// Products run asynchronously: between wgmma_fence() and the wgmma_wait() that ends their group,
// neither accumulators nor operand registers may be touched.
//
// Accumulators  d[n] is an m16n8 tile as in ptx.cuh, columns 8 n to 8 n + 7, warp w of the group
//               holding rows 16 w to 16 w + 15. `a` in registers is the operand of m16n8k16
//               products.
// Shared memory Operands are panels: rows of kSpan bytes (the swizzle span: 32, 64 or 128) one
//               behind the other, swizzled as tensor copies do; they start on 8 * kSpan bytes.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace mllama {

// How the 16 x N operand b lies in shared memory.
enum class WgmmaMajor {
  kK = 0,  // a row holds k: rows are the N columns of b (scores: b = K^T, rows are keys)
  kMN = 1  // a row holds columns of b: rows are k (outputs: b = V, rows are keys)
};

// Swizzle code of a descriptor: bits 62 and 63.
template <int kSpan>
__device__ constexpr uint64_t wgmma_swizzle() {
  static_assert(kSpan == 32 || kSpan == 64 || kSpan == 128);
  return uint64_t{kSpan == 128 ? 1u : kSpan == 64 ? 2u : 3u} << 62;
}

// Operand of which a row holds k, at the first of its rows; + wgmma_step() for later columns of the
// panel. Eight rows are 8 * kSpan bytes apart.
template <int kSpan>
__device__ __forceinline__ uint64_t wgmma_descriptor_k(uint32_t address) {
  return wgmma_swizzle<kSpan>() | uint64_t{8 * kSpan / 16} << 32 | uint64_t{1} << 16 |
         (address & 0x3ffff) >> 4;
}

// Operand of which a row holds the N columns, `panel_bytes` from one panel of kSpan bytes to the
// next; + wgmma_step() for later rows.
template <int kSpan>
__device__ __forceinline__ uint64_t wgmma_descriptor_mn(uint32_t address, uint32_t panel_bytes) {
  return wgmma_swizzle<kSpan>() | uint64_t{8 * kSpan / 16} << 32 |
         static_cast<uint64_t>(panel_bytes / 16) << 16 | (address & 0x3ffff) >> 4;
}

// What to add to a descriptor for data that starts `bytes` later.
__device__ constexpr uint64_t wgmma_step(int bytes) { return static_cast<uint64_t>(bytes) / 16; }

// Keeps the compiler from moving uses of an accumulator across this point: to it, a product has
// written its results where it was issued.
template <int kTiles>
__device__ __forceinline__ void wgmma_pin(float (&d)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
  }
}

// Orders the warp's accesses to registers before the products that follow. The accumulators that it
// has written since they were last waited for are named.
template <int... kTiles>
__device__ __forceinline__ void wgmma_fence(float (&... d)[kTiles][4]) {
  (wgmma_pin(d), ...);
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Waits until at most kPending committed groups are under way; names the accumulators that become
// readable by it.
template <int kPending, int... kTiles>
__device__ __forceinline__ void wgmma_wait(float (&... d)[kTiles][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
  (wgmma_pin(d), ...);
}

// Wgmma<T, kN>::ss(d, a, b) and rs(d, a, b): one product, to which d's old value is added if
// kAccumulate. ss takes a from shared memory, a row holding k; rs from registers.
template <typename T, int kN>
struct Wgmma;

#define MLLAMA_D1(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define MLLAMA_D2(n) MLLAMA_D1(n), MLLAMA_D1(n + 1)
#define MLLAMA_D8(n) MLLAMA_D2(n), MLLAMA_D2(n + 2), MLLAMA_D2(n + 4), MLLAMA_D2(n + 6)
#define MLLAMA_D_64 MLLAMA_D8(0)
#define MLLAMA_D_80 MLLAMA_D8(0), MLLAMA_D2(8)
#define MLLAMA_D_128 MLLAMA_D8(0), MLLAMA_D8(8)
#define MLLAMA_D_160 MLLAMA_D8(0), MLLAMA_D8(8), MLLAMA_D2(16), MLLAMA_D2(18)
#define MLLAMA_D_176 MLLAMA_D8(0), MLLAMA_D8(8), MLLAMA_D2(16), MLLAMA_D2(18), MLLAMA_D2(20)

#define MLLAMA_R_64                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MLLAMA_R_80 MLLAMA_R_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define MLLAMA_R_128                                                                             \
  MLLAMA_R_80                                                                                    \
  ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, " \
  "%58, %59, %60, %61, %62, %63"
#define MLLAMA_R_160 \
  MLLAMA_R_128       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define MLLAMA_R_176 MLLAMA_R_160 ", %80, %81, %82, %83, %84, %85, %86, %87"

// I0 to I6: the numbers of the operands that follow the N / 2 accumulators.
#define MLLAMA_WGMMA(ELEMENT, TYPE, N, I0, I1, I2, I3, I4, I5, I6)                                \
  template <>                                                                                     \
  struct Wgmma<ELEMENT, N> {                                                                      \
    template <WgmmaMajor kMajor, bool kAccumulate>                                                \
    __device__ static __forceinline__ void ss(float (&d)[N / 8][4], uint64_t a, uint64_t b) {     \
      asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #I2                     \
                   ", 0;\n"                                                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                \
                   " {" MLLAMA_R_##N "}, %" #I0 ", %" #I1 ", accumulate, 1, 1, 0, %" #I3 ";\n}\n" \
                   : MLLAMA_D_##N                                                                 \
                   : "l"(a), "l"(b), "n"(static_cast<int>(kAccumulate)),                          \
                     "n"(static_cast<int>(kMajor))                                                \
                   : "memory");                                                                   \
    }                                                                                             \
    template <WgmmaMajor kMajor, bool kAccumulate>                                                \
    __device__ static __forceinline__ void rs(float (&d)[N / 8][4], const uint32_t (&a)[4],       \
                                              uint64_t b) {                                       \
      asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #I5                     \
                   ", 0;\n"                                                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                \
                   " {" MLLAMA_R_##N "}, {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4         \
                                     ", accumulate, 1, 1, %" #I6 ";\n}\n"                         \
                   : MLLAMA_D_##N                                                                 \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                          \
                     "n"(static_cast<int>(kAccumulate)), "n"(static_cast<int>(kMajor))            \
                   : "memory");                                                                   \
    }                                                                                             \
  }
#define MLLAMA_WGMMA_BOTH(N, ...)                      \
  MLLAMA_WGMMA(__nv_bfloat16, "bf16", N, __VA_ARGS__); \
  MLLAMA_WGMMA(__half, "f16", N, __VA_ARGS__)

MLLAMA_WGMMA_BOTH(64, 32, 33, 34, 35, 36, 37, 38);
MLLAMA_WGMMA_BOTH(80, 40, 41, 42, 43, 44, 45, 46);
MLLAMA_WGMMA_BOTH(128, 64, 65, 66, 67, 68, 69, 70);
MLLAMA_WGMMA_BOTH(160, 80, 81, 82, 83, 84, 85, 86);
MLLAMA_WGMMA_BOTH(176, 88, 89, 90, 91, 92, 93, 94);

#undef MLLAMA_WGMMA_BOTH
#undef MLLAMA_WGMMA
#undef MLLAMA_R_176
#undef MLLAMA_R_160
#undef MLLAMA_R_128
#undef MLLAMA_R_80
#undef MLLAMA_R_64
#undef MLLAMA_D_176
#undef MLLAMA_D_160
#undef MLLAMA_D_128
#undef MLLAMA_D_80
#undef MLLAMA_D_64
#undef MLLAMA_D8
#undef MLLAMA_D2
#undef MLLAMA_D1

}  // namespace mllama
