// quantize: weights to int8, fp8 and ggml's encodings.
//
// Threads    rows of int8 and fp8; sets of 16 sub-blocks of q4_k and q6_k, 16 blocks of q4_0 and
//            q8_0. Nothing depends on how they are divided.
// Search     quantize_math.h, with a lane per sub-block: no sum across lanes, so that every
//            instruction set gives the same bits.
// Precision  float32, each operation rounded by itself; q8_0 and q4_0 without importance are those
//            of the gguf package.
#include "../quantize.h"

#include "../quantize_math.h"
#include "common/dtypes.h"
#include "ops.h"

namespace mllama::MLLAMA_ISA {
namespace {

constexpr int kSet = 16;  // sub-blocks that are searched together

struct Machine {
  using V = FVec;
  static constexpr int kVecs = kSet / kLanes;

  MLLAMA_INLINE V min(V a, V b) {
#if defined(__AVX512F__)
    return (V)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (V)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
  }
  MLLAMA_INLINE V max(V a, V b) { return max_vec(a, b); }
  MLLAMA_INLINE V round(V x) { return round_nearest(x); }
  MLLAMA_INLINE V half(V x) { return round_to<F16>(x); }

  template <int kGroup, typename F>
  MLLAMA_INLINE void for_groups(V (&v)[kVecs], const F& merge) {
    float lanes[kSet];
    memcpy(lanes, v, sizeof(lanes));
    for (int begin = 0; begin < kSet; begin += kGroup) {
      float merged = lanes[begin];
      for (int i = 1; i < kGroup; ++i) merged = merge(merged, lanes[begin + i]);
      for (int i = 0; i < kGroup; ++i) lanes[begin + i] = merged;
    }
    memcpy(v, lanes, sizeof(lanes));
  }
  template <int kGroup>
  MLLAMA_INLINE void total(V (&v)[kVecs]) {
    for_groups<kGroup>(v, [](float a, float b) { return a + b; });
  }
  template <int kGroup>
  MLLAMA_INLINE void largest(V (&v)[kVecs]) {
    for_groups<kGroup>(v, [](float a, float b) { return b > a ? b : a; });
  }
};

void refuse(const QuantizeParams& p, int64_t index) {
  int64_t seen = __atomic_load_n(p.refused, __ATOMIC_RELAXED);
  while (index < seen && !__atomic_compare_exchange_n(p.refused, &seen, index, true,
                                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// `count` weights of a row in float32, with zeros behind up to a whole vector. What is refused is
// zero.
template <typename T>
void load_weights(const QuantizeParams& p, int64_t row, int64_t column, int64_t count, float* out) {
  const T* weight = static_cast<const T*>(p.weight) + row * p.row_stride + column;
  const float largest = largest_magnitude(p.encoding);
  IVec accepted = ~IVec{};
  for_vectors(count, [&](int64_t i, auto part) {
    const FVec x = load(weight + i, part);
    const IVec fits = (x <= largest) & (x >= -largest);  // NaN does not
    accepted &= fits;
    store(out + i, (FVec)((IVec)x & fits));
  });
  IVec all = ~IVec{};
  if (memcmp(&accepted, &all, sizeof(all)) == 0) return;
  int64_t i = 0;
  while (__builtin_fabsf(to_scalar(weight[i])) <= largest) ++i;
  refuse(p, row * p.k + column + i);
}

void put_half(uint8_t* out, float x) {
  const F16 half = from_scalar<F16>(x);
  memcpy(out, &half, 2);
}

// ---- sets of sub-blocks

// kBlock weights make a block, kSize of them a sub-block; a set has kSet sub-blocks.
template <int kBlock, int kSize, bool kWeighted>
struct Set {
  static constexpr int kBlocks = kSet * kSize / kBlock;
  using Search = SubBlocks<Machine, kSize, kWeighted>;

  FVec x[kSize][Machine::kVecs];
  FVec importance[kWeighted ? kSize : 1][Machine::kVecs];

  Search search() const { return {x, importance}; }

  // Blocks first .. first + count, counted along rows; the set's other lanes are zero.
  template <typename T>
  void fill(const QuantizeParams& p, int64_t first, int64_t count) {
    const int64_t per_row = p.k / kBlock;
    for (int64_t n = 0; n < kBlocks; ++n) {
      float row[kBlock] = {}, weights[kBlock];
      for (float& weight : weights) weight = 1;
      if (n < count) {
        const int64_t column = (first + n) % per_row * kBlock;
        load_weights<T>(p, (first + n) / per_row, column, kBlock, row);
        if (kWeighted) memcpy(weights, p.importance + column, sizeof(weights));
      }
      spread(row, n, x);
      if constexpr (kWeighted) spread(weights, n, importance);
    }
  }

 private:
  static void spread(const float* block, int64_t n, FVec (&lanes)[kSize][Machine::kVecs]) {
    constexpr int kParts = kBlock / kSize;
    float* out = reinterpret_cast<float*>(&lanes[0][0]) + n * kParts;
    for (int i = 0; i < kSize; ++i) {
      for (int part = 0; part < kParts; ++part) out[i * kSet + part] = block[part * kSize + i];
    }
  }
};

// codes[i][lane]: round((x + minimum) / scale) from kLow to kHigh, less kLow.
template <int kLow, int kHigh, typename Search, int kSize>
void encode(const Search& b, const FVec (&scale)[Machine::kVecs],
            const FVec (&minimum)[Machine::kVecs], uint8_t (&codes)[kSize][kSet]) {
  for (int v = 0; v < Machine::kVecs; ++v) {
    const FVec inverse = inverse_or_zero(scale[v]);
    for (int i = 0; i < kSize; ++i) {
      const FVec q = code<kLow, kHigh, Machine>((b.x[i][v] + minimum[v]) * inverse);
      const IVec whole = __builtin_convertvector(q, IVec) - kLow;
      for (int lane = 0; lane < kLanes; ++lane)
        codes[i][v * kLanes + lane] = static_cast<uint8_t>(whole[lane]);
    }
  }
}

MLLAMA_INLINE float lane(const FVec (&v)[Machine::kVecs], int i) {
  return v[i / kLanes][i % kLanes];
}

template <bool kWeighted>
void encode_q4_k(const Set<256, 32, kWeighted>& set, int64_t count, uint8_t* out) {
  const auto b = set.search();
  const Q4KScales<Machine> s = search_q4_k<Machine>(b);
  FVec scale[Machine::kVecs], minimum[Machine::kVecs];
  for (int v = 0; v < Machine::kVecs; ++v) {
    scale[v] = s.d[v] * s.c[v];
    minimum[v] = s.e[v] * s.m[v];
  }
  uint8_t codes[32][kSet];
  encode<0, 15>(b, scale, minimum, codes);
  for (int64_t n = 0; n < count; ++n, out += 144) {
    const int first = static_cast<int>(n) * 8;
    put_half(out, lane(s.d, first));
    put_half(out + 2, lane(s.e, first));
    uint8_t c[8], m[8];
    for (int j = 0; j < 8; ++j) {
      c[j] = static_cast<uint8_t>(lane(s.c, first + j));
      m[j] = static_cast<uint8_t>(lane(s.m, first + j));
    }
    for (int j = 0; j < 4; ++j) {
      out[4 + j] = static_cast<uint8_t>(c[j] | c[j + 4] >> 4 << 6);
      out[8 + j] = static_cast<uint8_t>(m[j] | m[j + 4] >> 4 << 6);
      out[12 + j] = static_cast<uint8_t>((c[j + 4] & 15) | (m[j + 4] & 15) << 4);
    }
    for (int j = 0; j < 8; j += 2) {
      for (int i = 0; i < 32; ++i)
        out[16 + 16 * j + i] =
            static_cast<uint8_t>(codes[i][first + j] | codes[i][first + j + 1] << 4);
    }
  }
}

template <bool kWeighted>
void encode_q6_k(const Set<256, 16, kWeighted>& set, int64_t, uint8_t* out) {
  const auto b = set.search();
  const Q6KScales<Machine> s = search_q6_k<Machine>(b);
  FVec scale[Machine::kVecs], none[Machine::kVecs] = {};
  for (int v = 0; v < Machine::kVecs; ++v) scale[v] = s.d[v] * s.c[v];
  uint8_t codes[16][kSet];
  encode<-32, 31>(b, scale, none, codes);
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 32; ++i) {
      uint8_t q[4];
      for (int g = 0; g < 4; ++g) q[g] = codes[i % 16][8 * half + 2 * g + i / 16];
      out[64 * half + i] = static_cast<uint8_t>((q[0] & 15) | (q[2] & 15) << 4);
      out[64 * half + 32 + i] = static_cast<uint8_t>((q[1] & 15) | (q[3] & 15) << 4);
      out[128 + 32 * half + i] =
          static_cast<uint8_t>(q[0] >> 4 | q[1] >> 4 << 2 | q[2] >> 4 << 4 | q[3] >> 4 << 6);
    }
  }
  for (int j = 0; j < 16; ++j)
    out[192 + j] = static_cast<uint8_t>(static_cast<int8_t>(lane(s.c, j)));
  put_half(out + 208, lane(s.d, 0));
}

void encode_q4_0_weighted(const Set<32, 32, true>& set, int64_t count, uint8_t* out) {
  const auto b = set.search();
  FVec scale[Machine::kVecs], none[Machine::kVecs] = {};
  for (int v = 0; v < Machine::kVecs; ++v) scale[v] = search_q4_0<Machine>(b, v);
  uint8_t codes[32][kSet];
  encode<-8, 7>(b, scale, none, codes);
  for (int n = 0; n < count; ++n, out += 18) {
    put_half(out, lane(scale, n));
    for (int i = 0; i < 16; ++i)
      out[2 + i] = static_cast<uint8_t>(codes[i][n] | codes[16 + i][n] << 4);
  }
}

template <typename T, int kBlock, int kSize, bool kWeighted, typename F>
void for_sets(const QuantizeParams& p, const F& encode) {
  using Blocks = Set<kBlock, kSize, kWeighted>;
  const int64_t blocks = p.rows * (p.k / kBlock), bytes = ggml_block_bytes(p.encoding);
  const int64_t sets = ceil_div<int64_t>(blocks, Blocks::kBlocks);
  parallel_for(0, sets, kGrainElements / (kSet * kSize), [&](int64_t begin, int64_t end) {
    Blocks set;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * Blocks::kBlocks;
      const int64_t count = min<int64_t>(Blocks::kBlocks, blocks - first);
      set.template fill<T>(p, first, count);
      encode(set, count, p.data + first * bytes);
    }
  });
}

// ---- blocks of 32, as the gguf package makes them

void encode_q8_0(const float* x, uint8_t* out) {
  float largest = 0;
  for (int i = 0; i < 32; ++i) largest = max(largest, __builtin_fabsf(x[i]));
  const float d = largest / 127, inverse = 1 / d;
  put_half(out, d);
  const bool usable = d != 0 && __builtin_isfinite(inverse);
  for (int i = 0; i < 32; ++i) {
    // Halves go away from zero.
    const float scaled = usable ? x[i] * inverse : 0.0f;
    const float magnitude = __builtin_fabsf(scaled);
    const float whole = static_cast<float>(static_cast<int32_t>(magnitude));
    const int32_t q = static_cast<int32_t>(whole) + (2 * (magnitude - whole) >= 1 ? 1 : 0);
    out[2 + i] = static_cast<uint8_t>(scaled < 0 ? -q : q);
  }
}

void encode_q4_0(const float* x, uint8_t* out) {
  float largest = x[0];
  for (int i = 1; i < 32; ++i)
    largest = __builtin_fabsf(x[i]) > __builtin_fabsf(largest) ? x[i] : largest;
  const float d = largest / -8, inverse = 1 / d;
  put_half(out, d);
  const bool usable = d != 0 && __builtin_isfinite(inverse);
  int32_t q[32];
  for (int i = 0; i < 32; ++i)
    q[i] = min<int32_t>(15, static_cast<int32_t>((usable ? x[i] * inverse : 0.0f) + 8.5f));
  for (int i = 0; i < 16; ++i) out[2 + i] = static_cast<uint8_t>(q[i] | q[16 + i] << 4);
}

template <typename T, typename F>
void for_blocks(const QuantizeParams& p, const F& encode) {
  const int64_t per_row = p.k / 32, bytes = ggml_block_bytes(p.encoding);
  parallel_for(0, p.rows * per_row, kGrainElements / 32, [&](int64_t begin, int64_t end) {
    float x[32];
    for (int64_t i = begin; i < end; ++i) {
      load_weights<T>(p, i / per_row, i % per_row * 32, 32, x);
      encode(x, p.data + i * bytes);
    }
  });
}

// ---- int8 and fp8: a scale per row

struct Int8 {
  static constexpr float kLargest = 127;
  static IVec bits(FVec x) { return __builtin_convertvector(round_nearest(x), IVec) & 0xff; }
};

struct Fp8 {
  static constexpr float kLargest = 448;
  // Of |x| <= 448, to nearest even: three bits of mantissa, or the last place of subnormals, 2^-9.
  static IVec bits(FVec x) {
    const UVec u = (UVec)x, sign = (u >> 24) & 0x80, magnitude = u & 0x7fffffff;
    const UVec subnormal = (UVec)((FVec)magnitude + splat(0x1p14f)) - 0x46800000u;
    const UVec normal = (magnitude - (120u << 23) + 0x7ffff + ((magnitude >> 20) & 1)) >> 20;
    return (IVec)((magnitude < (UVec{} + 0x3c800000u) ? subnormal : normal) | sign);
  }
};

template <typename T, typename Code>
void quantize_row(const QuantizeParams& p, int64_t row) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  constexpr int64_t kChunk = 256;
  float x[kChunk];
  FVec largest = {};
  for (int64_t column = 0; column < p.k; column += kChunk) {
    const int64_t count = min(kChunk, p.k - column);
    load_weights<T>(p, row, column, count, x);
    for (int64_t i = 0; i < count; i += kLanes) {
      largest = max_vec(largest, (FVec)((UVec)load(x + i) & 0x7fffffff));
    }
  }
  const float scale = max_lanes(largest) / Code::kLargest;
  p.scale[row] = scale;
  for (int64_t column = 0; column < p.k; column += kChunk) {
    const int64_t count = min(kChunk, p.k - column);
    load_weights<T>(p, row, column, count, x);
    for (int64_t i = 0; i < count; i += kLanes) {
      const FVec scaled = scale == 0 ? FVec{} : clamp(load(x + i) / scale, Code::kLargest);
      const Bytes bytes = __builtin_convertvector(Code::bits(scaled), Bytes);
      memcpy(p.data + row * p.k + column + i, &bytes, min<int64_t>(kLanes, count - i));
    }
  }
}

template <typename T, typename Code>
void quantize_rows(const QuantizeParams& p) {
  parallel_for(0, p.rows, row_grain(p.k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) quantize_row<T, Code>(p, row);
  });
}

