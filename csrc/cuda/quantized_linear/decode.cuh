// Weights of any encoding in float32, as the parts' owners decode them, bit for bit: products and
// differences are rounded one by one. For what is not bound by instructions; codes.cuh is for
// the product.
#pragma once

#include "../common/vec.cuh"
#include "layout.h"

namespace mllama {

constexpr int kLaneColumns =
    16;  // of a row in a part of 64 columns: a lane's, as layout.h has them

// Column of a lane's value 4 * quarter, within the part.
constexpr int quarter_column(int quarter, int lane_of_row) {
  return quarter * 16 + lane_of_row * 4;
}

__device__ __forceinline__ float load_half(const uint8_t* address) {
  return __half2float(*reinterpret_cast<const __half*>(address));
}

__device__ __forceinline__ float2 load_pair(const uint8_t* address) {
  return __half22float2(*reinterpret_cast<const __half2*>(address));
}

// One value of int4's scale or zero plane.
__device__ __forceinline__ float plane_value(const uint8_t* plane, PlaneType type, int index) {
  switch (type) {
    case PlaneType::kFloat32:
      return reinterpret_cast<const float*>(plane)[index];
    case PlaneType::kFloat16:
      return load_half(plane + 2 * index);
    case PlaneType::kBFloat16:
      return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(plane)[index]);
    default:
      return plane[index];
  }
}

// Two neighbours, the first at an even index.
__device__ __forceinline__ float2 plane_pair(const uint8_t* plane, PlaneType type, int index) {
  switch (type) {
    case PlaneType::kFloat32:
      return reinterpret_cast<const float2*>(plane)[index / 2];
    case PlaneType::kFloat16:
      return __half22float2(reinterpret_cast<const __half2*>(plane)[index / 2]);
    case PlaneType::kBFloat16:
      return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162*>(plane)[index / 2]);
    default: {
      const uchar2 pair = reinterpret_cast<const uchar2*>(plane)[index / 2];
      return make_float2(pair.x, pair.y);
    }
  }
}

__device__ __forceinline__ float fp8_value(uint32_t byte) {
  const float magnitude = (byte & 127) == 127 ? __uint_as_float(0x7fffffff)
                                              : __uint_as_float((byte & 127) << 20) *
                                                    __uint_as_float(247u << 23);  // 2^120
  return byte & 128 ? -magnitude : magnitude;
}

// The scales of two neighbouring 32 columns in the part, as q4_k has them in 24 bits.
__device__ __forceinline__ uint32_t q4_k_pairs(const uint8_t* scales, int part, int row) {
  const int place = part * kEight + row;
  return reinterpret_cast<const uint16_t*>(scales)[place] |
         static_cast<uint32_t>(scales[64 + place]) << 16;
}

// A weight's table in shared memory, where equal codes share a word and others have other banks.
// All threads of the block, which may read it behind their next barrier.
constexpr int kTableSize = 16;
__device__ __forceinline__ void load_table(const QuantizedWeight& w, float (&table)[kTableSize]) {
  if (has_table(w.encoding) && threadIdx.x < kTableSize) table[threadIdx.x] = w.table[threadIdx.x];
}

