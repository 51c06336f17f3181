// Spreads the attention of ragged sequences over threads: blocks of rows where there are many,
// splits of keys where there are few. Which way a sequence goes depends on its own number of rows
// alone.
#pragma once

#include "../../common.h"
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
      if (!is_few(tokens)) {
        longest_ = max(longest_, tokens);
      } else if (tokens > 0) {
        few_rows_ = max(few_rows_, tokens * source_.group());
        few_splits_ = max(few_splits_, source_.max_splits(b));
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
    const int64_t heads = source_.kv_heads(), sets = source_.batch() * heads;
    const int64_t chunk_tokens = task_tokens(sets, longest_, source_.group()),
                  chunks = ceil_div(longest_, chunk_tokens);
    parallel_for(0, sets * chunks, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / chunks / heads, h = i / chunks % heads;
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
    const int64_t heads = source_.kv_heads(), chunks = ceil_div(heads, kSplitHeads);
    const int64_t stride = split_size(few_rows_, source_.head_dim());
    // The splits of the sequences before each; one of other rows has none.
    int64_t* before = shared.take<int64_t>(source_.batch() + 1);
    before[0] = 0;
    for (int64_t b = 0; b < source_.batch(); ++b) {
      before[b + 1] = before[b] + (has_few(b) ? source_.max_splits(b) : 0);
    }
    S* results = shared.take<S>(before[source_.batch()] * heads, stride);
    const auto result = [&](int64_t b, int64_t h) {
      return results + (before[b] * heads + h * source_.max_splits(b)) * stride;
    };
    parallel_for(0, source_.batch() * chunks * few_splits_, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t i = begin, next; i < end; i = next) {
        const int64_t b = i / few_splits_ / chunks, first = i / few_splits_ % chunks * kSplitHeads;
        const int64_t split = i % few_splits_;
        next = min(end, i - split + few_splits_);
        if (!has_few(b)) continue;
        const Scratch::Mark mark(scratch);
        const int64_t count = min(kSplitHeads, heads - first);
        AttentionTask tasks[kSplitHeads];
        for (int64_t h = 0; h < count; ++h) tasks[h] = whole_task(b, first + h, scratch);
        attend_splits<T>(tasks, count, split, split + next - i, result(b, first), stride,
                         source_.max_splits(b) * stride, scratch);
      }
    });
    parallel_for(0, source_.batch() * heads, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t i = begin; i < end; ++i) {
        if (!has_few(i / heads)) continue;
        const Scratch::Mark mark(scratch);
        merge_splits<T>(whole_task(i / heads, i % heads, scratch), result(i / heads, i % heads),
                        stride, scratch);
      }
    });
  }

  bool has_few(int64_t b) const { return source_.tokens(b) > 0 && is_few(source_.tokens(b)); }

  AttentionTask whole_task(int64_t b, int64_t h, Scratch& scratch) const {
    return source_.make_task(b, h, 0, source_.tokens(b), scratch);
  }

  const Source& source_;
  int64_t longest_ = 0, few_rows_ = 0, few_splits_ = 0;
};

}  // namespace mllama::MLLAMA_ISA