template <typename T>
void run(const QuantizeParams& p) {
  const bool weighted = p.importance != nullptr;
  switch (p.encoding) {
    case Encoding::kQ4_K:
      return weighted ? for_sets<T, 256, 32, true>(p, encode_q4_k<true>)
                      : for_sets<T, 256, 32, false>(p, encode_q4_k<false>);
    case Encoding::kQ6_K:
      return weighted ? for_sets<T, 256, 16, true>(p, encode_q6_k<true>)
                      : for_sets<T, 256, 16, false>(p, encode_q6_k<false>);
    case Encoding::kQ4_0:
      return weighted ? for_sets<T, 32, 32, true>(p, encode_q4_0_weighted)
                      : for_blocks<T>(p, encode_q4_0);
    case Encoding::kQ8_0:
      return for_blocks<T>(p, encode_q8_0);
    case Encoding::kInt8:
      return quantize_rows<T, Int8>(p);
    case Encoding::kFp8:
      return quantize_rows<T, Fp8>(p);
    default:
      return;  // the caller has refused the others
  }
}

}  // namespace

void quantize(const QuantizeParams& p) {
  if (p.rows * p.k == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return run<float>(p);
    case DType::kFloat16:
      return run<F16>(p);
    case DType::kBFloat16:
      return run<BF16>(p);
    case DType::kFloat64:
      return;  // refused by the caller
  }
}

}  // namespace mllama::MLLAMA_ISA
