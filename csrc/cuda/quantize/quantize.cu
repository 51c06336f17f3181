// quantize: weights to int8, fp8 and ggml's encodings.
//
// Tiling     q4_k, q6_k, weighted q4_0: a thread searches a sub-block, whose weights it keeps in
//            registers (quantize_math.h); a warp has 32 of them, read and written through shared
//            memory. q8_0, q4_0: a warp per block of 32. int8, fp8: a thread block per row.
// Precision  float32, each operation rounded by itself (setup.py turns contraction off): the bits
//            of the CPU.
// Traffic    the weight once (int8 and fp8 twice, the second time from L2), the parts once. The
//            searches are bound by arithmetic, about 1000 operations per weight.
// Aliasing   the parts may not overlap the weight. Rows of the weight may be strided.

#include "../../quantize.h"
#include "../../quantize_math.h"
#include "../common/launch.h"
#include "../common/vec.cuh"

namespace mllama {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kRowThreads = 256;

struct Machine {
  using V = float;
  static constexpr int kVecs = 1;

  MLLAMA_SEARCH float min(float a, float b) { return fminf(a, b); }
  MLLAMA_SEARCH float max(float a, float b) { return fmaxf(a, b); }
  MLLAMA_SEARCH float round(float x) { return rintf(x); }
  MLLAMA_SEARCH float half(float x) { return __half2float(__float2half_rn(x)); }

  template <int kGroup, typename F>
  MLLAMA_SEARCH void merge(float (&v)[1], const F& f) {
    const int first = threadIdx.x % 32 / kGroup * kGroup;
    float merged = __shfl_sync(~0u, v[0], first);
    for (int i = 1; i < kGroup; ++i) merged = f(merged, __shfl_sync(~0u, v[0], first + i));
    v[0] = merged;
  }
  template <int kGroup>
  MLLAMA_SEARCH void total(float (&v)[1]) {
    merge<kGroup>(v, [](float a, float b) { return a + b; });
  }
  template <int kGroup>
  MLLAMA_SEARCH void largest(float (&v)[1]) {
    merge<kGroup>(v, [](float a, float b) { return b > a ? b : a; });
  }
};

// One weight; zero where it is refused.
template <Encoding kEncoding>
__device__ __forceinline__ float load_weight(const QuantizeParams& p, int64_t row, int64_t column) {
  const int64_t at = row * p.row_stride + column;
  float x;
  if (p.dtype == DType::kFloat32) {
    x = static_cast<const float*>(p.weight)[at];
  } else if (p.dtype == DType::kFloat16) {
    x = to_f32(static_cast<const __half*>(p.weight)[at]);
  } else {
    x = to_f32(static_cast<const __nv_bfloat16*>(p.weight)[at]);
  }
  if (fabsf(x) <= largest_magnitude(kEncoding)) return x;
  atomicMin(reinterpret_cast<unsigned long long*>(p.refused),
            static_cast<unsigned long long>(row * p.k + column));
  return 0.0f;
}

__device__ __forceinline__ void put_half(uint8_t* out, float x) {
  *reinterpret_cast<uint16_t*>(out) = __half_as_ushort(__float2half_rn(x));
}

// The codes of a sub-block, less the lowest, four to a word.
template <int kLow, int kHigh, int kSize>
__device__ __forceinline__ void encode(const float (&x)[kSize][1], float minimum, float inverse,
                                       uint32_t* words) {
#pragma unroll
  for (int i = 0; i < kSize; i += 4) {
    uint32_t word = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float q = code<kLow, kHigh, Machine>((x[i + e][0] + minimum) * inverse);
      word |= static_cast<uint32_t>(static_cast<int>(q) - kLow) << 8 * e;
    }
    words[i / 4] = word;
  }
}

// ---- searches

// kBlock weights make a block, kSize of them a sub-block, of which a warp has 32.
template <Encoding kEncoding>
struct Shape {
  static constexpr int kSize = kEncoding == Encoding::kQ6_K ? 16 : 32;
  static constexpr int kBlock = static_cast<int>(ggml_block(kEncoding));
  static constexpr int kBytes = static_cast<int>(ggml_block_bytes(kEncoding));
  static constexpr int kParts = kBlock / kSize;
  static constexpr int kBlocks = 32 / kParts;
};

