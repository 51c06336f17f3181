// What the product of few_rows/product.cuh asks of a quantised weight.
#pragma once

#include "../few_rows/product.cuh"
#include "codes.cuh"
#include "decode.cuh"
#include "int8.cuh"
#include "kernels.h"
#include "scales.cuh"

namespace mllama {

// Slabs of two tiles: one wait per 32 rows x 512 columns. A slab has, for each half of its tiles,
// the blocks of eight rows x 512 columns, or what of them there is.
constexpr int kQuantizedSlabTiles = 2;
constexpr int kSlabHalves = 2 * kQuantizedSlabTiles;

// Floats per row of a half that a warp makes of the scales of its 64 columns: by 32 columns, with
// offsets behind each, or by 16.
constexpr int scale_floats(Family family) {
  switch (family) {
    case Family::kInt8:
    case Family::kFp8:
      return 0;
    case Family::kQ6_K:
    case Family::kInt4:
      return 4;
    default:
      return 2;
  }
}

// Bytes of a half at most: of Family::kInt4 those of int4 with groups of 32 and float32.
constexpr int max_half_bytes(Family family) {
  switch (family) {
    case Family::kInt8:
    case Family::kFp8:
      return 8 * 512;
    case Family::kQ8_0:
      return 8 * (512 + 32);
    case Family::kQ6_K:
      return 8 * 210 * 2;
    case Family::kInt4:
      return 2 * (1024 + 8 * 8 * 8);
    default:
      return 8 * (256 + 32);
  }
}
// From a half to the next: not a multiple of 128 bytes where the scales of all halves are read at
// once.
constexpr int half_stride(Family family) {
  const int bytes = max_half_bytes(family);
  return bytes % 128 == 0 && scale_floats(family) != 0 ? bytes + 32 : bytes;
}
constexpr int slab_bytes(Family family) { return kSlabHalves * half_stride(family); }

constexpr int kPairs = 256;  // of codes of a table

template <Family kFamily>
struct QuantizedShared {
  alignas(16) float scales[kSlabWarps][kSlabHalves * kHalfRows][scale_floats(kFamily)];
};
template <>
struct QuantizedShared<Family::kInt4> {
  alignas(16) float scales[kSlabWarps][kSlabHalves * kHalfRows][4];
  alignas(8) uint32_t zeros[kSlabWarps][kSlabHalves * kHalfRows][2];  // as int4_zero() has them
  float2 x_sums[kSlabWarps][kFewRows / 8][2][4];  // over 32 columns, of two rows of x each
};
template <>
struct QuantizedShared<Family::kInt8> {};
template <>
struct QuantizedShared<Family::kFp8> {};
template <>
struct QuantizedShared<Family::kTable4> {
  alignas(16) uint2 pairs[kPairs][kWarpSize / 2];  // a copy per two banks
  alignas(16) float scales[kSlabWarps][kSlabHalves * kHalfRows][2];
};

// kInt8: x goes to 8-bit integers (int8.cuh), and codes are multiplied as they are.
template <typename T, Family kFamily, int kBlocksOfRows, bool kInt8 = false>
class QuantizedProductWeight {
  static constexpr int kFloats = scale_floats(kFamily);
  static constexpr bool kOffsets = kFamily == Family::kInt4;
  static constexpr bool kRowScales = kFloats == 0;

 public:
  using Element = T;
  static constexpr int kRowBlocks = kBlocksOfRows, kSlabTiles = kQuantizedSlabTiles;
  static constexpr bool kSplit = true, kTargetAhead = kRowBlocks == 1;
  using Words = typename Activations<T, kRowBlocks, kSplit>::Words;
  using Share = WeightShare<QuantizedCall>;

  // All threads of the block, behind the wait for the previous kernel.
  __device__ __forceinline__ QuantizedProductWeight(const Share& share,
                                                    QuantizedShared<kFamily>& shared)
      : share_(share),
        shared_(shared),
        part_(warp_ % block_parts(encoding())),
        own_offset_(block_offset() + part_ * part_bytes(encoding()) +
                    lane() * (code_bits(encoding()) == 8 ? 16 : 8)),
        scales_offset_(block_offset() + code_bytes(encoding())),
        short_tile_(share.halves(share.tiles - 1) == 2 ? -1 : share.tiles - 1) {
    if constexpr (kFamily == Family::kTable4) make_pairs();
  }

