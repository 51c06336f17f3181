// Query rows of one thread block: where they are, what happens to them on the way into shared
// memory (nothing, RMSNorm, rotary embedding), and where their results go.
#pragma once

#include "attention_tile.cuh"

namespace mllama {

// The query heads of one kv head, packed token after token: row r is head r % group of token r /
// group. Each key and value block is then read once for the whole group.
template <typename T>
struct QueryRows {
  const T* q;  // first token of the sequence, first head of the group
  T* out;
  int64_t q_token_stride, q_head_stride;
  int64_t out_token_stride, out_head_stride;
  int group;
  int first;  // row of the sequence that is row 0 of this block
  int count;  // rows of the sequence: tokens * group

  __device__ __forceinline__ bool valid(int row) const { return first + row < count; }
  __device__ __forceinline__ int token(int row) const { return (first + row) / group; }
  __device__ __forceinline__ int head(int row) const { return (first + row) % group; }
  __device__ __forceinline__ const T* q_row(int row) const {
    return q + token(row) * q_token_stride + head(row) * q_head_stride;
  }
  __device__ __forceinline__ T* out_row(int row) const {
    return out + token(row) * out_token_stride + head(row) * out_head_stride;
  }
};

// A query policy has load<Config>(tile, rows): every warp fills its own Config::kRowsPerWarp rows
// of the tile, eight lanes to a row, by ordinary stores or asynchronous copies. Rows behind the end
// read as zero.
template <typename Config, typename F>
__device__ __forceinline__ void for_own_rows(const F& f) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < Config::kRowsPerWarp; i += 4)
    f(warp * Config::kRowsPerWarp + i + lane / 8, lane % 8);
}

struct PlainQuery {
  template <typename Config, typename T>
  __device__ __forceinline__ void load(char* tile, const QueryRows<T>& rows) const {
    using Layout = TileLayout<T, Config::kHeadDim>;
    const uint32_t address = shared_address(tile);
    for_own_rows<Config>([&](int row, int lane) {
      const bool valid = rows.valid(row);
      const T* source = valid ? rows.q_row(row) : rows.q;
#pragma unroll
      for (int chunk = lane; chunk < Layout::kChunks; chunk += 8) {
        cp_async_16(address + Layout::offset(row, chunk), source + chunk * Layout::kChunkElements,
                    valid);
      }
    });
  }
};

// round(q * rsqrt(mean(q^2) + eps)) * weight per head, statistics in float32: the two roundings of
// rms_norm.
template <typename T>
struct NormedQuery {
  const T* weight;  // (head_dim,)
  float eps;

  template <typename Config>
  __device__ __forceinline__ void load(char* tile, const QueryRows<T>& rows) const {
    using Layout = TileLayout<T, Config::kHeadDim>;
    constexpr int kVecs = (Layout::kChunks + 7) / 8;
    for_own_rows<Config>([&](int row, int lane) {
      const bool valid = rows.valid(row);
      const T* source = valid ? rows.q_row(row) : rows.q;
      Vec<T> v[kVecs];
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const int chunk = i * 8 + lane;
        v[i] = valid && chunk < Layout::kChunks ? load_vec(source + chunk * Vec<T>::kSize)
                                                : zero_vec<T>();
#pragma unroll
        for (int e = 0; e < Vec<T>::kSize; ++e)
          sum = fmaf(to_f32(v[i].data[e]), to_f32(v[i].data[e]), sum);
      }
      const float rstd = 1.0f / sqrtf(warp_sum<8>(sum) / Config::kHeadDim + eps);
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const int chunk = i * 8 + lane;
        if (chunk >= Layout::kChunks) continue;
        const Vec<T> w = load_vec(weight + chunk * Vec<T>::kSize);
#pragma unroll
        for (int e = 0; e < Vec<T>::kSize; ++e) {
          const float normalized = round_to<T>(__fmul_rn(to_f32(v[i].data[e]), rstd));
          v[i].data[e] = from_f32<T>(__fmul_rn(normalized, to_f32(w.data[e])));
        }
        store_vec(reinterpret_cast<T*>(tile + Layout::offset(row, chunk)), v[i]);
      }
    });
  }
};

// One rotated pair with a rounding after each operation, as a chain of PyTorch operators has it.
template <typename T>
__device__ __forceinline__ void rotate_pair(T& first, T& second, T cos, T sin) {
  const float a = to_f32(first), b = to_f32(second), c = to_f32(cos), s = to_f32(sin);
  first = from_f32<T>(__fsub_rn(round_to<T>(__fmul_rn(a, c)), round_to<T>(__fmul_rn(b, s))));
  second = from_f32<T>(__fadd_rn(round_to<T>(__fmul_rn(b, c)), round_to<T>(__fmul_rn(a, s))));
}

// Rotary embedding of pairs (i, i + head_dim / 2) or, interleaved, (2 i, 2 i + 1).
template <typename T>
struct RotaryQuery {
  const T* cos;  // row of the sequence's first token; (rows, head_dim / 2)
  const T* sin;
  int64_t cos_stride, sin_stride;  // elements from token to token
  bool interleaved;

  template <typename Config>
  __device__ __forceinline__ void load(char* tile, const QueryRows<T>& rows) const {
    using Layout = TileLayout<T, Config::kHeadDim>;
    constexpr int kPairs =
        Layout::kChunks / 2;  // pairs of chunks: c with c + kPairs, or 2 c with 2 c + 1
    static_assert(Config::kHeadDim / 2 % Vec<T>::kSize == 0, "half a head must be whole vectors");
    for_own_rows<Config>([&](int row, int lane) {
      const bool valid = rows.valid(row);
      const T* source = valid ? rows.q_row(row) : rows.q;
      const int token = valid ? rows.token(row) : 0;
#pragma unroll
      for (int pair = lane; pair < kPairs; pair += 8) {
        const int low = interleaved ? 2 * pair : pair;
        const int high = interleaved ? 2 * pair + 1 : pair + kPairs;
        Vec<T> a = zero_vec<T>(), b = zero_vec<T>();
        if (valid) {
          a = load_vec(source + low * Vec<T>::kSize);
          b = load_vec(source + high * Vec<T>::kSize);
          const Vec<T> c = load_vec(cos + token * cos_stride + pair * Vec<T>::kSize);
          const Vec<T> s = load_vec(sin + token * sin_stride + pair * Vec<T>::kSize);
          rotate(a, b, c, s);
        }
        store_vec(reinterpret_cast<T*>(tile + Layout::offset(row, low)), a);
        store_vec(reinterpret_cast<T*>(tile + Layout::offset(row, high)), b);
      }
    });
  }

 private:
  __device__ __forceinline__ void rotate(Vec<T>& a, Vec<T>& b, const Vec<T>& c,
                                         const Vec<T>& s) const {
    constexpr int kSize = Vec<T>::kSize;
    if (interleaved) {  // a then b are 2 * kSize neighbouring elements: kSize pairs
#pragma unroll
      for (int e = 0; e < kSize / 2; ++e)
        rotate_pair(a.data[2 * e], a.data[2 * e + 1], c.data[e], s.data[e]);
#pragma unroll
      for (int e = 0; e < kSize / 2; ++e) {
        rotate_pair(b.data[2 * e], b.data[2 * e + 1], c.data[kSize / 2 + e], s.data[kSize / 2 + e]);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kSize; ++e) rotate_pair(a.data[e], b.data[e], c.data[e], s.data[e]);
    }
  }
};

}  // namespace mllama