// A lane's values: those of columns 32 g + 16 h + 4 j + i of a part, at 8 g + 4 h + i. `table`: of
// load_table().
__device__ __forceinline__ void decode_lane(const QuantizedWeight& w,
                                            const float (&table)[kTableSize], int64_t row,
                                            int64_t part, int j, float (&value)[kLaneColumns]) {
  const Encoding e = w.encoding;
  const int parts = block_parts(e), own_part = static_cast<int>(part % parts);
  const int own_row = static_cast<int>(row % kEight), lane = own_row * 4 + j;
  const uint8_t* const eight = w.packed + row / kEight * eight_bytes(w);
  const uint8_t* const block = eight + part / parts * block_bytes(w);
  const uint8_t* const codes = block + own_part * part_bytes(e);
  const uint8_t* const scales = block + code_bytes(e);

  uint32_t word[4];
  uint32_t high = 0;
  if (code_bits(e) == 8) {
    const uint4 words = *reinterpret_cast<const uint4*>(codes + lane * 16);
    word[0] = words.x, word[1] = words.y, word[2] = words.z, word[3] = words.w;
  } else {
    const uint2 words = *reinterpret_cast<const uint2*>(codes + lane * 8);
    word[0] = word[1] = words.x, word[2] = word[3] = words.y;
    if (e == Encoding::kQ6_K) {
      high = *reinterpret_cast<const uint32_t*>(codes + kLowBytes + lane * 4);
    }
  }
  const auto code = [&](int t) {
    const int g = t / 8, h = t / 4 % 2, i = t % 4, pair = 2 * h + i / 2;
    if (code_bits(e) == 8) return word[t / 4] >> (i / 2 + i % 2 * 2) * 8 & 255;
    const int bit = has_table(e) ? 8 * pair + i % 2 * 4 : 4 * pair + i % 2 * 16;
    const uint32_t low = word[t / 4] >> bit & 15;
    return e == Encoding::kQ6_K ? low | (high >> (4 * pair + 2 * g + i % 2 * 16) & 3) << 4 : low;
  };
  const auto decode = [&](const auto& value_of) {
#pragma unroll
    for (int t = 0; t < kLaneColumns; ++t) value[t] = value_of(t, code(t));
  };

  switch (e) {
    case Encoding::kQ8_0:
    case Encoding::kQ4_0: {
      const float2 pair = load_pair(scales + own_row * 4);
      const float d[2] = {pair.x, pair.y};
      const bool bytes = e == Encoding::kQ8_0;
      decode([&](int t, uint32_t c) {
        const int q = bytes ? static_cast<int8_t>(c) : static_cast<int>(c) - 8;
        return __fmul_rn(d[t / 8], static_cast<float>(q));
      });
      return;
    }
    case Encoding::kQ6_K: {
      const float d = load_half(scales + 128 + own_row * 2);
      const char4 four = *reinterpret_cast<const char4*>(scales + own_part * 32 + own_row * 4);
      const float scale[4] = {__fmul_rn(d, four.x), __fmul_rn(d, four.y), __fmul_rn(d, four.z),
                              __fmul_rn(d, four.w)};
      decode([&](int t, uint32_t c) {
        return __fmul_rn(scale[t / 4], static_cast<float>(static_cast<int>(c) - 32));
      });
      return;
    }
    case Encoding::kQ4_K: {
      const float2 d = load_pair(scales + 96 + own_row * 4);
      const uint32_t pairs = q4_k_pairs(scales, own_part, own_row);
      decode([&](int t, uint32_t c) {
        const uint32_t own = pairs >> t / 8 * 12;
        return __fsub_rn(__fmul_rn(__fmul_rn(d.x, own & 63), c), __fmul_rn(d.y, own >> 6 & 63));
      });
      return;
    }
    case Encoding::kInt8:
    case Encoding::kFp8: {
      const float scale =
          reinterpret_cast<const float*>(eight + blocks_of_row(w) * block_bytes(w))[own_row];
      const bool fp8 = e == Encoding::kFp8;
      decode([&](int, uint32_t c) {
        return __fmul_rn(fp8 ? fp8_value(c) : static_cast<float>(static_cast<int8_t>(c)), scale);
      });
      return;
    }
    case Encoding::kInt4: {
      const uint8_t* const zeros =
          scales + kEight * int4_row_scales(w.group) * plane_type_size(w.scale);
      const int index = int4_scale_index(w.group, own_row, own_part * kPartColumns / w.group);
      const auto both = [&](const uint8_t* plane, PlaneType type, float (&of_half)[2]) {
        if (w.group == 32) {
          const float2 pair = plane_pair(plane, type, index);
          of_half[0] = pair.x, of_half[1] = pair.y;
        } else {
          of_half[0] = of_half[1] = plane_value(plane, type, index);
        }
      };
      float scale[2], zero[2];
      both(scales, w.scale, scale);
      both(zeros, w.zero, zero);
      decode([&](int t, uint32_t c) {
        return __fmul_rn(__fsub_rn(static_cast<float>(c), zero[t / 8]), scale[t / 8]);
      });
      return;
    }
    default: {  // nf4, fp4
      const float absmax = reinterpret_cast<const float*>(scales)[own_row];
      decode([&](int, uint32_t c) { return __fmul_rn(table[c], absmax); });
    }
  }
}

}  // namespace mllama
