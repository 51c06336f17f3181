// Rows of ragged sequences and their gradients: what those of rotary_attention and cross_attention
// share. Rows is RotaryRows or CrossRows.
#pragma once

#include "attention_backward.h"

namespace mllama::MLLAMA_ISA {

template <typename T, typename Rows>
class SequenceGradients : public Rows, public GradientRows<T> {
 public:
  using Rows::Rows;

  void load_rows(int64_t b, int64_t h, int64_t first, int64_t tokens, T* q) const override {
    this->load_queries(b, h, first, tokens, q);
  }

 protected:
  // All rows of sequence b and key head h, which meet these segments; no gradients asked for.
  GradientTask<T> task(int64_t b, int64_t h, const Segment* segments, int64_t num_segments) const {
    const auto& p = this->p_;
    GradientTask<T> task = {};
    task.rows = this;
    task.sequence = b;
    task.head = h;
    task.grad_out = this->row(p.grad_out, b, 0, p.grad_out_batch_stride, p.grad_out_token_stride) +
                    h * this->group_ * p.grad_out_head_stride;
    task.grad_out_token_stride = p.grad_out_token_stride;
    task.grad_out_head_stride = p.grad_out_head_stride;
    task.out = static_cast<const T*>(p.out) + this->q_offset(b, h, 0);
    task.out_token_stride = p.num_q_heads * p.head_dim;
    task.lse = this->lse(b, h, 0);
    task.lse_head_stride = this->lse_head_stride();
    task.last_token = this->tokens(b);
    task.group = this->group_;
    task.head_dim = p.head_dim;
    task.segments = segments;
    task.num_segments = num_segments;
    task.softmax_scale = p.softmax_scale;
    return task;
  }
};

}  // namespace mllama::MLLAMA_ISA
