// The tokens of patch_embed: their embeddings, and a warp's work on one of them.
#pragma once

#include "../../patch_embed.h"
#include "../common/alignment.h"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"

namespace mllama {

// Whether rows of dim elements may be read and written in 16-byte vectors.
template <typename T>
bool tokens_vectorized(const PatchEmbedParams& p) {
  bool vectorized = p.dim % Vec<T>::kSize == 0;
  for (const void* pointer :
       {p.class_embedding, p.position_embedding, p.tile_position_embedding, p.pre_tile_embedding,
        p.norm_weight, p.norm_bias, static_cast<const void*>(p.out),
        static_cast<const void*>(p.tokens)}) {
    vectorized = vectorized && is_aligned16(pointer, 0, p.dtype);
  }
  return vectorized;
}

template <typename T>
__device__ __forceinline__ Vec<T> load_part(const T* address, int count, bool vectorized) {
  return vectorized ? load_vec(address) : load_elements(address, count);
}

// Where a token that is a patch lies before LayerNorm.
template <typename T>
__device__ __forceinline__ T* unnormalized_token(const PatchEmbedParams& p, int64_t image_tile,
                                                 int64_t token) {
  if (p.tokens == nullptr) {
    return static_cast<T*>(p.out) + (image_tile * p.out_tokens + token) * p.dim;
  }
  return static_cast<T*>(p.tokens) + (image_tile * (p.grid * p.grid + 1) + token) * p.dim;
}

// The embeddings of one token of one tile.
template <typename T>
struct TokenEmbedding {
  const T* position;  // rows of dim elements
  const T* tile_position;
  const T* pre_tile;
  float position_gate, inverse_gate, pre_tile_gate;  // tanh(g), 1 - tanh(g), tanh(h), rounded to T
  bool vectorized;

  // `ratio` is in range. `tile` counts within the image, `token` within the tile.
  __device__ __forceinline__ TokenEmbedding(const PatchEmbedParams& p, int64_t ratio, int64_t tile,
                                            int64_t token, bool vectorized)
      : vectorized(vectorized) {
    const int64_t tokens = p.grid * p.grid + 1;
    position = static_cast<const T*>(p.position_embedding) + token * p.dim;
    tile_position = static_cast<const T*>(p.tile_position_embedding) +
                    ((ratio * p.tiles + tile) * tokens + token) * p.dim;
    pre_tile = static_cast<const T*>(p.pre_tile_embedding) + (ratio * p.tiles + tile) * p.dim;
    position_gate = tanh_gate<T>(p.position_gate);
    inverse_gate = round_to<T>(__fsub_rn(1.0f, position_gate));
    pre_tile_gate = tanh_gate<T>(p.pre_tile_gate);
  }

  // Adds gate * embedding, both operations rounded.
  __device__ __forceinline__ void add(Vec<T>& x, const T* embedding, float gate, int column,
                                      int count) const {
    const Vec<T> e = load_part(embedding + column, count, vectorized);
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) {
      x.data[i] = from_f32<T>(
          __fadd_rn(to_f32(x.data[i]), round_to<T>(__fmul_rn(gate, to_f32(e.data[i])))));
    }
  }

  __device__ __forceinline__ void add_positions(Vec<T>& x, int column, int count) const {
    add(x, position, inverse_gate, column, count);
    add(x, tile_position, position_gate, column, count);
  }
};

// Finishes token `row` of out, by a warp. Of a patch, whose sum of embeddings is there already, it
// is the LayerNorm; a class token is made here and normalised; what follows the last patch is zero.
// Tokens of an image with a bad id are NaN.
template <typename T>
__device__ __forceinline__ void finish_token(const PatchEmbedParams& p, int64_t row,
                                             bool vectorized) {
  constexpr int kSize = Vec<T>::kSize;
  const int lane = threadIdx.x % kWarpSize, dim = static_cast<int>(p.dim);
  const int64_t image_tile = row / p.out_tokens, token = row - image_tile * p.out_tokens;
  const int64_t image = image_tile / p.tiles;
  T* const out = static_cast<T*>(p.out) + row * p.dim;
  const auto store_to = [&](T* to, int column, const Vec<T>& v) {
    if (vectorized) {
      store_vec(to + column, v);
    } else {
      store_elements(to + column, v, dim - column);
    }
  };
  const auto store = [&](int column, const Vec<T>& v) { store_to(out, column, v); };

  const int64_t ratio = p.aspect_ratio_ids[image];
  const bool valid = ratio >= 0 && ratio < p.ratios;
  if (!valid || token > p.grid * p.grid) {
    Vec<T> fill;
#pragma unroll
    for (int i = 0; i < kSize; ++i) fill.data[i] = from_f32<T>(valid ? 0.0f : NAN);
    for (int column = lane * kSize; column < dim; column += kWarpSize * kSize) store(column, fill);
    return;
  }

  const TokenEmbedding<T> embedding(p, ratio, image_tile - image * p.tiles, token, vectorized);
  T* const unnormalized = unnormalized_token<T>(p, image_tile, token);
  const auto load = [&](int column) {
    if (token > 0) return load_part(unnormalized + column, dim - column, vectorized);
    Vec<T> x =
        load_part(static_cast<const T*>(p.class_embedding) + column, dim - column, vectorized);
    embedding.add_positions(x, column, dim - column);
    return x;
  };
  if (token == 0 && p.tokens != nullptr) {
    for (int column = lane * kSize; column < dim; column += kWarpSize * kSize) {
      store_to(unnormalized, column, load(column));
    }
  }
  // f(value, column) of all elements of this lane.
  const auto for_elements = [&](const auto& f) {
    for (int column = lane * kSize; column < dim; column += kWarpSize * kSize) {
      const Vec<T> x = load(column);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (column + i < dim) f(to_f32(x.data[i]));
      }
    }
  };
  Statistic<T> sum = 0, squares = 0;
  for_elements([&](float x) { sum += x; });
  const Statistic<T> mean = warp_sum(sum) / dim;
  for_elements([&](float x) { squares += (x - mean) * (x - mean); });
  const Statistic<T> rstd = 1 / sqrt(warp_sum(squares) / dim + static_cast<Statistic<T>>(p.eps));
  for (int column = lane * kSize; column < dim; column += kWarpSize * kSize) {
    Vec<T> x = load(column);
    const Vec<T> weight =
        load_part(static_cast<const T*>(p.norm_weight) + column, dim - column, vectorized);
    const Vec<T> bias =
        load_part(static_cast<const T*>(p.norm_bias) + column, dim - column, vectorized);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float normalized = static_cast<float>((to_f32(x.data[i]) - mean) * rstd);
      x.data[i] = from_f32<T>(fmaf(normalized, to_f32(weight.data[i]), to_f32(bias.data[i])));
    }
    store(column, x);
  }
}

}  // namespace mllama
