// Whether rows start on 16 bytes, so that vectors and asynchronous copies suit them.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "../../common.h"

namespace mllama {

// Rows `stride` elements apart, the first at `address`.
inline bool is_aligned16(const void* address, int64_t stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && stride * element_size(dtype) % 16 == 0;
}

// Rows of an (outer, inner, dim) tensor.
inline bool rows_aligned16(const void* address, int64_t outer_stride, int64_t inner_stride,
                           int64_t outer, int64_t inner, DType dtype) {
  return is_aligned16(address, outer > 1 ? outer_stride : 0, dtype) &&
         is_aligned16(address, inner > 1 ? inner_stride : 0, dtype);
}

// Rows of several tensors, given where these begin and their strides in elements.
inline bool rows_aligned(DType dtype, std::initializer_list<const void*> pointers,
                         std::initializer_list<int64_t> strides) {
  bool aligned = true;
  for (const void* pointer : pointers) aligned = aligned && is_aligned16(pointer, 0, dtype);
  for (const int64_t stride : strides) aligned = aligned && is_aligned16(nullptr, stride, dtype);
  return aligned;
}

}  // namespace mllama