// Everything is placed so that no two lanes of an access want different words of one bank.
template <Encoding kEncoding>
struct WarpMemory {
  using S = Shape<kEncoding>;
  // From a block's bytes to the next one's.
  static constexpr int kOutBytes = kEncoding == Encoding::kQ4_K   ? 160
                                   : kEncoding == Encoding::kQ4_0 ? 20
                                                                  : S::kBytes;
  static_assert(S::kBytes % 2 == 0 && kOutBytes % 2 == 0, "copied by two bytes");

  float values[32 * S::kSize];
  // Of each sub-block, less the lowest code, four to a word, and a word between sub-blocks.
  uint32_t codes[32][S::kSize / 4 + 1];
  alignas(4) uint8_t out[S::kBlocks * kOutBytes];

  // Where values has weight i of a sub-block: a warp writes sub-blocks one after the other, and
  // reads a weight of each.
  __device__ __forceinline__ static int place(int sub_block, int i) {
    return sub_block * S::kSize + (i ^ sub_block / (32 / S::kSize));
  }
};

// Codes of the sub-blocks of a block, and scales, in ggml's order: each of the block's threads has
// its own share of the bytes.
template <int kWords>
__device__ __forceinline__ void pack_q4_k(const Q4KScales<Machine>& s,
                                          const uint32_t (*codes)[kWords], uint8_t* out) {
  const int j = threadIdx.x % 8, first = threadIdx.x % 32 - j;
  const int c = static_cast<int>(s.c[0]), m = static_cast<int>(s.m[0]);
  const int far_c = __shfl_sync(~0u, c, first + (j + 4) % 8);
  const int far_m = __shfl_sync(~0u, m, first + (j + 4) % 8);
  if (j == 0) {
    put_half(out, s.d[0]);
    put_half(out + 2, s.e[0]);
  }
  if (j < 4) {
    out[4 + j] = static_cast<uint8_t>(c | far_c >> 4 << 6);
    out[8 + j] = static_cast<uint8_t>(m | far_m >> 4 << 6);
    out[12 + j] = static_cast<uint8_t>((far_c & 15) | (far_m & 15) << 4);
  }
  // Columns 4 j to + 3 of each two sub-blocks share four bytes.
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    reinterpret_cast<uint32_t*>(out + 16)[pair * 8 + j] =
        codes[2 * pair][j] | codes[2 * pair + 1][j] << 4;
  }
}

template <int kWords>
__device__ __forceinline__ void pack_q6_k(const Q6KScales<Machine>& s,
                                          const uint32_t (*codes)[kWords], uint8_t* out) {
  const int j = threadIdx.x % 16;
  const auto put = [&](int byte, uint32_t two) {
    *reinterpret_cast<uint16_t*>(out + byte) = static_cast<uint16_t>(two);
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t two[4];  // codes of columns 2 j and + 1 of each 32
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const uint32_t* const sub_block = codes[8 * half + 2 * g + j / 8];
      two[g] = reinterpret_cast<const uint16_t*>(sub_block)[j % 8];
    }
    put(64 * half + 2 * j, (two[0] & 0x0f0f) | (two[2] & 0x0f0f) << 4);
    put(64 * half + 32 + 2 * j, (two[1] & 0x0f0f) | (two[3] & 0x0f0f) << 4);
    uint32_t high = 0;
#pragma unroll
    for (int g = 0; g < 4; ++g) high |= (two[g] >> 4 & 0x0303) << 2 * g;
    put(128 + 32 * half + 2 * j, high);
  }
  out[192 + j] = static_cast<uint8_t>(static_cast<int>(s.c[0]));
  if (j == 0) put_half(out + 208, s.d[0]);
}

// A thread has a whole block.
__device__ __forceinline__ void pack_q4_0(float d, const uint32_t* codes, uint8_t* out) {
  put_half(out, d);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t four = codes[i] | codes[i + 4] << 4;
    reinterpret_cast<uint16_t*>(out)[1 + 2 * i] = static_cast<uint16_t>(four);
    reinterpret_cast<uint16_t*>(out)[2 + 2 * i] = static_cast<uint16_t>(four >> 16);
  }
}

