// Blocked attention with online softmax: what the attention ops share.
//
// An op describes work as tasks. A task is a run of query rows that read the same key and value
// head: `tokens` query tokens times the `group` query heads of that key head, row r being token r /
// group, head r % group. Its keys come in segments (a sequence, or an image tile each), read in
// blocks of a fixed number of keys from the segment's start, so a row's result depends on neither
// its neighbours, nor the batch, nor the number of threads.
#pragma once

#include "../../common.h"
#include "../common/scratch.h"
#include "../common/simd.h"

namespace mllama::MLLAMA_ISA {

// Rows of one head, in bytes: at a stride, or in pages whose size is a multiple of 16 rows.
struct KeyRows {
  const char* base;
  int64_t stride;
  const int32_t* pages;  // null: not paged
  int64_t page_size, page_stride;

  const char* row(int64_t i) const {
    return pages ? base + pages[i / page_size] * page_stride + i % page_size * stride
                 : base + i * stride;
  }
};

struct Segment {
  KeyRows k, v;
  int64_t keys;
  const bool* visible;  // visible[token * visible_stride]; null: every token sees the segment
};

struct AttentionTask {
  const void* q;  // (tokens * group, head_dim) contiguous, ready for the product with keys
  void* out;      // row r at out + r / group * out_token_stride + r % group * head_dim, in elements
  int64_t out_token_stride;
  void*
      lse;  // in the compute type, row r at lse + r % group * lse_head_stride + r / group; or null
  int64_t lse_head_stride;
  int64_t tokens, group, head_dim;
  const Segment* segments;
  int64_t num_segments;
  int64_t visible_stride;
  bool causal;  // token i sees the first past + i + 1 keys of the (only) segment
  int64_t past;
  const bool*
      query_padding;        // (tokens,): a padding query does not see the padding keys; null: none
  const bool* key_padding;  // (keys,) of the only segment
  double softmax_scale;
};

// Always inline: the compiler takes a call of a function that only fetches for one without effect.
MLLAMA_INLINE void prefetch(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
}

// Rows that one task has at most: keys are packed once for all of them.
constexpr int64_t kTaskRows = 1024;

// Query tokens of one task, for the attention of `sets` sequences and key heads. Fewer rows than
// kTaskRows where threads would go without a task or wait for the last.
MLLAMA_INLINE int64_t task_tokens(int64_t sets, int64_t tokens, int64_t group) {
  int64_t rows = kTaskRows;
  while (rows > 128 && sets * ceil_div(tokens * group, rows) < 4 * num_threads()) rows /= 2;
  return max<int64_t>(1, rows / group);
}

// Position of the i-th task of `count` chunks: 0, count - 1, 1, ... so that threads which take
// equal runs of causal chunks get equal work.
MLLAMA_INLINE int64_t interleaved_chunk(int64_t i, int64_t count) {
  return i % 2 == 0 ? i / 2 : count - 1 - i / 2;
}

// The log-sum-exp of row r whose scaled scores have this maximum and sum exp(score - maximum) to
// sum.
template <typename S>
MLLAMA_INLINE void store_lse(const AttentionTask& task, int64_t r, double maximum, S sum) {
  static_cast<S*>(task.lse)[r % task.group * task.lse_head_stride + r / task.group] =
      sum == 0 ? (S)__builtin_inf() : (S)(maximum + __builtin_log((double)sum));
}

// All keys of a task, packed block by block for matrix products.
template <typename T>
void attend(const AttentionTask& task, Scratch& scratch);

// Tasks of at most kFewRows rows (a decode step) are bound by reading their keys: those are
// streamed once, unpacked, in splits of kSplitKeys that threads share, for up to kSplitHeads key
// heads together, and the splits are merged in order.
constexpr int64_t kFewRows = 16;
constexpr int64_t kSplitKeys = 128;
constexpr int64_t kSplitHeads = 8;

// In elements of the compute type.
MLLAMA_INLINE int64_t split_size(int64_t rows, int64_t head_dim) { return rows * (head_dim + 2); }
// Maximum, sum and unnormalised output of each row over those of the splits [first, last) that
// there are, for tasks that differ in their key head alone; split s of task i at result + s *
// stride + i * head_stride.
template <typename T>
void attend_splits(const AttentionTask* tasks, int64_t heads, int64_t first, int64_t last,
                   Scalar<T>* result, int64_t stride, int64_t head_stride, Scratch& scratch);
// The task's output from its splits, `stride` elements apart.
template <typename T>
void merge_splits(const AttentionTask& task, const Scalar<T>* results, int64_t stride,
                  Scratch& scratch);

}  // namespace mllama::MLLAMA_ISA
