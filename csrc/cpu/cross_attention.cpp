// cross_attention: one task per (sequence, key head, run of tokens), a segment per tile; see
// attention_driver.h.
// Queries are normalised on their way into the task. A tile that no row of a task sees is not read.
#include "../cross_attention.h"

#include "attention/attention_driver.h"
#include "attention/cross_rows.h"
#include "common/dtypes.h"
#include "ops.h"

namespace mllama::MLLAMA_ISA {
namespace {

template <typename T>
class Sequences : public CrossRows<T, CrossAttentionParams> {
  using Base = CrossRows<T, CrossAttentionParams>;
  using Base::group_;
  using Base::load_queries;
  using Base::p_;
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
    AttentionTask task = this->query_task(b, h, first, tokens, q);
    task.segments = segments;
    for (int64_t t = 0; t < p_.tiles; ++t) {
      if (slot(b, t) >= 0) segments[task.num_segments++] = segment(b, h, t, first);
    }
    task.visible_stride = p_.tile_mask_row_stride;
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
