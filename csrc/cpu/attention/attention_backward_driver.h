// Spreads the gradients of attention over threads.
//
// Where there are key heads enough, each head of each sequence is one thread's, and the scores are
// computed once for all gradients: five products. Elsewhere the keys go over the threads in chunks,
// then the rows, and the scores are computed twice: seven products. The bits are the same either
// way, so the choice may follow the number of threads.
#pragma once

#include "../../common.h"
#include "attention_backward.h"

namespace mllama::MLLAMA_ISA {

// A segment of a sequence's task.
struct KeyUser {
  int64_t sequence, segment;
};

// Source describes sequences, and sets of keys: a set has gradients of its own and may be a segment
// of several sequences.
//   batch(), kv_heads(), group(), head_dim(), tokens(b)
//   segments()                         of every sequence
//   make_task(b, h, first, last, scratch)
//                                      all rows of a sequence, its segments from `first` to before
//                                      `last`; no gradients asked for
//   sets(), keys(set), users(set), user(set, i), set(KeyUser)
//   shares_sets()                      whether a set has several users
//   store_keys(set, h, first, n, grad_k, grad_v)
//                                      of n keys; rows of padded_dim(head_dim()) elements
// A set without users is left alone.
template <typename T, typename Source>
class GradientDriver {
  using S = Scalar<T>;

 public:
  explicit GradientDriver(const Source& source) : source_(source) {
    for (int64_t b = 0; b < source.batch(); ++b) longest_ = max(longest_, source.tokens(b));
    for (int64_t s = 0; s < source.sets(); ++s) largest_ = max(largest_, source.keys(s));
  }

  void run() const {
    const int64_t heads = source_.batch() * source_.kv_heads(), threads = num_threads();
    if (!source_.shares_sets() && 5 * ceil_div(heads, threads) * threads <= 7 * heads) {
      run_heads();
    } else {
      run_keys();
      run_rows();
    }
  }

 private:
  static constexpr int64_t kChunkKeys = 4 * kGradientKeys;
  static constexpr int64_t kChunkBlocks = 4;  // of rows

  void run_heads() const {
    parallel_for(0, source_.batch() * source_.kv_heads(), 1, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / source_.kv_heads(), h = i % source_.kv_heads();
        const Scratch::Mark mark(scratch);
        GradientTask<T> task = source_.make_task(b, h, 0, source_.segments(), scratch);
        int64_t keys = 0;
        for (int64_t s = 0; s < task.num_segments; ++s) {
          keys += padded_keys(task.segments[s].keys);
        }
        want_keys(task, keys, scratch);
        task.with_rows = true;
        add_gradients(task, scratch);
        int64_t position = 0;
        for (int64_t s = 0; s < task.num_segments; ++s) {
          if (task.segments[s].keys == 0) continue;
          store_keys(task, source_.set({b, s}), h, 0, task.segments[s].keys, position);
          position += padded_keys(task.segments[s].keys);
        }
      }
    });
  }

  void run_keys() const {
    const int64_t chunks = ceil_div(largest_, kChunkKeys);
    parallel_for(
        0, source_.sets() * source_.kv_heads() * chunks, 1, [&](int64_t begin, int64_t end) {
          Scratch scratch;
          for (int64_t i = begin; i < end; ++i) {
            const int64_t set = i / chunks / source_.kv_heads(),
                          h = i / chunks % source_.kv_heads();
            const int64_t first = interleaved_chunk(i % chunks, chunks) * kChunkKeys;
            const int64_t keys = min(kChunkKeys, source_.keys(set) - first);
            if (keys <= 0 || source_.users(set) == 0) continue;
            const Scratch::Mark mark(scratch);
            GradientTask<T> wanted = {};
            wanted.head_dim = source_.head_dim();
            want_keys(wanted, padded_keys(keys), scratch);
            for (int64_t u = 0; u < source_.users(set); ++u) {
              const Scratch::Mark user_mark(scratch);
              const KeyUser user = source_.user(set, u);
              GradientTask<T> task =
                  source_.make_task(user.sequence, h, user.segment, user.segment + 1, scratch);
              const Segment segment = part(task.segments[0], first, keys);
              task.segments = &segment;
              if (task.causal) {
                const int64_t block = gradient_tokens(task.group);
                task.first_key += first;
                task.first_token = first / block * block;
              }
              task.grad_k = wanted.grad_k;
              task.grad_v = wanted.grad_v;
              add_gradients(task, scratch);
            }
            store_keys(wanted, set, h, first, keys, 0);
          }
        });
  }

  void run_rows() const {
    const int64_t chunk = kChunkBlocks * gradient_tokens(source_.group()),
                  chunks = ceil_div(longest_, chunk);
    parallel_for(
        0, source_.batch() * source_.kv_heads() * chunks, 1, [&](int64_t begin, int64_t end) {
          Scratch scratch;
          for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / chunks / source_.kv_heads(), h = i / chunks % source_.kv_heads();
            const int64_t first = interleaved_chunk(i % chunks, chunks) * chunk;
            const int64_t last = min(first + chunk, source_.tokens(b));
            if (first >= last) continue;
            const Scratch::Mark mark(scratch);
            GradientTask<T> task = source_.make_task(b, h, 0, source_.segments(), scratch);
            task.first_token = first;
            task.last_token = last;
            task.with_rows = true;
            add_gradients(task, scratch);
          }
        });
  }

  static void want_keys(GradientTask<T>& task, int64_t keys, Scratch& scratch) {
    const int64_t elements = keys * padded_dim(task.head_dim);
    task.grad_k = scratch.take<S>(elements);
    task.grad_v = scratch.take<S>(elements);
    memset(task.grad_k, 0, elements * sizeof(S));
    memset(task.grad_v, 0, elements * sizeof(S));
  }

  void store_keys(const GradientTask<T>& task, int64_t set, int64_t h, int64_t first, int64_t n,
                  int64_t position) const {
    const int64_t offset = position * padded_dim(task.head_dim);
    source_.store_keys(set, h, first, n, task.grad_k + offset, task.grad_v + offset);
  }

  static Segment part(const Segment& whole, int64_t first, int64_t n) {
    return {from(whole.k, first), from(whole.v, first), n, whole.visible};
  }
  static KeyRows from(KeyRows rows, int64_t first) {
    if (rows.pages) {
      rows.pages += first / rows.page_size;
    } else {
      rows.base += first * rows.stride;
    }
    return rows;
  }

  const Source& source_;
  int64_t longest_ = 0, largest_ = 0;
};

}  // namespace mllama::MLLAMA_ISA
