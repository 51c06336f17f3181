// Where the query heads of one kv head of one sequence lie.
#pragma once

#include "../common/ragged.cuh"
#include "queries.cuh"

namespace mllama {

// All of `rows` but which of them a thread block has. Params: of rotary or cross attention.
template <typename T, typename Params>
__device__ __forceinline__ void locate_rows(QueryRows<T>& rows, const Params& p,
                                            const SequenceRows& sequence, int64_t b,
                                            int64_t kv_head, int64_t group, int head_dim) {
  const bool ragged = p.cu_seqlens != nullptr;
  const int64_t head = kv_head * group;
  const int64_t q = ragged ? sequence.begin * p.q_token_stride : b * p.q_batch_stride;
  rows.q = static_cast<const T*>(p.q) + q + head * p.q_head_stride;
  rows.out = static_cast<T*>(p.out) + (sequence.begin * p.num_q_heads + head) * head_dim;
  rows.q_token_stride = p.q_token_stride;
  rows.q_head_stride = p.q_head_stride;
  rows.out_token_stride = p.num_q_heads * head_dim;
  rows.out_head_stride = head_dim;
  rows.lse_head_stride = ragged ? p.tokens : p.max_seqlen;
  rows.lse = p.lse == nullptr ? nullptr
                              : static_cast<float*>(p.lse) + head * rows.lse_head_stride +
                                    (ragged ? sequence.begin : b * p.num_q_heads * p.max_seqlen);
  rows.group = group;
}

}  // namespace mllama
