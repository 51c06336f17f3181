// The memory behind a tensor. Torch keeps a tensor whose storage was freed or made smaller, and
// reads past its end as the kernels would; and it keeps whatever bytes a tensor of bool was viewed
// from.
#pragma once

#include "strides.h"

namespace mllama {

// Elements from the first to the last that t names, both counted.
inline int64_t extent(const Tensor& t) {
  if (t.numel() == 0 || t.is_contiguous()) return t.numel();
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * stride(t, i);
  return last + 1;
}

// Bytes that t's storage must hold, and those it does hold.
struct StorageBytes {
  int64_t needed, held;
};

inline StorageBytes storage_bytes(const Tensor& t) {
  const int64_t elements = extent(t);
  if (elements == 0) return {0, 0};
  int64_t held = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &held));
  return {(t.storage_offset() + elements) * static_cast<int64_t>(t.element_size()), held};
}

// The bytes from a tensor's first element to its last: gaps between its rows count as its own.
struct ByteRange {
  uintptr_t begin, end;

  explicit ByteRange(const Tensor& t)
      : begin(reinterpret_cast<uintptr_t>(t.const_data_ptr())),
        end(begin + static_cast<uintptr_t>(extent(t)) * t.element_size()) {}

  bool overlaps(const ByteRange& other) const {
    return begin < end && other.begin < other.end && begin < other.end && other.begin < end;
  }
};

// Whether each byte of a contiguous tensor of bool is 0 or 1, which compiled code takes for
// granted.
inline bool holds_bools(const Tensor& t) {
  const auto* bytes = static_cast<const unsigned char*>(t.const_data_ptr());
  unsigned char all = 0;
  for (int64_t i = 0, n = t.numel(); i < n; ++i) all |= bytes[i];
  return all <= 1;
}

}  // namespace mllama
