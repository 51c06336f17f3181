// Spreads the attention of ragged sequences over threads: blocks of rows where there are many,
// splits of keys where there are few. Which way a sequence goes depends on its own number of rows
// alone.
#pragma once

#include "../common.h"
#include "attention.h"

namespace mllama::MLLAMA_ISA {

// Output rows past the last packed sequence are zero.
template <typename T, typename Params>
void clear_tail(const Params& p) {
  if (!p.cu_seqlens) return;
  const int64_t used = p.cu_seqlens[p.batch], row = p.num_q_heads * p.head_dim;
  memset(static_cast<T*>(p.out) + used * row, 0, (p.tokens - used) * row * sizeof(T));
}

// Source describes the sequences:
//   batch(), kv_heads(), group(), head_dim(), tokens(b)
//   max_splits(b)                                an upper bound of count_splits() for sequence b
//   make_task(b, h, first, tokens, scratch)      the task of a run of tokens
template <typename T, typename Source>
class AttentionDriver {
  using S = Scalar<T>;

 public:
  explicit AttentionDriver(const Source& source) : source_(source) {
    for (int64_t b = 0; b < source_.batch(); ++b) {
      const int64_t tokens = source_.tokens(b);
      if (is_few(tokens)) {
        few_rows_ = max(few_rows_, tokens * source_.group());
        few_splits_ = max(few_splits_, source_.max_splits(b));
      } else {
        longest_ = max(longest_, tokens);
      }
    }
  }

  void run() const {
    if (longest_ > 0) run_blocks();
    if (few_rows_ > 0) run_splits();
  }

 private:
  bool is_few(int64_t tokens) const { return tokens * source_.group() <= kFewRows; }

  void run_blocks() const {
    const int64_t chunk_tokens = task_tokens(source_.group()),
                  chunks = ceil_div(longest_, chunk_tokens);
    parallel_for(
        0, source_.batch() * source_.kv_heads() * chunks, 1, [&](int64_t begin, int64_t end) {
          Scratch scratch;
          for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / chunks / source_.kv_heads(), h = i / chunks % source_.kv_heads();
            const int64_t first = interleaved_chunk(i % chunks, chunks) * chunk_tokens;
            const int64_t tokens = min(chunk_tokens, source_.tokens(b) - first);
            if (tokens <= 0 || is_few(source_.tokens(b))) continue;
            const Scratch::Mark mark(scratch);
            attend<T>(source_.make_task(b, h, first, tokens, scratch), scratch);
          }
        });
  }

  void run_splits() const {
    Scratch shared;
    const int64_t sequences = source_.batch() * source_.kv_heads();
    const int64_t stride = split_size(few_rows_, source_.head_dim());
    S* results = shared.take<S>(sequences * few_splits_ * stride);
    parallel_for(0, sequences * few_splits_, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t i = begin; i < end; ++i) {
        for_few(i / few_splits_, scratch, [&](const AttentionTask& task) {
          if (i % few_splits_ >= count_splits(task)) return;
          attend_split<T>(task, i % few_splits_, results + i * stride, scratch);
        });
      }
    });
    parallel_for(0, sequences, 16, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t i = begin; i < end; ++i) {
        for_few(i, scratch, [&](const AttentionTask& task) {
          merge_splits<T>(task, results + i * few_splits_ * stride, stride);
        });
      }
    });
  }

  template <typename F>
  void for_few(int64_t sequence, Scratch& scratch, const F& f) const {
    const int64_t b = sequence / source_.kv_heads(), h = sequence % source_.kv_heads();
    const int64_t tokens = source_.tokens(b);
    if (tokens <= 0 || !is_few(tokens)) return;
    const Scratch::Mark mark(scratch);
    f(source_.make_task(b, h, 0, tokens, scratch));
  }

  const Source& source_;
  int64_t longest_ = 0, few_rows_ = 0, few_splits_ = 0;
};

}  // namespace mllama::MLLAMA_ISA
