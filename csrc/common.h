// What every op shares: dtypes, small arithmetic, the thread pool. No torch, no CUDA.
#pragma once

#include <cstdint>

struct CUstream_st;  // *cudaStream_t, so that host-only compilation needs no CUDA headers

namespace mllama {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kFloat64 };

constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

template <typename T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <typename T>
constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

// Runs body(begin, end, context) over [begin, end) on torch's intra-op threads (defined in
// bindings/).
void parallel_for(int64_t begin, int64_t end, int64_t grain_size,
                  void (*body)(int64_t begin, int64_t end, void* context), void* context);

template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain_size, const F& f) {
  parallel_for(
      begin, end, grain_size,
      [](int64_t b, int64_t e, void* context) { (*static_cast<const F*>(context))(b, e); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace mllama
