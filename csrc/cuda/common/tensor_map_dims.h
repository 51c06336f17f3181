// What a tensor map can describe (cuTensorMapEncodeTiled), so that an op can ask before it chooses
// a kernel, and so that a refusal can name what was refused.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

namespace mllama {

struct TensorMapDim {
  int64_t size;    // elements
  int64_t stride;  // elements; ignored for the innermost dimension, which is contiguous
  int64_t box;     // elements of one copy, at most 256
};

constexpr int64_t kMapMaxSize = int64_t{1} << 32, kMapMaxStrideBytes = int64_t{1} << 40;

// Whether a dimension can be one of a map. Each stride is documented to reach past what lies below
// it; it certainly may not be 0 (an expanded tensor) or so short that the `row` elements of the
// innermost dimension overlap.
constexpr bool mappable(int64_t size, int64_t stride, int64_t row, int64_t element_bytes) {
  return size >= 1 && size <= kMapMaxSize && stride >= row &&
         stride * element_bytes < kMapMaxStrideBytes && stride * element_bytes % 16 == 0;
}

// Rows of some elements of several heads and of several sequences, pages or tiles. Strides in
// elements; every row starts on 16 bytes.
struct RowsTensor {
  const void* base;
  int64_t rows, row_stride, heads, head_stride, outer, outer_stride;

  constexpr bool mappable(int64_t row_elements, int64_t element_bytes) const {
    const auto is = [&](int64_t size, int64_t stride) {
      return mllama::mappable(size, stride, row_elements, element_bytes);
    };
    return is(rows, row_stride) && is(heads, head_stride) && is(outer, outer_stride);
  }
};

// "dimension 2 has stride 0 ...": the first dimension that is no part of a map, innermost first, or
// all of them if none stands out.
inline std::string tensor_map_fault(std::initializer_list<TensorMapDim> dims,
                                    int64_t element_bytes) {
  const int64_t row = dims.begin()->size;
  std::string all;
  int i = 0;
  for (const TensorMapDim& dim : dims) {
    const std::string text =
        "dimension " + std::to_string(i) + " has size " + std::to_string(dim.size) + ", stride " +
        std::to_string(i == 0 ? 1 : dim.stride) + " and box " + std::to_string(dim.box);
    const bool fits = i == 0 ? dim.size >= 1 && dim.size <= kMapMaxSize
                             : mappable(dim.size, dim.stride, row, element_bytes);
    if (!fits || dim.box < 1 || dim.box > 256) {
      return text + "; expected a size from 1 to 2^32, a stride of at least " +
             std::to_string(row) +
             " elements, a multiple of 16 bytes below 2^40, and a box of 1 to " + "256";
    }
    all += (i++ == 0 ? "" : ", ") + text;
  }
  return all;
}

}  // namespace mllama
