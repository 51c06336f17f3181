// Sequences packed one behind the other. cu_seqlens comes unchecked from device memory, so whatever
// it holds, rows outside [0, tokens) are never named.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mllama {

struct SequenceRows {
  int64_t begin;  // first token
  int64_t count;
};

// Rows of sequence b, max_seqlen at most: what goes beyond is of no sequence, as no block has it.
// With cu_seqlens null every sequence has max_seqlen of them.
__device__ __forceinline__ SequenceRows sequence_rows(const int32_t* cu_seqlens, int64_t b,
                                                      int64_t max_seqlen, int64_t tokens) {
  if (cu_seqlens == nullptr) return {b * max_seqlen, max_seqlen};
  const int64_t begin = cu_seqlens[b], end = cu_seqlens[b + 1];
  if (begin < 0 || end > tokens || end <= begin) return {0, 0};
  return {begin, end - begin < max_seqlen ? end - begin : max_seqlen};
}

// The sequence among whose sequence_rows is row `token`, or -1.
__device__ __forceinline__ int64_t find_sequence(const int32_t* cu_seqlens, int64_t batch,
                                                 int64_t max_seqlen, int64_t token,
                                                 int64_t tokens) {
  if (cu_seqlens == nullptr) return token / max_seqlen;
  // Decoding, the usual case in which latency counts: one row each.
  int64_t b = token;
  if (token >= batch || cu_seqlens[token] > token || token >= cu_seqlens[token + 1]) {
    int64_t low = 0, high = batch + 1;  // the first bound above `token` lies in [low, high]
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cu_seqlens[middle] > token) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    if (low == 0 || low > batch) return -1;
    b = low - 1;
  }
  const SequenceRows rows = sequence_rows(cu_seqlens, b, max_seqlen, tokens);
  return token >= rows.begin && token - rows.begin < rows.count ? b : -1;
}

}  // namespace mllama
