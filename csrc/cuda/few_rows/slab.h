// The sizes of a product with few rows of x, for the host and the device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../common.h"

namespace mllama {

constexpr int kFewRows = 16;                     // of x in a launch, at most
constexpr int kSlabRows = 16, kSlabDepth = 512;  // of a tile
constexpr int kHalfRows = kSlabRows / 2;         // a tile's are of one m16n8k16 product
constexpr int kSlabWarps = 8;
constexpr int kSlabThreads = kSlabWarps * 32;
constexpr int kWarpDepth = 64;  // a warp takes so many columns of each row
static_assert(kSlabDepth == kSlabWarps * kWarpDepth);

// Blocks share the columns of out in eights.
constexpr int64_t slab_blocks(int64_t columns, int multiprocessors) {
  return std::min<int64_t>(ceil_div<int64_t>(columns, kHalfRows), multiprocessors);
}

}  // namespace mllama
