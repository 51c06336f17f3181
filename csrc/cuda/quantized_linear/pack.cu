// quantized_pack and quantized_unpack: the parts of a weight into the order of layout.h and back,
// bit for bit. Neither is in the way of a token.
//
// Tiling     Packing: a thread per word of `packed`, which gathers its codes; unpacking: a thread
// per
//            byte of the parts. The bytes gathered are near each other, and come from L1.
// Traffic    Each side once from memory. 4-bit codes are read by 8 loads of a byte per word.

#include "../common/launch.h"
#include "layout.h"
#include "parts.cuh"

namespace mllama {
namespace {

constexpr int kThreads = 256;

struct Packing {
  QuantizedWeight w;
  const void* parts[kQuantizedParts];
};

__device__ __forceinline__ uint32_t code(const Packing& p, int64_t row, int64_t column) {
  return row < p.w.n && column < p.w.k ? stored_code(p.w, p.parts, row, column) : 0;
}

// Byte `at` of a part's scales of one row; 0 outside the weight.
__device__ __forceinline__ uint32_t part_byte(const Packing& p, int part, int64_t row, int64_t at) {
  const int64_t bytes = part_row_bytes(p.w, part);
  if (row >= p.w.n || at >= bytes) return 0;
  // Not by index: parameters that are indexed are copied to local memory first.
  const void* const data = part == 0 ? p.parts[0] : part == 1 ? p.parts[1] : p.parts[2];
  return static_cast<const uint8_t*>(data)[row * bytes + at];
}

// A word of the codes of a part of 64 columns.
__device__ uint32_t code_word(const Packing& p, int64_t eight, int64_t first_column, int word) {
  const Encoding e = p.w.encoding;
  const bool high = e == Encoding::kQ6_K && word >= kLowBytes / 4;
  const int lane_words = code_bits(e) == 8 ? 4 : high ? 1 : 2;
  const int own = high ? word - kLowBytes / 4 : word, lane = own / lane_words;
  const int64_t row = eight * kEight + lane / 4;
  uint32_t result = 0;
  // Of the lane's 16 columns those that are in this word.
  for (int c = 0; c < 16; ++c) {
    const int column = c / 8 * 32 + c / 4 % 2 * 16 + lane % 4 * 4 + c % 4;
    const CodePlace place = high ? high_place(lane / 4, column) : code_place(e, lane / 4, column);
    if (place.byte / 4 != word) continue;
    const uint32_t bits = code(p, row, first_column + column);
    const uint32_t own_bits = high ? bits >> 4 : e == Encoding::kQ6_K ? bits & 15 : bits;
    result |= own_bits << (place.byte % 4 * 8 + place.bit);
  }
  return result;
}

// A byte of the scales of a block.
__device__ uint32_t scale_byte(const Packing& p, int64_t eight, int64_t block, int at) {
  const auto from = [&](int part, int row, int64_t byte) {
    return part_byte(p, part, eight * kEight + row, byte);
  };
  switch (p.w.encoding) {
    case Encoding::kQ8_0:
    case Encoding::kQ4_0: {
      const int64_t stored = ggml_block_bytes(p.w.encoding);
      return from(0, at / 4, (block * 2 + at / 2 % 2) * stored + at % 2);
    }
    case Encoding::kNf4:
    case Encoding::kFp4:
      return from(1, at / 4, block * 4 + at % 4);
    case Encoding::kQ6_K:
      if (at < 128) return from(0, at / 4 % 8, block * 210 + 192 + at / 32 * 4 + at % 4);
      return from(0, (at - 128) / 2, block * 210 + 208 + at % 2);
    case Encoding::kQ4_K: {
      if (at >= 96) return from(0, (at - 96) / 4, block * 144 + at % 4);
      const int index = at < 64 ? at / 2 : at - 64, part = index / kEight, row = index % kEight;
      if (eight * kEight + row >= p.w.n) return 0;
      const uint8_t* const s = static_cast<const uint8_t*>(p.parts[0]) +
                               (eight * kEight + row) * part_row_bytes(p.w, 0) + block * 144 + 4;
      const uint32_t pairs = q4_k_pair(s, 2 * part) | q4_k_pair(s, 2 * part + 1) << 12;
      return (at < 64 ? pairs >> at % 2 * 8 : pairs >> 16) & 255;
    }
    default: {  // int4
      const int scales = int4_row_scales(p.w.group);
      const int size = static_cast<int>(plane_type_size(p.w.scale));
      const int zero_size = static_cast<int>(plane_type_size(p.w.zero));
      const bool zero = at >= kEight * scales * size;
      const int bytes = zero ? zero_size : size, own = zero ? at - kEight * scales * size : at;
      const int together = p.w.group == 32 ? 2 : 1, place = own / bytes;
      const int index = place / (kEight * together) * together + place % together;
      return from(zero ? 2 : 1, place / together % kEight,
                  (block * scales + index) * bytes + own % bytes);
    }
  }
}

__device__ bool has_nan(const Packing& p, int64_t row) {
  const uint8_t* const data = static_cast<const uint8_t*>(p.parts[0]) + row * p.w.k;
  bool found = false;
  for (int64_t i = 0; i < p.w.k; ++i) found |= (data[i] & 127) == 127;
  return found;
}

__device__ uint32_t row_scale(const Packing& p, int64_t eight, int index) {
  const int64_t row = eight * kEight + index % kEight;
  if (row >= p.w.n) return 0;
  const bool factor = index >= kEight;  // fp8's second
  return factor && has_nan(p, row) ? 0x7fffffffu : static_cast<const uint32_t*>(p.parts[1])[row];
}

__global__ void __launch_bounds__(kThreads)
    quantized_pack_kernel(const Packing p, uint32_t* packed, const int64_t words) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= words) return;
  const int64_t per_eight = eight_bytes(p.w) / 4, per_block = block_bytes(p.w) / 4;
  const int64_t eight = index / per_eight, word = index % per_eight, block = word / per_block;
  if (block >= blocks_of_row(p.w)) {
    packed[index] = row_scale(p, eight, static_cast<int>(word - blocks_of_row(p.w) * per_block));
    return;
  }
  const int at = static_cast<int>(word % per_block), codes = code_bytes(p.w.encoding) / 4;
  if (at < codes) {
    const int part_words = part_bytes(p.w.encoding) / 4;
    const int64_t column = block * block_columns(p.w.encoding) + at / part_words * kPartColumns;
    packed[index] = code_word(p, eight, column, at % part_words);
    return;
  }
  uint32_t result = 0;
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    result |= scale_byte(p, eight, block, (at - codes) * 4 + i) << 8 * i;
  }
  packed[index] = result;
}

