// Where the pixels of patches lie.
#pragma once

#include "../../patch_embed.h"

namespace mllama {

// Where patches lie in the images.
struct PatchGeometry {
  int channels, size, patch, grid;
  int depth;     // channels * patch * patch
  int64_t rows;  // images * tiles * grid^2

  explicit PatchGeometry(const PatchEmbedParams& p)
      : channels(static_cast<int>(p.channels)),
        size(static_cast<int>(p.size)),
        patch(static_cast<int>(p.patch)),
        grid(static_cast<int>(p.grid)),
        depth(static_cast<int>(p.channels * p.patch * p.patch)),
        rows(p.images * p.tiles * p.grid * p.grid) {}

  // First pixel of the patch of row `row`.
  __device__ __forceinline__ int64_t patch_offset(int64_t row) const {
    const int64_t tile = row / (grid * grid);
    const int index = static_cast<int>(row - tile * (grid * grid));
    return (tile * channels * size + index / grid * patch) * size + index % grid * patch;
  }
  // Pixel k of a patch, counted from its first.
  __device__ __forceinline__ int pixel_offset(int k) const {
    const int channel = k / (patch * patch), within = k - channel * patch * patch;
    return (channel * size + within / patch) * size + within % patch;
  }
};

// Copies of two neighbouring pixels need these to be even, of four weights divisible by four.
struct PatchAlignment {
  bool pixel_pairs, weight_fours;

  explicit PatchAlignment(const PatchEmbedParams& p)
      : pixel_pairs(p.patch % 2 == 0 && p.size % 2 == 0 &&
                    reinterpret_cast<uintptr_t>(p.pixel_values) % 4 == 0),
        weight_fours(p.channels * p.patch * p.patch % 4 == 0 &&
                     reinterpret_cast<uintptr_t>(p.patch_weight) % 8 == 0) {}
};

}  // namespace mllama
