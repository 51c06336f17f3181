// How results are written: through the caches, or past them.
//
// A result about as large as the last cache is gone from there by the time it is read. Written
// through the cache all the same, each of its lines is read from memory first; stores past the
// caches write whole lines and read nothing. A smaller result is written through the cache, where
// its memory often is from the last use. The bound is that of glibc's memcpy, three quarters of the
// cache.
#pragma once

#include "machine.h"
#include "simd.h"

namespace mllama::MLLAMA_ISA {

struct ThroughCache {
  static constexpr bool kPastCache = false;

  template <typename T, typename Part>
  MLLAMA_INLINE void store(T* p, Vec<T> v, Part part) {
    MLLAMA_ISA::store(p, v, part);
  }
  MLLAMA_INLINE void finish() {}
};

#if defined(__AVX2__) || defined(__AVX512F__)
// Whole vectors at addresses that are aligned to them.
struct PastCache {
  static constexpr bool kPastCache = true;

  MLLAMA_INLINE void store(float* p, FVec v, Whole) { stream(p, v); }
  MLLAMA_INLINE void store(double* p, DVec v, Whole) { stream(p, v); }
  template <typename T>
  MLLAMA_INLINE void store(T* p, FVec v, Whole) {
    stream(p, narrow(v, p));
  }
  template <typename T>
  MLLAMA_INLINE void store(T* p, Vec<T> v, First part) {
    MLLAMA_ISA::store(p, v, part);
  }
  // Such stores may pass later ones: a task ends with this before others are told of its results.
  MLLAMA_INLINE void finish() { _mm_sfence(); }

 private:
  template <typename V>
  MLLAMA_INLINE void stream(void* p, V v) {
    constexpr size_t kBytes = sizeof(V) < 32 ? 16 : 32;
    typedef long long Piece __attribute__((vector_size(kBytes)));
    for (size_t i = 0; i < sizeof(V); i += kBytes) {
      Piece piece;
      memcpy(&piece, reinterpret_cast<const char*>(&v) + i, kBytes);
      char* place = static_cast<char*>(p) + i;
      if constexpr (kBytes == 16) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(place), (__m128i)piece);
      } else {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(place), (__m256i)piece);
      }
    }
  }
};
#endif

// Whether to write `rows` rows of row_bytes, one after the other, past the cache: at a, and as many
// at b if there is a second result.
MLLAMA_INLINE bool past_cache(int64_t rows, int64_t row_bytes, const void* a,
                              const void* b = nullptr) {
  const bool whole_lines = ((uintptr_t)a | (uintptr_t)b | row_bytes) % 64 == 0;
  return whole_lines && rows * row_bytes >= last_cache_bytes() / 4 * 3;
}

template <typename F>
MLLAMA_INLINE void with_stores(bool past_cache, const F& f) {
#if defined(__AVX2__) || defined(__AVX512F__)
  if (past_cache) return f(PastCache{});
#endif
  f(ThroughCache{});
}

}  // namespace mllama::MLLAMA_ISA
