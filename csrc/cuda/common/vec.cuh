// 16-byte vectors of a dtype, conversions to and from float32, and dispatch on the run-time dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../../common.h"

namespace mllama {

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_f32(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_f32(float x);
template <>
__device__ __forceinline__ float from_f32<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_f32<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_f32<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// x as T stores it, in float32. Kernels round where a chain of PyTorch operators would.
template <typename T>
__device__ __forceinline__ float round_to(float x) {
  return to_f32(from_f32<T>(x));
}

// tanh of a one-element gate, of 16-bit gates as exact as their rounding wants. float32 gates go
// through double: tanhf may be off by a unit in the last place, and every element would inherit
// that.
template <typename T>
__device__ __forceinline__ float unrounded_tanh_gate(const void* gate) {
  const float g = to_f32(*static_cast<const T*>(gate));
  return std::is_same_v<T, float> ? static_cast<float>(tanh(static_cast<double>(g))) : tanhf(g);
}

template <typename T>
__device__ __forceinline__ float tanh_gate(const void* gate) {
  return round_to<T>(unrounded_tanh_gate<T>(gate));
}

template <typename T>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(T));
  T data[kSize];
};

template <typename T>
__device__ __forceinline__ Vec<T> zero_vec() {
  Vec<T> v;
  *reinterpret_cast<uint4*>(&v) = make_uint4(0, 0, 0, 0);
  return v;
}

template <typename T>
__device__ __forceinline__ Vec<T> load_vec(const T* address) {
  return *reinterpret_cast<const Vec<T>*>(address);
}

// 16 bytes of global memory, or zeros. One predicated instruction: a branch around each load would
// let the compiler use what a load brings before it issues the next, and so would a select between
// it and zeros, made element by element right behind it.
__device__ __forceinline__ uint4 load_words_if(bool wanted, const void* address) {
  uint4 words;
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.u32 wanted, %5, 0;\n"
      "mov.u32 %0, 0;\n"
      "mov.u32 %1, 0;\n"
      "mov.u32 %2, 0;\n"
      "mov.u32 %3, 0;\n"
      "@wanted ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "=&r"(words.x), "=&r"(words.y), "=&r"(words.z), "=&r"(words.w)
      : "l"(address), "r"(static_cast<uint32_t>(wanted)));
  return words;
}

template <typename T>
__device__ __forceinline__ Vec<T> load_vec_if(bool wanted, const T* address) {
  const uint4 words = load_words_if(wanted, address);
  return *reinterpret_cast<const Vec<T>*>(&words);
}

template <typename T>
__device__ __forceinline__ void store_vec(T* address, const Vec<T>& v) {
  *reinterpret_cast<Vec<T>*>(address) = v;
}

// To global memory, or not at all, likewise in one instruction: the compiler may split the store of
// a Vec into its elements.
template <typename T>
__device__ __forceinline__ void store_vec_if(bool wanted, T* address, const Vec<T>& v) {
  const uint4 words = *reinterpret_cast<const uint4*>(&v);
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.u32 wanted, %5, 0;\n"
      "@wanted st.global.v4.u32 [%4], {%0, %1, %2, %3};\n"
      "}\n" ::"r"(words.x),
      "r"(words.y), "r"(words.z), "r"(words.w), "l"(address), "r"(static_cast<uint32_t>(wanted))
      : "memory");
}

// The first `count` elements one by one, for addresses of any alignment; the rest is zero.
template <typename T>
__device__ __forceinline__ Vec<T> load_elements(const T* address, int64_t count) {
  Vec<T> v = zero_vec<T>();
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) {
    if (i < count) v.data[i] = address[i];
  }
  return v;
}

template <typename T>
__device__ __forceinline__ void store_elements(T* address, const Vec<T>& v, int64_t count) {
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) {
    if (i < count) address[i] = v.data[i];
  }
}

}  // namespace mllama