  // The sums of x over 32 columns, by a product with a constant, for the offsets.
  __device__ __forceinline__ void begin_chunk(const Words& x, int chunk) {
    present_ = chunk * kSlabWarps + warp_ < share_.p.parts;
    if constexpr (kInt8) {
      integers_.take(x, share_.p.rows);
    } else if constexpr (kOffsets) {
      __syncwarp();  // all are done with the chunk before
      const uint32_t one = twice<T>(1.0f / kFinish<T, kFamily>);
#pragma unroll
      for (int b = 0; b < kRowBlocks; ++b) {
#pragma unroll
        for (int g = 0; g < 2; ++g) {
          float sum[4] = {};
          mma_m16n8k16<T>(sum, {one, one, one, one}, x.x[b][g].x, x.x[b][g].y);
          mma_m16n8k16<T>(sum, {one, one, one, one}, x.x[b][g].z, x.x[b][g].w);
          // All rows of the product are alike. What is not finite is so in the other sum too.
          if (lane() < 4) {
            shared_.x_sums[warp_][b][g][lane()] =
                make_float2(zero_unless_finite(sum[0]), zero_unless_finite(sum[1]));
          }
        }
      }
    }
  }

  // The scales of the slab's halves, a row per lane.
  __device__ __forceinline__ void begin_slab(const char* slab, int first_tile, int end_tile) {
    if constexpr (!kRowScales) {
      if (!present_) return;
      const int tile = lane() / kSlabRows, half = lane() / kHalfRows % 2;
      const bool there = first_tile + tile < end_tile && half < share_.halves(first_tile + tile);
      const char* const stored =
          slab + (there ? 2 * tile + half : 0) * kHalfStride + scales_offset_;
      __syncwarp();  // all are done with the scales before
      make_scales(stored, lane() % kHalfRows, lane());
      __syncwarp();
    }
  }

  __device__ __forceinline__ void multiply(float (&sum)[kRowBlocks][4], const Words& x,
                                           const char* slab, int slab_tile, int tile) const {
    if (!present_) return;
    const char* const own = slab + own_offset_ + 2 * slab_tile * kHalfStride;
    // A half that is not there is replaced by the first.
    const Codes<T, kFamily> low(own);
    const Codes<T, kFamily> high(own + (tile == short_tile_ ? 0 : kHalfStride));
    const int row = 2 * slab_tile * kHalfRows + lane() / 4;
    if constexpr (kInt8) {
      multiply_integers(sum, low, high, row);
    } else {
      multiply_numbers(sum, x, low, high, row);
    }
  }

  __device__ __forceinline__ static int weight_row(int i) { return i; }

  // Scales of rows, requested where a column is located; a bias, which few weights have, is not.
  struct NoTerms {
    NoTerms() = default;
    __device__ __forceinline__ NoTerms(const QuantizedProductWeight&, int) {}
  };
  struct RowTerms {
    float factor = 0.0f, up_factor = 0.0f;

    RowTerms() = default;
    __device__ __forceinline__ RowTerms(const QuantizedProductWeight& weight, int column)
        : factor(weight.row_scale(column)) {
      const QuantizedCall& p = weight.share_.p;
      if (p.swiglu) up_factor = weight.row_scale(column + static_cast<int>(p.n));
    }
  };
  using Terms = std::conditional_t<kRowScales, RowTerms, NoTerms>;

  // The sums of a column, and of its up row, of element `index` of out.
  __device__ __forceinline__ void finish(const Terms& terms, int64_t index, float& sum,
                                         float& up) const {
    const QuantizedCall& p = share_.p;
    float factor = finish_, up_factor = finish_, bias = 0.0f, up_bias = 0.0f;
    if constexpr (kRowScales) factor *= terms.factor, up_factor *= terms.up_factor;
    if (p.bias != nullptr) {
      const T* const own = static_cast<const T*>(p.bias) + index % p.n;
      bias = to_f32(own[0]);
      if (p.swiglu) up_bias = to_f32(own[p.n]);
    }
    sum = fmaf(sum, factor, bias);
    up = fmaf(up, up_factor, up_bias);
  }

 private:
  static constexpr int kHalfStride = half_stride(kFamily);

