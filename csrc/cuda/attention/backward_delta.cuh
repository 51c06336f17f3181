// Statistics of query rows for the gradients: backward_sm80.cuh, kernel 1. Eight lanes to a
// row of head_dim elements, 16 bytes each at a time.
#pragma once

#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "backward_sm80.cuh"

namespace mllama {

constexpr int kRowLanes = 8;
constexpr int kRowThreads = 256;
constexpr int64_t row_blocks(int64_t rows) {
  return ceil_div<int64_t>(rows, kRowThreads / kRowLanes);
}
__device__ __forceinline__ int64_t row_of_lanes() {
  return (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / kRowLanes;
}

// Room for the statistics of `rows` query rows, and what follows starts on 16 bytes.
constexpr int64_t statistics_bytes(int64_t rows) {
  return round_up<int64_t>(rows * int64_t{sizeof(float2)}, 16);
}

// A row of one tensor in the registers of its eight lanes; zeros where there is none.
template <typename T, int kHeadDim>
struct LaneRow {
  static constexpr int kChunks = kHeadDim / Vec<T>::kSize;
  static constexpr int kVecs = (kChunks + kRowLanes - 1) / kRowLanes;
  Vec<T> v[kVecs];

  __device__ __forceinline__ static int chunk(int i) {
    return i * kRowLanes + static_cast<int>(threadIdx.x) % kRowLanes;
  }
  __device__ __forceinline__ void load(const T* row, bool valid) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      v[i] = load_vec_if(valid && chunk(i) < kChunks, row + chunk(i) * Vec<T>::kSize);
    }
  }
  __device__ __forceinline__ void store(T* row, bool valid) const {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      store_vec_if(valid && chunk(i) < kChunks, row + chunk(i) * Vec<T>::kSize, v[i]);
    }
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) v[i] = zero_vec<T>();
  }
};

// The product of two rows; all lanes of the warp call it.
template <typename T, int kHeadDim>
__device__ __forceinline__ float dot_rows(const LaneRow<T, kHeadDim>& a,
                                          const LaneRow<T, kHeadDim>& b) {
  Statistic<T> sum = 0;
#pragma unroll
  for (int i = 0; i < LaneRow<T, kHeadDim>::kVecs; ++i) {
#pragma unroll
    for (int e = 0; e < Vec<T>::kSize; ++e) {
      sum = fma(static_cast<Statistic<T>>(to_f32(a.v[i].data[e])),
                static_cast<Statistic<T>>(to_f32(b.v[i].data[e])), sum);
    }
  }
  return static_cast<float>(warp_sum<kRowLanes>(sum));
}

// Where the row of `token`, counted over all sequences, and of query head `head` lies.
template <typename Params>
struct QueryRowPlace {
  const Params& p;
  int64_t sequence, token_of_sequence;  // dense
  int64_t token, head;

  __device__ __forceinline__ QueryRowPlace(const Params& p, int64_t token, int64_t head)
      : p(p), token(token), head(head) {
    const unsigned length = static_cast<unsigned>(p.max_seqlen);
    sequence = p.cu_seqlens == nullptr ? static_cast<unsigned>(token) / length : 0;
    token_of_sequence = token - sequence * p.max_seqlen;
  }

  __device__ __forceinline__ int64_t strided(int64_t batch_stride, int64_t token_stride,
                                             int64_t head_stride) const {
    const int64_t row = p.cu_seqlens == nullptr
                            ? sequence * batch_stride + token_of_sequence * token_stride
                            : token * token_stride;
    return row + head * head_stride;
  }
  __device__ __forceinline__ int64_t contiguous() const {
    return (token * p.num_q_heads + head) * p.head_dim;
  }
  __device__ __forceinline__ int64_t lse() const {
    return p.cu_seqlens == nullptr
               ? (sequence * p.num_q_heads + head) * p.max_seqlen + token_of_sequence
               : head * p.tokens + token;
  }
  // Rows of one kv head and sequence follow each other as in QueryRows.
  __device__ __forceinline__ int64_t statistics() const {
    const unsigned group = static_cast<unsigned>(p.num_q_heads / p.num_kv_heads);
    const unsigned kv_head = static_cast<unsigned>(head) / group;
    return (kv_head * p.tokens + token) * group + (static_cast<unsigned>(head) - kv_head * group);
  }
};

// The statistics of that row; all lanes of the warp call it.
template <typename T, int kHeadDim, typename Params>
__device__ __forceinline__ void store_statistics(const QueryRowPlace<Params>& place, bool valid,
                                                 float2* statistics) {
  const Params& p = place.p;
  LaneRow<T, kHeadDim> out, grad;
  out.load(static_cast<const T*>(p.out) + place.contiguous(), valid);
  grad.load(
      static_cast<const T*>(p.grad_out) +
          place.strided(p.grad_out_batch_stride, p.grad_out_token_stride, p.grad_out_head_stride),
      valid);
  const float delta = dot_rows(out, grad);
  if (valid && threadIdx.x % kRowLanes == 0) {
    const float lse = static_cast<const float*>(p.lse)[place.lse()];
    statistics[place.statistics()] = make_float2(stored_lse<T>(lse), delta);
  }
}

// The rows of a block of the forward (RotaryBlock, CrossBlock): `p.q` is what enters the products,
// `p.out` the gradient of q.
template <typename T, typename Block, typename Params>
__device__ __forceinline__ void fill_rows(BackwardRows<T>& rows, const Block& block,
                                          const Params& p, const float2* statistics, int head_dim) {
  block.fill(rows, p, head_dim);
  const int64_t grad = p.cu_seqlens == nullptr ? block.b * p.grad_out_batch_stride
                                               : block.sequence.begin * p.grad_out_token_stride;
  rows.grad_out = static_cast<const T*>(p.grad_out) + grad +
                  block.kv_head * block.group * p.grad_out_head_stride;
  rows.grad_token_stride = p.grad_out_token_stride;
  rows.grad_head_stride = p.grad_out_head_stride;
  rows.statistics =
      statistics + (block.kv_head * p.tokens + block.sequence.begin) * int64_t{block.group};
}

}  // namespace mllama
