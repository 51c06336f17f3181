// Products in float32 with the decoded weight: float32's way, and every dtype's where another is
// not exact enough. An infinity or NaN of x or of a scale gives what it gives in plain arithmetic.
//
// A sum over k is one of chunks of kChunk columns, these of chains of 32, each in order: that of
// FmaGemm called for a chunk, so that few rows and many have the same bits. Longer chunks lose
// digits at k = 14336.
#pragma once

#include "common/gemm_fma.h"
#include "quantized_decode.h"
#include "quantized_product.h"

namespace mllama::MLLAMA_ISA {

template <Encoding kEncoding>
class DecodedProduct final : public FloatProduct {
  using Gemm = FmaGemm<float>;
  static constexpr int64_t kChunk = 2048;
  static_assert(Gemm::kChain == kStepColumns);

 public:
  DecodedProduct(const QuantizedWeight& w, const PackedLayout& layout)
      : layout_(layout), decoder_(w, layout) {}

  void multiply(const uint8_t* tiles, int64_t count, const float* x, int64_t x_stride, int64_t rows,
                float* y, int64_t ldy, Scratch& scratch) const override {
    if (rows % Gemm::kRowsPerStep == 0) {
      return multiply_panel(tiles, count, x, x_stride, rows, y, ldy, scratch);
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t row = 0; row < rows; ++row) {
        for (int lane = 0; lane < kTileRows; lane += kLanes) {
          multiply_row(tiles + i * layout_.tile_bytes, x + row * x_stride, lane,
                       y + row * ldy + i * kTileRows + lane);
        }
      }
    }
  }

 private:
  void multiply_row(const uint8_t* tile, const float* x, int lane, float* y) const {
    FVec total = {};
    for (int64_t chunk = 0; chunk < layout_.columns; chunk += kChunk) {
      const int64_t end = min(chunk + kChunk, layout_.columns);
      FVec sum = {};
      for (int64_t column = chunk; column < end; column += kStepColumns) {
        FVec chain = {};
        decoder_.columns(tile, column / kStepColumns, lane,
                         [&](int k, FVec w) { chain += splat(x[column + k]) * w; });
        sum += chain;
      }
      total += sum;
    }
    store(y, total);
  }

  void multiply_panel(const uint8_t* tiles, int64_t count, const float* x, int64_t x_stride,
                      int64_t rows, float* y, int64_t ldy, Scratch& scratch) const {
    const Scratch::Mark mark(scratch);
    const int64_t width = count * kTileRows;
    float* b = scratch.take<float>(kChunk, width);
    float* part = scratch.take<float>(rows, width);
    for (int64_t chunk = 0; chunk < layout_.columns; chunk += kChunk) {
      const int64_t depth = min(kChunk, layout_.columns - chunk);
      for (int64_t i = 0; i < count; ++i) {
        decode(tiles + i * layout_.tile_bytes, chunk, depth, width, i * kTileRows, b);
      }
      const typename Gemm::Packed packed = {b, depth, width};
      if (chunk == 0) {
        Gemm::multiply(x, x_stride, packed, rows, width, depth, y, ldy, false);
        continue;
      }
      Gemm::multiply(x + chunk, x_stride, packed, rows, width, depth, part, width, false);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < width; i += kLanes) {
          float* place = y + row * ldy + i;
          store(place, load(place) + load(part + row * width + i));
        }
      }
    }
  }

  // `depth` columns of k from `begin` on to packed B of `width` columns; the tile's rows are its
  // columns from `first` on.
  void decode(const uint8_t* tile, int64_t begin, int64_t depth, int64_t width, int64_t first,
              float* b) const {
    for (int lane = 0; lane < kTileRows; lane += kLanes) {
      const int64_t panel = (first + lane) / Gemm::kPanel * Gemm::kPanel;
      const int64_t panel_width = min<int64_t>(Gemm::kPanel, width - panel);
      float* place = b + panel * depth + (first + lane - panel);
      for (int64_t column = 0; column < depth; column += kStepColumns) {
        decoder_.columns(tile, (begin + column) / kStepColumns, lane,
                         [&](int k, FVec w) { store(place + k * panel_width, w); });
        place += kStepColumns * panel_width;
      }
    }
  }

  const PackedLayout& layout_;
  const Decoder<kEncoding> decoder_;
};

}  // namespace mllama::MLLAMA_ISA
