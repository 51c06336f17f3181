// The products of gemm_bf16.h on AMX tiles. Four accumulator tiles (32 x 32 of C) share two tiles
// of A and two of B, so every load feeds two products and the loads hide behind them.
#pragma once

#include "gemm_bf16.h"

#ifdef __AMX_BF16__

namespace mllama::MLLAMA_ISA {

// Holds the tile configuration of this thread: eight tiles of 16 rows of 64 bytes. Released on
// destruction, since a thread with live tiles makes the kernel save 8 KB at each switch.
class TileConfig {
 public:
  TileConfig() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  TileConfig(const TileConfig&) = delete;
  ~TileConfig() { _tile_release(); }
};

struct AmxGemm : Bf16Panels {
  using Session = TileConfig;
  static constexpr int kRowsPerStep = 32;
  // rows and depth are multiples of 32; columns of C past n may be written, up to a panel's width.
  // accumulate: C += A * B. Needs a Session.
  static void multiply(const BF16* a, int64_t lda, const Packed& b, int64_t rows, int64_t n,
                       int64_t depth, float* c, int64_t ldc, bool accumulate) {
    asm volatile("" ::: "memory");  // the tile intrinsics do not tell the compiler what they read
    const BF16* packed = b.data;
    for (int64_t panel = 0; panel < n; panel += kPanel) {
      const int64_t tiles = min<int64_t>(2, (b.columns - panel + 15) / 16);
      for (int64_t r = 0; r < rows; r += kRowsPerStep) {
        if (tiles == 2) {
          step2(a + r * lda, lda, packed, depth, c + r * ldc + panel, ldc, accumulate);
        } else {
          step1(a + r * lda, lda, packed, depth, c + r * ldc + panel, ldc, accumulate);
        }
      }
      packed += tiles * 16 * padded_depth(b.depth);
    }
    asm volatile("" ::: "memory");
  }

 private:
  static void step2(const BF16* a, int64_t lda, const BF16* b, int64_t depth, float* c, int64_t ldc,
                    bool accumulate) {
    if (accumulate) {
      _tile_loadd(0, c, ldc * 4);
      _tile_loadd(1, c + 16, ldc * 4);
      _tile_loadd(2, c + 16 * ldc, ldc * 4);
      _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += 32) {
      _tile_loadd(4, a + k, lda * 2);
      _tile_loadd(6, b + k * 32, 64);
      _tile_loadd(7, b + k * 32 + 512, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + 16 * lda + k, lda * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + 16, ldc * 4);
    _tile_stored(2, c + 16 * ldc, ldc * 4);
    _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
  }

  static void step1(const BF16* a, int64_t lda, const BF16* b, int64_t depth, float* c, int64_t ldc,
                    bool accumulate) {
    if (accumulate) {
      _tile_loadd(0, c, ldc * 4);
      _tile_loadd(2, c + 16 * ldc, ldc * 4);
    } else {
      _tile_zero(0);
      _tile_zero(2);
    }
    for (int64_t k = 0; k < depth; k += 32) {
      _tile_loadd(4, a + k, lda * 2);
      _tile_loadd(6, b + k * 16, 64);
      _tile_loadd(5, a + 16 * lda + k, lda * 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(2, c + 16 * ldc, ldc * 4);
  }
};

}  // namespace mllama::MLLAMA_ISA

#endif  // __AMX_BF16__