template <Encoding kEncoding, bool kWeighted>
__global__ void __launch_bounds__(kThreads) search_kernel(const QuantizeParams p) {
  using S = Shape<kEncoding>;
  __shared__ WarpMemory<kEncoding> memory[kWarps];
  WarpMemory<kEncoding>& own = memory[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  const int64_t per_row = p.k / S::kBlock, blocks = p.rows * per_row;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32) * S::kBlocks;
  if (first >= blocks) return;  // the whole warp
  // What `of` says of each row and column of the warp's blocks, `beyond` for those there are not,
  // to the threads of the sub-blocks.
  const auto distribute = [&](float (&values)[S::kSize][1], float beyond, const auto& of) {
    __syncwarp();
#pragma unroll 4
    for (int i = lane; i < 32 * S::kSize; i += 32) {
      const int64_t block = first + i / S::kBlock;
      own.values[own.place(i / S::kSize, i % S::kSize)] =
          block < blocks ? of(block / per_row, block % per_row * S::kBlock + i % S::kBlock)
                         : beyond;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < S::kSize; ++i) values[i][0] = own.values[own.place(lane, i)];
  };
  float x[S::kSize][1], importance[kWeighted ? S::kSize : 1][1];
  distribute(x, 0.0f,
             [&](int64_t row, int64_t column) { return load_weight<kEncoding>(p, row, column); });
  if constexpr (kWeighted) {
    distribute(importance, 1.0f, [&](int64_t, int64_t column) { return p.importance[column]; });
  }
  const SubBlocks<Machine, S::kSize, kWeighted> b{x, importance};
  const int block = lane / S::kParts;
  uint8_t* const out = own.out + block * own.kOutBytes;
  if constexpr (kEncoding == Encoding::kQ4_K) {
    const Q4KScales<Machine> s = search_q4_k<Machine>(b);
    const float inverse = inverse_or_zero(s.d[0] * s.c[0]), minimum = s.e[0] * s.m[0];
    encode<0, 15>(x, minimum, inverse, own.codes[lane]);
    __syncwarp();
    pack_q4_k(s, own.codes + block * S::kParts, out);
  } else if constexpr (kEncoding == Encoding::kQ6_K) {
    const Q6KScales<Machine> s = search_q6_k<Machine>(b);
    const float inverse = inverse_or_zero(s.d[0] * s.c[0]);
    encode<-32, 31>(x, 0.0f, inverse, own.codes[lane]);
    __syncwarp();
    pack_q6_k(s, own.codes + block * S::kParts, out);
  } else {
    const float d = search_q4_0<Machine>(b, 0), inverse = inverse_or_zero(d);
    encode<-8, 7>(x, 0.0f, inverse, own.codes[lane]);
    pack_q4_0(d, own.codes[lane], out);
  }
  __syncwarp();
  constexpr int kHalves = S::kBytes / 2;  // of two bytes
  const int halves = static_cast<int>(min(blocks - first, int64_t{S::kBlocks})) * kHalves;
  uint16_t* const target = reinterpret_cast<uint16_t*>(p.data + first * S::kBytes);
  for (int i = lane; i < halves; i += 32) {
    const uint8_t* const from = own.out + i / kHalves * own.kOutBytes + i % kHalves * 2;
    target[i] = *reinterpret_cast<const uint16_t*>(from);
  }
}

// ---- blocks of 32, as the gguf package makes them

template <Encoding kEncoding>
__global__ void __launch_bounds__(kThreads) block_kernel(const QuantizeParams p) {
  const int lane = threadIdx.x % 32;
  const int64_t per_row = p.k / 32;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (block >= p.rows * per_row) return;
  const float x = load_weight<kEncoding>(p, block / per_row, block % per_row * 32 + lane);
  // The first of the largest magnitude.
  float largest = x;
  int place = lane;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(~0u, largest, step);
    const int other_place = __shfl_xor_sync(~0u, place, step);
    const bool replaces =
        fabsf(other) > fabsf(largest) || (fabsf(other) == fabsf(largest) && other_place < place);
    largest = replaces ? other : largest;
    place = replaces ? other_place : place;
  }
  constexpr bool kIsQ8_0 = kEncoding == Encoding::kQ8_0;
  const float d = kIsQ8_0 ? fabsf(largest) / 127.0f : largest / -8.0f, inverse = 1.0f / d;
  const float scaled = d != 0.0f && fabsf(inverse) <= 0x1.fffffep127f ? x * inverse : 0.0f;
  uint8_t* out = p.data + block * ggml_block_bytes(kEncoding);
  if (lane == 0) put_half(out, d);
  if (kIsQ8_0) {
    const float magnitude = fabsf(scaled), whole = floorf(magnitude);
    const int q = static_cast<int>(whole) + (2.0f * (magnitude - whole) >= 1.0f ? 1 : 0);
    out[2 + lane] = static_cast<uint8_t>(scaled < 0.0f ? -q : q);
    return;
  }
  const int q = min(15, static_cast<int>(scaled + 8.5f));
  const int high = __shfl_down_sync(~0u, q, 16);
  if (lane < 16) out[2 + lane] = static_cast<uint8_t>(q | high << 4);
}

