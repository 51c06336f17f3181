// cross_attention: one task per (sequence, key head, run of tokens), a segment per tile; see
// attention_driver.h.
// Queries are normalised on their way into the task. A tile that no row of a task sees is not read.
#include "../cross_attention.h"

#include "attention_driver.h"
#include "cross_rows.h"
#include "dtypes.h"
#include "kernels.h"

namespace mllama::MLLAMA_ISA {
namespace {

template <typename T>
class Sequences : public CrossRows<T, CrossAttentionParams> {
  using Base = CrossRows<T, CrossAttentionParams>;
  using Base::group_;
  using Base::load_queries;
  using Base::lse_head_stride;
  using Base::p_;
  using Base::q_offset;
  using Base::segment;
  using Base::slot;

 public:
  using Base::Base;
  using Base::tokens;

  // For AttentionDriver.
  int64_t max_splits(int64_t) const { return p_.tiles * ceil_div(p_.tile_tokens, kSplitKeys); }

  AttentionTask make_task(int64_t b, int64_t h, int64_t first, int64_t tokens,
                          Scratch& scratch) const {
    T* q = scratch.take<T>(tokens * group_ * p_.head_dim);
    load_queries(b, h, first, tokens, q);
    Segment* segments = scratch.take<Segment>(p_.tiles);
    AttentionTask task = {};
    task.q = q;
    task.out_token_stride = p_.num_q_heads * p_.head_dim;
    task.out = static_cast<T*>(p_.out) + q_offset(b, h, first);
    task.lse = this->lse(b, h, first);
    task.lse_head_stride = lse_head_stride();
    task.tokens = tokens;
    task.group = group_;
    task.head_dim = p_.head_dim;
    task.segments = segments;
    for (int64_t t = 0; t < p_.tiles; ++t) {
      if (slot(b, t) >= 0) segments[task.num_segments++] = segment(b, h, t, first);
    }
    task.visible_stride = p_.tile_mask_row_stride;
    task.softmax_scale = p_.softmax_scale;
    return task;
  }
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
