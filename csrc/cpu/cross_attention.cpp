// cross_attention: one task per (sequence, key head, run of tokens), a segment per tile; see
// attention_driver.h.
// Queries are normalised on their way into the task. A tile that no row of a task sees is not read.
#include "../cross_attention.h"

#include "attention_driver.h"
#include "dtypes.h"
#include "kernels.h"
#include "rows.h"

namespace mllama::MLLAMA_ISA {
namespace {

template <typename T>
class Sequences {
 public:
  explicit Sequences(const CrossAttentionParams& p) : p_(p) {}

  // For AttentionDriver.
  int64_t batch() const { return p_.batch; }
  int64_t kv_heads() const { return p_.num_kv_heads; }
  int64_t group() const { return group_; }
  int64_t head_dim() const { return p_.head_dim; }
  int64_t tokens(int64_t b) const {
    return p_.cu_seqlens ? p_.cu_seqlens[b + 1] - start(b) : p_.max_seqlen;
  }
  int64_t max_splits(int64_t) const { return p_.tiles * ceil_div(p_.tile_tokens, kSplitKeys); }

  AttentionTask make_task(int64_t b, int64_t h, int64_t first, int64_t tokens,
                          Scratch& scratch) const {
    const T* sequence_q = static_cast<const T*>(p_.q) +
                          (p_.cu_seqlens ? start(b) * p_.q_token_stride : b * p_.q_batch_stride);
    T* q = scratch.take<T>(tokens * group_ * p_.head_dim);
    load_queries(sequence_q + first * p_.q_token_stride + h * group_ * p_.q_head_stride, tokens, q);
    Segment* segments = scratch.take<Segment>(p_.tiles);
    AttentionTask task = {};
    task.q = q;
    task.out_token_stride = p_.num_q_heads * p_.head_dim;
    task.out = static_cast<T*>(p_.out) + (start(b) + first) * task.out_token_stride +
               h * group_ * p_.head_dim;
    task.tokens = tokens;
    task.group = group_;
    task.head_dim = p_.head_dim;
    task.segments = segments;
    task.num_segments = find_segments(b, h, start(b) + first, segments);
    task.visible_stride = p_.tile_mask_row_stride;
    task.softmax_scale = p_.softmax_scale;
    return task;
  }

 private:
  int64_t start(int64_t b) const { return p_.cu_seqlens ? p_.cu_seqlens[b] : b * p_.max_seqlen; }

  void load_queries(const T* q, int64_t tokens, T* out) const {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t g = 0; g < group_; ++g, out += p_.head_dim) {
        const T* row = q + t * p_.q_token_stride + g * p_.q_head_stride;
        if (p_.q_norm_weight) {
          rms_norm_row(row, static_cast<const T*>(p_.q_norm_weight), out, p_.head_dim, p_.eps);
        } else {
          memcpy(out, row, p_.head_dim * sizeof(T));
        }
      }
    }
  }

  // The present tiles of sequence b for key head h and the rows from first_row on; returns their
  // number.
  int64_t find_segments(int64_t b, int64_t h, int64_t first_row, Segment* segments) const {
    const bool* mask = p_.tile_mask ? p_.tile_mask + first_row * p_.tile_mask_row_stride : nullptr;
    int64_t count = 0;
    for (int64_t t = 0; t < p_.tiles; ++t) {
      const int64_t slot = p_.tile_table ? p_.tile_table[b * p_.tiles + t] : b * p_.tiles + t;
      if (slot < 0) continue;
      segments[count++] = {
          rows(p_.k, slot * p_.k_slot_stride + h * p_.k_head_stride, p_.k_token_stride),
          rows(p_.v, slot * p_.v_slot_stride + h * p_.v_head_stride, p_.v_token_stride),
          p_.tile_tokens, mask ? mask + t : nullptr};
    }
    return count;
  }

  static KeyRows rows(const void* base, int64_t offset, int64_t token_stride) {
    const T* first = static_cast<const T*>(base) + offset;
    return {reinterpret_cast<const char*>(first), token_stride * (int64_t)sizeof(T), nullptr, 0, 0};
  }

  const CrossAttentionParams& p_;
  const int64_t group_ = p_.num_q_heads / p_.num_kv_heads;
};

}  // namespace

void cross_attention(const CrossAttentionParams& p) {
  if (p.tokens * p.num_q_heads * p.head_dim == 0) return;
  with_dtype(p.dtype, [&]<typename T>(Type<T>) {
    const Sequences<T> sequences(p);
    clear_tail<T>(p);
    AttentionDriver<T, Sequences<T>>(sequences).run();
  });
}

}  // namespace mllama::MLLAMA_ISA