// ---- int8 and fp8: a scale per row

// Of |x| <= 448, to nearest even: three bits of mantissa, or the last place of subnormals, 2^-9.
__device__ __forceinline__ uint8_t to_e4m3(float x) {
  const unsigned u = __float_as_uint(x), sign = u >> 24 & 0x80, magnitude = u & 0x7fffffff;
  if (magnitude < 0x3c800000u)
    return static_cast<uint8_t>(
        __float_as_uint(__uint_as_float(magnitude) + 0x1p14f) - 0x46800000u | sign);
  return static_cast<uint8_t>((magnitude - (120u << 23) + 0x7ffff + (magnitude >> 20 & 1)) >> 20 |
                              sign);
}

template <Encoding kEncoding>
__global__ void __launch_bounds__(kRowThreads) row_kernel(const QuantizeParams p) {
  __shared__ float of_warps[kRowThreads / 32];
  const int64_t row = blockIdx.x;
  float largest = 0.0f;
  for (int64_t i = threadIdx.x; i < p.k; i += kRowThreads)
    largest = fmaxf(largest, fabsf(load_weight<kEncoding>(p, row, i)));
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;
  __syncthreads();
  for (const float other : of_warps) largest = fmaxf(largest, other);
  constexpr bool kIsInt8 = kEncoding == Encoding::kInt8;
  constexpr float kBound = kIsInt8 ? 127.0f : 448.0f;
  const float scale = largest / kBound;
  if (threadIdx.x == 0) p.scale[row] = scale;
  for (int64_t i = threadIdx.x; i < p.k; i += kRowThreads) {
    const float scaled = scale == 0.0f ? 0.0f : load_weight<kEncoding>(p, row, i) / scale;
    const float q = fminf(fmaxf(scaled, -kBound), kBound);
    p.data[row * p.k + i] = kIsInt8 ? static_cast<uint8_t>(static_cast<int>(rintf(q))) : to_e4m3(q);
  }
}

template <Encoding kEncoding, bool kWeighted>
cudaError_t launch_search(const QuantizeParams& p, cudaStream_t stream) {
  const int64_t blocks = p.rows * p.k / Shape<kEncoding>::kBlock;
  const int64_t grid = ceil_div<int64_t>(blocks, kWarps * Shape<kEncoding>::kBlocks);
  return launch(search_kernel<kEncoding, kWeighted>, grid, kThreads, 0, stream, {}, p);
}

template <Encoding kEncoding>
cudaError_t launch_blocks(const QuantizeParams& p, cudaStream_t stream) {
  const int64_t grid = ceil_div<int64_t>(p.rows * p.k / 32, kWarps);
  return launch(block_kernel<kEncoding>, grid, kThreads, 0, stream, {}, p);
}

template <Encoding kEncoding>
cudaError_t launch_rows(const QuantizeParams& p, cudaStream_t stream) {
  return launch(row_kernel<kEncoding>, p.rows, kRowThreads, 0, stream, {}, p);
}

}  // namespace

int quantize_cuda(const QuantizeParams& p, CUstream_st* stream) {
  const bool weighted = p.importance != nullptr;
  switch (p.encoding) {
    case Encoding::kQ4_K:
      return weighted ? launch_search<Encoding::kQ4_K, true>(p, stream)
                      : launch_search<Encoding::kQ4_K, false>(p, stream);
    case Encoding::kQ6_K:
      return weighted ? launch_search<Encoding::kQ6_K, true>(p, stream)
                      : launch_search<Encoding::kQ6_K, false>(p, stream);
    case Encoding::kQ4_0:
      return weighted ? launch_search<Encoding::kQ4_0, true>(p, stream)
                      : launch_blocks<Encoding::kQ4_0>(p, stream);
    case Encoding::kQ8_0:
      return launch_blocks<Encoding::kQ8_0>(p, stream);
    case Encoding::kInt8:
      return launch_rows<Encoding::kInt8>(p, stream);
    case Encoding::kFp8:
      return launch_rows<Encoding::kFp8>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace mllama
