// Memory of one thread for the time of one task.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include "machine.h"
#include "simd.h"

namespace mllama::MLLAMA_ISA {

// A stack of cache-line aligned arrays. Arrays taken after a Mark was set are freed with it, and
// the memory is kept for the next task.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    for (int i = 0; i < count_; ++i) free(arrays_[i].data);
  }

  template <typename T>
  T* take(int64_t elements, int64_t times = 1) {
    int64_t size;
    if (__builtin_mul_overflow(elements, times, &size) ||
        __builtin_mul_overflow(size, (int64_t)sizeof(T), &size) || size > kMaxBytes) {
      out_of_memory();
    }
    const size_t bytes = ((size_t)size + 63) / 64 * 64 + 64;
    if (used_ == kMaxArrays) out_of_memory();
    Array& array = arrays_[used_];
    if (used_ == count_) {
      array = {nullptr, 0};
      ++count_;
    }
    if (array.bytes < bytes) {
      free(array.data);
      array = {aligned_alloc(64, bytes), bytes};
      if (array.data == nullptr) out_of_memory();
    }
    ++used_;
    return static_cast<T*>(array.data);
  }

  class Mark {
   public:
    explicit Mark(Scratch& scratch) : scratch_(scratch), used_(scratch.used_) {}
    ~Mark() { scratch_.used_ = used_; }

   private:
    Scratch& scratch_;
    int used_;
  };

 private:
  static constexpr int kMaxArrays = 32;
  static constexpr int64_t kMaxBytes = INT64_MAX / 2;
  struct Array {
    void* data;
    size_t bytes;
  };
  Array arrays_[kMaxArrays];
  int count_ = 0, used_ = 0;
};

}  // namespace mllama::MLLAMA_ISA