  __device__ __forceinline__ static int lane() { return threadIdx.x % kWarpSize; }

  // Of a family one that has its codes where this call's has them, known to the compiler where all
  // are alike.
  __device__ __forceinline__ Encoding encoding() const {
    switch (kFamily) {
      case Family::kInt8:
        return Encoding::kInt8;
      case Family::kFp8:
        return Encoding::kFp8;
      case Family::kQ8_0:
        return Encoding::kQ8_0;
      case Family::kQ6_K:
        return Encoding::kQ6_K;
      case Family::kInt4:
        return share_.p.w.encoding;
      default:
        return Encoding::kNf4;
    }
  }

  // From where on this warp's block is in a half.
  __device__ __forceinline__ int block_offset() const {
    return warp_ / block_parts(encoding()) * share_.p.block_bytes;
  }

  __device__ __forceinline__ void make_scales(const char* stored, int row, int slab_row) const {
    float* const scale = shared_.scales[warp_][slab_row];
    const uint8_t* const scales = reinterpret_cast<const uint8_t*>(stored);
    if constexpr (kFamily == Family::kQ8_0) {
      *reinterpret_cast<float2*>(scale) = load_half_pair(scales + row * 4);
    } else if constexpr (kFamily == Family::kTable4) {
      const float absmax = nan_if_infinite(*reinterpret_cast<const float*>(scales + row * 4));
      *reinterpret_cast<float2*>(scale) = make_float2(absmax, absmax);
    } else if constexpr (kFamily == Family::kQ6_K) {
      const float d = nan_if_infinite(load_half(scales + 128 + row * 2));
      const char4 q = *reinterpret_cast<const char4*>(scales + part_ * 32 + row * 4);
      *reinterpret_cast<float4*>(scale) = make_float4(d * q.x, d * q.y, d * q.z, d * q.w);
    } else if constexpr (kFamily == Family::kInt4) {
      const QuantizedWeight& w = share_.p.w;
      float factor[2], doubled[2], offset[2];
      if constexpr (kInt8) {
        int4_terms(scales, row, factor, offset);
      } else if (w.encoding == Encoding::kQ4_K) {
        const float2 d = load_half_pair(scales + 96 + row * 4);
        const uint32_t pairs = q4_k_pairs(scales, part_, row);
#pragma unroll
        for (int g = 0; g < 2; ++g) {
          const float least = d.y * (pairs >> (12 * g + 6) & 63);
          const float scale_of_codes = d.x * (pairs >> 12 * g & 63);
          // All are minus the minimum where that is 0: next to it this is nothing, but has a sign.
          const float own = scale_of_codes == 0.0f ? 0x1p-40f * least : scale_of_codes;
          const float whole = whole_zero(least * reciprocal(own));
          const float rest = fmaf(-whole, own, least);
          doubled[g] = doubled_zero(whole, rest, own);
          factor[g] = own, offset[g] = fmaf(0.5f * doubled[g], own, -least);
        }
      } else if (w.encoding == Encoding::kQ4_0) {
        const float2 own = load_half_pair(scales + row * 4);
        factor[0] = own.x, factor[1] = own.y;
        doubled[0] = doubled[1] = 16.0f, offset[0] = offset[1] = 0.0f;
      } else {
        const uint8_t* const zeros = scales + share_.p.zeros;
#pragma unroll
        for (int g = 0; g < 2; ++g) {
          const int index = int4_scale_index(w.group, row, (part_ * 2 + g) >> (w.group >> 6));
          const float own = nan_if_infinite(plane_value(scales, w.scale, index));
          const float zero = plane_value(zeros, w.zero, index), whole = whole_zero(zero);
          doubled[g] = doubled_zero(whole, zero - whole, 1.0f);
          factor[g] = own, offset[g] = (0.5f * doubled[g] - zero) * own;
        }
      }
      *reinterpret_cast<float4*>(scale) = make_float4(factor[0], offset[0], factor[1], offset[1]);
      if constexpr (!kInt8) {
        *reinterpret_cast<uint2*>(shared_.zeros[warp_][slab_row]) =
            make_uint2(int4_zero<T>(doubled[0]), int4_zero<T>(doubled[1]));
      }
    }
  }
  // What 32 columns each multiply sums by, of signed codes and of x.
  __device__ __forceinline__ void int4_terms(const uint8_t* scales, int row, float (&factor)[2],
                                             float (&offset)[2]) const {
    constexpr float kUnit = signed_unit(kFamily);
    const QuantizedWeight& w = share_.p.w;
    if (w.encoding == Encoding::kQ4_K) {
      const float2 d = load_half_pair(scales + 96 + row * 4);
      const uint32_t pairs = q4_k_pairs(scales, part_, row);
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        factor[g] = d.x * (pairs >> 12 * g & 63);
        offset[g] = kUnit * (kSignedInt4Zero * factor[g] - d.y * (pairs >> (12 * g + 6) & 63));
      }
    } else if (w.encoding == Encoding::kQ4_0) {
      const float2 own = load_half_pair(scales + row * 4);
      factor[0] = own.x, factor[1] = own.y;
      offset[0] = offset[1] = 0.0f;
    } else {
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        const int index = int4_scale_index(w.group, row, (part_ * 2 + g) >> (w.group >> 6));
        factor[g] = nan_if_infinite(plane_value(scales, w.scale, index));
        const float zero = plane_value(scales + share_.p.zeros, w.zero, index);
        offset[g] = kUnit * (kSignedInt4Zero - zero) * factor[g];
      }
    }
  }

  // Of 32 columns of a row of the slab.
  using Scales = std::conditional_t<kFloats == 4, float2, float1>;
  __device__ __forceinline__ uint32_t zero_of(int row, int g) const {
    if constexpr (kOffsets) return shared_.zeros[warp_][row][g];
    return 0;
  }
  __device__ __forceinline__ Scales scales_of(int row, int g) const {
    if constexpr (kRowScales)
      return {};
    else
      return reinterpret_cast<const Scales*>(shared_.scales[warp_][row])[g];
  }

  __device__ __forceinline__ static void add_row_block(float (&sum)[4], const float (&part)[4],
                                                       float low, float high) {
    sum[0] = fmaf(part[0], low, sum[0]);
    sum[1] = fmaf(part[1], low, sum[1]);
    sum[2] = fmaf(part[2], high, sum[2]);
    sum[3] = fmaf(part[3], high, sum[3]);
  }
  __device__ __forceinline__ static void add(float (&sum)[kRowBlocks][4],
                                             const float (&part)[kRowBlocks][4], float low,
                                             float high) {
#pragma unroll
    for (int b = 0; b < kRowBlocks; ++b) add_row_block(sum[b], part[b], low, high);
  }

  // `row` of the slab is that of the low half.
  __device__ __forceinline__ void multiply_numbers(float (&sum)[kRowBlocks][4], const Words& x,
                                                   const Codes<T, kFamily>& low,
                                                   const Codes<T, kFamily>& high, int row) const {
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const Scales low_scale = scales_of(row, g), high_scale = scales_of(row + kHalfRows, g);
      float part_sum[kRowBlocks][4] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto multiply_by = [&](const uint32_t (&a)[4]) {
#pragma unroll
          for (int b = 0; b < kRowBlocks; ++b) {
            const uint4& words = x.x[b][g];
            mma_m16n8k16<T>(kRowScales ? sum[b] : part_sum[b], a, h == 0 ? words.x : words.z,
                            h == 0 ? words.y : words.w);
          }
        };
        if constexpr (kFamily == Family::kTable4) {
          const uint2 a[4] = {low.table_pair(g, h, 0, lookup_), high.table_pair(g, h, 0, lookup_),
                              low.table_pair(g, h, 1, lookup_), high.table_pair(g, h, 1, lookup_)};
          multiply_by({a[0].x, a[1].x, a[2].x, a[3].x});
          multiply_by({a[0].y, a[1].y, a[2].y, a[3].y});
        } else {
          const uint32_t low_zero = zero_of(row, g), high_zero = zero_of(row + kHalfRows, g);
          multiply_by({low.pair(g, h, 0, low_zero), high.pair(g, h, 0, high_zero),
                       low.pair(g, h, 1, low_zero), high.pair(g, h, 1, high_zero)});
        }
        if constexpr (kFamily == Family::kQ6_K) {
          add(sum, part_sum, h == 0 ? low_scale.x : low_scale.y,
              h == 0 ? high_scale.x : high_scale.y);
#pragma unroll
          for (auto& own : part_sum) own[0] = own[1] = own[2] = own[3] = 0.0f;
        }
      }
      if constexpr (kOffsets) {
        add(sum, part_sum, low_scale.x, high_scale.x);
#pragma unroll
        for (int b = 0; b < kRowBlocks; ++b) {
          const float2 two = shared_.x_sums[warp_][b][g][lane() % 4];
          const float x_sum[4] = {two.x, two.y, two.x, two.y};
          add_row_block(sum[b], x_sum, low_scale.y, high_scale.y);
        }
      } else if constexpr (kFloats == 2) {
        add(sum, part_sum, low_scale.x, high_scale.x);
      }
    }
  }

  __device__ __forceinline__ void multiply_integers(float (&sum)[kRowBlocks][4],
                                                    const Codes<T, kFamily>& low,
                                                    const Codes<T, kFamily>& high, int row) const {
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const uint32_t a[4] = {signed_codes(low, g, 0), signed_codes(high, g, 0),
                             signed_codes(low, g, 1), signed_codes(high, g, 1)};
      integers_.multiply(sum, a, g, share_.p.rows, scales_of(row, g),
                         scales_of(row + kHalfRows, g));
    }
  }

  // The table in 16 bits, scaled by a power of two as integers are, twice by twice. In float16 it
  // is made large, so that values far below the largest are normal numbers too: the second term of
  // others would be up to 2^-24 wrong, more than their rounding in that dtype.
  __device__ __forceinline__ void make_pairs() {
    const float own = share_.p.w.table[lane() % 16], largest = warp_max<16>(fabsf(own));
    // Neither zero nor infinity, nor a number whose reciprocal is none.
    const int exponent = __float_as_uint(largest) >> 23;
    const bool usual = exponent > 10 && exponent < 247;
    constexpr int kUp = std::is_same_v<T, __half> ? 10 : -6;
    const float shrink = usual ? __uint_as_float((254 + kUp - exponent) << 23) : 1.0f;
    finish_ = usual ? __uint_as_float((exponent - kUp) << 23) : 1.0f;
    const float2 terms = two_terms<T>(own * shrink);
    const auto value = [](float of_lane, int code) { return __shfl_sync(~0u, of_lane, code); };
#pragma unroll 1
    for (int i = threadIdx.x; i < kPairs * 8; i += kSlabThreads) {
      const int pair = i / 8;
      const float2 even = {value(terms.x, pair % 16), value(terms.y, pair % 16)};
      const float2 odd = {value(terms.x, pair / 16), value(terms.y, pair / 16)};
      const uint32_t first = pack_pair<T>(even.x, odd.x), second = pack_pair<T>(even.y, odd.y);
      reinterpret_cast<uint4*>(shared_.pairs[pair])[i % 8] =
          make_uint4(first, second, first, second);
    }
    lookup_ = shared_address(&shared_.pairs[0][lane() % 16]);
    __syncthreads();
  }

  __device__ __forceinline__ float row_scale(int row) const {
    const QuantizedCall& p = share_.p;
    // fp8's second scales are NaN where the row has one.
    const int64_t at = p.row_bytes + row % kEight * 4 + (kFamily == Family::kFp8 ? kEight * 4 : 0);
    const uint8_t* const eight = p.w.packed + row / kEight * p.eight_bytes;
    return nan_if_infinite(*reinterpret_cast<const float*>(eight + at));
  }

  const Share& share_;
  const int warp_ = warp_uniform(threadIdx.x / kWarpSize);
  QuantizedShared<kFamily>& shared_;
  const int part_;  // of the block that this warp's columns are
  const int own_offset_,
      scales_offset_;     // in a half: this lane's codes, scales of the warp's block
  const int short_tile_;  // which has one half
  bool present_ = false;  // this warp has columns in the chunk
  uint32_t lookup_ = 0;
  struct NoIntegers {
    static constexpr float kMargin = 1.0f;
  };
  using Integers = std::conditional_t<kInt8, Int8Rows<T, kFamily, kRowBlocks>, NoIntegers>;
  Integers integers_;
  float finish_ = kInt8 ? Integers::kMargin : kFinish<T, kFamily>;
};

}  // namespace mllama
