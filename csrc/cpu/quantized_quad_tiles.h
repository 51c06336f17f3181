// Sums of products of bytes on AMX tiles, for quantized_quads.h.
#pragma once

#include "common/machine.h"
#include "common/simd.h"

#ifdef __AMX_INT8__
#define MLLAMA_QUAD_TILES

namespace mllama::MLLAMA_ISA {

// Holds this thread's tile configuration: 0 sums, 4 x, 6 the weight.
class QuadTiles {
 public:
  QuadTiles(int64_t rows, int quads) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 0, 0, 0, 0, 0, 64};
      uint8_t rows[16] = {};
    } config;
    config.rows[0] = config.rows[4] = (uint8_t)rows;
    config.row_bytes[4] = (uint16_t)(quads * 4);
    config.rows[6] = (uint8_t)quads;
    asm volatile("" ::"r"(&config) : "memory");  // the intrinsics do not tell what they read
    _tile_loadconfig(&config);
  }
  QuadTiles(const QuadTiles&) = delete;
  ~QuadTiles() { _tile_release(); }

  // Before the first and after the last of some products.
  static void fence() { asm volatile("" ::: "memory"); }

  // sums (rows, 16) = x (rows, quads of signed bytes) times the weight (quads, 16, unsigned bytes).
  static void multiply(const void* weight, const void* x, int64_t x_stride, int32_t* sums) {
    _tile_loadd(6, weight, 64);
    _tile_loadd(4, x, x_stride);
    _tile_zero(0);
    _tile_dpbsud(0, 4, 6);
    _tile_stored(0, sums, 64);
  }
};

}  // namespace mllama::MLLAMA_ISA

#endif  // __AMX_INT8__