// ---- back

// A row of a packed weight.
struct PackedRow {
  const QuantizedWeight& w;
  const uint8_t* eight;
  int row;

  __device__ PackedRow(const QuantizedWeight& weight, int64_t row)
      : w(weight),
        eight(weight.packed + row / kEight * eight_bytes(weight)),
        row(static_cast<int>(row % kEight)) {}

  __device__ const uint8_t* block(int64_t column) const {
    return eight + column / block_columns(w.encoding) * block_bytes(w);
  }
  __device__ uint32_t code(int64_t column) const {
    const Encoding e = w.encoding;
    const int part = static_cast<int>(column % block_columns(e)) / kPartColumns;
    const uint8_t* const own = block(column) + part * part_bytes(e);
    const CodePlace place = code_place(e, row, column % kPartColumns);
    const uint32_t bits = own[place.byte] >> place.bit;
    if (e != Encoding::kQ6_K) return code_bits(e) == 8 ? bits : bits & 15;
    const CodePlace high = high_place(row, column % kPartColumns);
    return (bits & 15) | (own[high.byte] >> high.bit & 3) << 4;
  }
  // Byte `at` of the scales of the block of a column.
  __device__ uint32_t scale(int64_t column, int at) const {
    return block(column)[code_bytes(w.encoding) + at];
  }
};

