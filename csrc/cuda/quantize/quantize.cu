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
  const unsigned bits = __half_as_ushort(__float2half_rn(x));
  out[0] = static_cast<uint8_t>(bits);
  out[1] = static_cast<uint8_t>(bits >> 8);
}

template <int kLow, int kHigh>
__device__ __forceinline__ uint8_t encode(float x, float minimum, float inverse) {
  const float q = code<kLow, kHigh, Machine>((x + minimum) * inverse);
  return static_cast<uint8_t>(static_cast<int>(q) - kLow);
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

template <Encoding kEncoding>
struct WarpMemory {
  using S = Shape<kEncoding>;
  float x[32][S::kSize + 1];     // of each sub-block; padded, so that columns have their banks
  uint8_t codes[32 * S::kSize];  // less the lowest code
  uint8_t out[S::kBlocks * S::kBytes];
};

// Codes of the sub-blocks of this warp, and scales, in ggml's order: each thread writes those bytes
// of its block whose place is its own among the kParts threads of the block.
__device__ __forceinline__ void pack_q4_k(const Q4KScales<Machine>& s, const uint8_t* codes,
                                          uint8_t* out) {
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
  for (int i = j; i < 128; i += 8) {
    const int at = i / 32 * 64 + i % 32;
    out[16 + i] = static_cast<uint8_t>(codes[at] | codes[at + 32] << 4);
  }
}

__device__ __forceinline__ void pack_q6_k(const Q6KScales<Machine>& s, const uint8_t* codes,
                                          uint8_t* out) {
  const int j = threadIdx.x % 16;
  for (int i = j; i < 64; i += 16) {
    const int half = i / 32, e = i % 32;
    const uint8_t* q = codes + 128 * half + e;
    out[64 * half + e] = static_cast<uint8_t>((q[0] & 15) | (q[64] & 15) << 4);
    out[64 * half + 32 + e] = static_cast<uint8_t>((q[32] & 15) | (q[96] & 15) << 4);
    out[128 + 32 * half + e] =
        static_cast<uint8_t>(q[0] >> 4 | q[32] >> 4 << 2 | q[64] >> 4 << 4 | q[96] >> 4 << 6);
  }
  out[192 + j] = static_cast<uint8_t>(static_cast<int>(s.c[0]));
  if (j == 0) put_half(out + 208, s.d[0]);
}

__device__ __forceinline__ void pack_q4_0(float d, const uint8_t* codes, uint8_t* out) {
  put_half(out, d);
  for (int i = 0; i < 16; ++i) out[2 + i] = static_cast<uint8_t>(codes[i] | codes[16 + i] << 4);
}

template <Encoding kEncoding, bool kWeighted>
__global__ void __launch_bounds__(kThreads) search_kernel(const QuantizeParams p) {
  using S = Shape<kEncoding>;
  __shared__ WarpMemory<kEncoding> memory[kWarps];
  WarpMemory<kEncoding>& own = memory[threadIdx.x / 32];
  const int lane = threadIdx.x % 32, part = lane % S::kParts;
  const int64_t per_row = p.k / S::kBlock, blocks = p.rows * per_row;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32) * S::kBlocks;
  if (first >= blocks) return;  // the whole warp
  for (int i = lane; i < 32 * S::kSize; i += 32) {
    const int64_t block = first + i / S::kBlock;
    float x = 0.0f;
    if (block < blocks)
      x = load_weight<kEncoding>(p, block / per_row, block % per_row * S::kBlock + i % S::kBlock);
    own.x[i / S::kSize][i % S::kSize] = x;
  }
  __syncwarp();
  float x[S::kSize][1], importance[kWeighted ? S::kSize : 1][1];
  const int64_t mine = first + lane / S::kParts;
  const bool is_block = mine < blocks;
#pragma unroll
  for (int i = 0; i < S::kSize; ++i) {
    x[i][0] = own.x[lane][i];
    if constexpr (kWeighted)
      importance[i][0] =
          is_block ? p.importance[mine % per_row * S::kBlock + part * S::kSize + i] : 1.0f;
  }
  const SubBlocks<Machine, S::kSize, kWeighted> b{x, importance};
  uint8_t* codes = own.codes + lane * S::kSize;
  uint8_t* block_codes = own.codes + lane / S::kParts * S::kBlock;
  uint8_t* block_out = own.out + lane / S::kParts * S::kBytes;
  if constexpr (kEncoding == Encoding::kQ4_K) {
    const Q4KScales<Machine> s = search_q4_k<Machine>(b);
    const float inverse = inverse_or_zero(s.d[0] * s.c[0]), minimum = s.e[0] * s.m[0];
#pragma unroll
    for (int i = 0; i < S::kSize; ++i) codes[i] = encode<0, 15>(x[i][0], minimum, inverse);
    __syncwarp();
    pack_q4_k(s, block_codes, block_out);
  } else if constexpr (kEncoding == Encoding::kQ6_K) {
    const Q6KScales<Machine> s = search_q6_k<Machine>(b);
    const float inverse = inverse_or_zero(s.d[0] * s.c[0]);
#pragma unroll
    for (int i = 0; i < S::kSize; ++i) codes[i] = encode<-32, 31>(x[i][0], 0.0f, inverse);
    __syncwarp();
    pack_q6_k(s, block_codes, block_out);
  } else {
    const float d = search_q4_0<Machine>(b, 0), inverse = inverse_or_zero(d);
#pragma unroll
    for (int i = 0; i < S::kSize; ++i) codes[i] = encode<-8, 7>(x[i][0], 0.0f, inverse);
    pack_q4_0(d, codes, block_out);
  }
  __syncwarp();
  const int64_t left = (blocks - first) * S::kBytes;
  const int bytes = left < S::kBlocks * S::kBytes ? static_cast<int>(left) : S::kBlocks * S::kBytes;
  for (int i = lane; i < bytes; i += 32) p.data[first * S::kBytes + i] = own.out[i];
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
