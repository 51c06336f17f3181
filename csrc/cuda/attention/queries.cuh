// Query rows of one thread block: where they are, what happens to them on the way into shared
// memory (nothing, RMSNorm, rotary embedding), and where their results go.
#pragma once

#include "../common/rms.cuh"
#include "../common/rope.cuh"
#include "tile_sm80.cuh"

namespace mllama {

// The query heads of one kv head, packed token after token: row r is head r % group of token r /
// group. Each key and value block is then read once for the whole group.
template <typename T>
struct QueryRows {
  const T* q;  // first token of the sequence, first head of the group
  T* out;
  int64_t q_token_stride, q_head_stride;
  int64_t out_token_stride, out_head_stride;
  float* lse;  // like out, one per row, or null: not wanted
  int64_t lse_head_stride;
  int64_t group;  // 64 bits: what follows ends without padding, which wide loads would read
  int first;      // row of the sequence that is row 0 of this block
  int count;      // rows of the sequence: tokens * group

  __device__ __forceinline__ bool valid(int row) const { return first + row < count; }
  __device__ __forceinline__ int token(int row) const { return (first + row) / heads(); }
  // Token of the last of the block's `block_rows` rows that is in the sequence.
  __device__ __forceinline__ int last_token(int block_rows) const {
    return (min(first + block_rows, count) - 1) / heads();
  }
  __device__ __forceinline__ int head(int row) const { return (first + row) % heads(); }
  __device__ __forceinline__ const T* q_row(int row) const {
    return q + token(row) * q_token_stride + head(row) * q_head_stride;
  }
  __device__ __forceinline__ T* out_row(int row) const {
    return out + token(row) * out_token_stride + head(row) * out_head_stride;
  }
  __device__ __forceinline__ void store_lse(int row, float value) const {
    lse[head(row) * lse_head_stride + token(row)] = value;
  }

 private:
  __device__ __forceinline__ int heads() const { return static_cast<int>(group); }
};

// A query policy has load<Config>(tile, rows): every warp fills its own Config::kRowsPerWarp rows
// of the tile, eight lanes to a row, by ordinary stores or asynchronous copies. Rows behind the end
// read as zero. Calls f(row, lane of kLanes) for the row and those 4, 8, ... behind it, kAhead in
// all, whose loads f may then issue together.
template <typename Config, int kAhead = 1, int kLanes = 8, typename F>
__device__ __forceinline__ void for_own_rows(const F& f) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll 1  // once per thread block: registers matter more
  for (int i = 0; i < Config::kRowsPerWarp; i += kWarpSize / kLanes * kAhead)
    f(warp * Config::kRowsPerWarp + i + lane / kLanes, lane % kLanes);
}

struct PlainQuery {
  template <typename Config, typename T>
  __device__ __forceinline__ void load(char* tile, const QueryRows<T>& rows) const {
    using Layout = typename Config::QueryLayout;
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

// Normalised per head.
template <typename T>
struct NormedQuery {
  const T* weight;  // (head_dim,)
  double eps;

  template <typename Config>
  __device__ __forceinline__ void load(char* tile, const QueryRows<T>& rows) const {
    using Layout = typename Config::QueryLayout;
    constexpr int kVecs = (Layout::kChunks + 7) / 8, kAhead = Config::kQueryRowsAhead;
    for_own_rows<Config, kAhead>([&](int first_row, int lane) {
      Vec<T> v[kAhead][kVecs], w[kVecs];
#pragma unroll
      for (int c = 0; c < kVecs; ++c) {
        const int chunk = c * 8 + lane;
        w[c] = load_vec_if(chunk < Layout::kChunks, weight + chunk * Vec<T>::kSize);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int row = first_row + 4 * j;
        const bool valid = rows.valid(row);
        const T* const source = valid ? rows.q_row(row) : rows.q;
#pragma unroll
        for (int c = 0; c < kVecs; ++c) {
          const int chunk = c * 8 + lane;
          v[j][c] = load_vec_if(valid && chunk < Layout::kChunks, source + chunk * Vec<T>::kSize);
        }
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        normalize_row(v[j], w, Config::kHeadDim, eps);
#pragma unroll
        for (int c = 0; c < kVecs; ++c) {
          const int chunk = c * 8 + lane;
          if (chunk >= Layout::kChunks) continue;
          store_vec(reinterpret_cast<T*>(tile + Layout::offset(first_row + 4 * j, chunk)), v[j][c]);
        }
      }
    });
  }
};

// Rotary embedding of pairs (i, i + head_dim / 2) or, interleaved, (2 i, 2 i + 1).
template <typename T>
struct RotaryQuery {
  const T* cos;  // row of the sequence's first token; (rows, head_dim / 2)
  const T* sin;
  int64_t cos_stride, sin_stride;  // elements from token to token
  bool interleaved;

  template <typename Config>
  __device__ __forceinline__ void load(char* tile, const QueryRows<T>& rows) const {
    using Layout = typename Config::QueryLayout;
    constexpr int kAhead = Config::kQueryRowsAhead;
    struct Part {
      Vec<T> first, second, cos, sin;
    };
    const int warp_row = threadIdx.x / kWarpSize * Config::kRowsPerWarp;
    const int row_of_lane = threadIdx.x % kWarpSize / 8, lane = threadIdx.x % 8;
#pragma unroll 1
    for (int i = 0; i < Config::kRowsPerWarp; i += 4 * kAhead) {
      const int first_row = warp_row + i + row_of_lane;
#pragma unroll
      for (int c = lane; c < Layout::kChunks / 2; c += 8) {
        const RopeChunk<T> chunk(c, Config::kHeadDim, interleaved);
        Part parts[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          const int row = first_row + 4 * j;
          parts[j] = {zero_vec<T>(), zero_vec<T>(), zero_vec<T>(), zero_vec<T>()};
          if (!rows.valid(row)) continue;
          const T* const source = rows.q_row(row);
          const int64_t token = rows.token(row);
          parts[j] = {load_vec(source + chunk.first), load_vec(source + chunk.second),
                      load_vec(cos + token * cos_stride + c * Vec<T>::kSize),
                      load_vec(sin + token * sin_stride + c * Vec<T>::kSize)};
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          Part& part = parts[j];
          const int row = first_row + 4 * j;
          rotate_chunk(part.first, part.second, part.cos, part.sin, interleaved);
          store_vec(reinterpret_cast<T*>(tile + Layout::offset(row, chunk.first / Vec<T>::kSize)),
                    part.first);
          store_vec(reinterpret_cast<T*>(tile + Layout::offset(row, chunk.second / Vec<T>::kSize)),
                    part.second);
        }
      }
    }
  }
};

}  // namespace mllama