__device__ uint32_t unpacked_scale(const PackedRow& from, int64_t column, int byte) {
  const int row = from.row;
  switch (from.w.encoding) {
    case Encoding::kQ8_0:
    case Encoding::kQ4_0:
      return from.scale(column, row * 4 + static_cast<int>(column / 32 % 2) * 2 + byte);
    case Encoding::kQ6_K:  // 16 of scales, then 2
      if (byte >= 16) return from.scale(column, 128 + row * 2 + byte - 16);
      return from.scale(column, byte / 4 * 32 + row * 4 + byte % 4);
    default:  // q4_k: 4, then 12
      if (byte < 4) return from.scale(column, 96 + row * 4 + byte);
      return q4_k_byte(byte - 4, [&](int j) {
        const int place = j / 2 * kEight + row;
        const uint32_t pairs = from.scale(column, place * 2) |
                               from.scale(column, place * 2 + 1) << 8 |
                               from.scale(column, 64 + place) << 16;
        return pairs >> j % 2 * 12 & 4095;
      });
  }
}

__device__ uint32_t unpacked_byte(const PackedRow& from, int part, int64_t at) {
  const QuantizedWeight& w = from.w;
  const int64_t columns = ggml_block(w.encoding);
  if (columns != 0) {
    const int64_t bytes = ggml_block_bytes(w.encoding), column = at / bytes * columns;
    const int byte = static_cast<int>(at % bytes);
    const bool last = w.encoding == Encoding::kQ6_K;  // scales stand behind the codes
    const int codes = static_cast<int>(columns) * code_bits(w.encoding) / 8;
    const int first_code = last ? 0 : static_cast<int>(bytes) - codes;
    if (byte < first_code || byte >= first_code + codes) {
      return unpacked_scale(from, column, last ? byte - codes : byte);
    }
    uint32_t result = 0;
    for_codes_of_byte(w.encoding, byte - first_code, [&](int c, int shift, int bits, int bit) {
      result |= (from.code(column + c) >> shift & ((1u << bits) - 1)) << bit;
    });
    return result;
  }
  if (part == 0 && code_bits(w.encoding) == 8) return from.code(at);
  if (part == 0) return from.code(2 * at) | from.code(2 * at + 1) << 4;
  if (has_row_scale(w.encoding)) {
    return from.eight[blocks_of_row(w) * block_bytes(w) + from.row * 4 + at];
  }
  if (has_table(w.encoding)) return from.scale(at / 4 * kPartColumns, from.row * 4 + at % 4);
  const int size = static_cast<int>(plane_type_size(part == 1 ? w.scale : w.zero));
  const int scales = int4_row_scales(w.group);
  const int64_t group = at / size;
  const int first = part == 1 ? 0 : kEight * scales * static_cast<int>(plane_type_size(w.scale));
  const int place = int4_scale_index(w.group, from.row, static_cast<int>(group % scales));
  return from.scale(group * w.group, first + place * size + static_cast<int>(at % size));
}

__global__ void __launch_bounds__(kThreads)
    quantized_unpack_kernel(const QuantizedWeight w, const int part, uint8_t* out,
                            const int64_t bytes) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= bytes) return;
  const int64_t per_row = part_row_bytes(w, part);
  out[index] = static_cast<uint8_t>(unpacked_byte({w, index / per_row}, part, index % per_row));
}

}  // namespace

int64_t quantized_packed_bytes_cuda(const QuantizedWeight& w) {
  return ceil_div<int64_t>(w.n, kEight) * eight_bytes(w);
}

int quantized_pack_cuda(const QuantizedPackParams& p, CUstream_st* stream) {
  const int64_t words = quantized_packed_bytes_cuda(p.w) / 4;
  if (words == 0) return cudaSuccess;
  Packing packing{p.w, {}};
  for (int i = 0; i < kQuantizedParts; ++i) packing.parts[i] = p.parts[i];
  return launch(quantized_pack_kernel, ceil_div<int64_t>(words, kThreads), kThreads, 0, stream, {},
                packing, reinterpret_cast<uint32_t*>(p.packed), words);
}

int quantized_unpack_cuda(const QuantizedUnpackParams& p, CUstream_st* stream) {
  for (int part = 0; part < kQuantizedParts; ++part) {
    const int64_t bytes = p.w.n * part_row_bytes(p.w, part);
    if (bytes == 0) continue;
    const cudaError_t status =
        launch(quantized_unpack_kernel, ceil_div<int64_t>(bytes, kThreads), kThreads, 0, stream, {},
               p.w, part, static_cast<uint8_t*>(p.parts[part]), bytes);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace mllama
