// vision_attention: one task per (image, head, run of queries); see attention/attention.cpp.
// Padding queries do not see padding keys; every other pair attends.
#include "../vision_attention.h"

#include "attention/attention.h"
#include "common/dtypes.h"
#include "ops.h"

namespace mllama::MLLAMA_ISA {
namespace {

template <typename T>
void run(const VisionAttentionParams& p) {
  const int64_t chunk_tokens = task_tokens(p.batch * p.num_heads, p.seqlen, 1),
                chunks = ceil_div(p.seqlen, chunk_tokens);
  parallel_for(0, p.batch * p.num_heads * chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % chunks * chunk_tokens, h = i / chunks % p.num_heads;
      const int64_t b = i / chunks / p.num_heads, tokens = min(chunk_tokens, p.seqlen - first);
      const Scratch::Mark mark(scratch);
      T* q = scratch.take<T>(tokens * p.head_dim);
      for (int64_t t = 0; t < tokens; ++t) {
        memcpy(q + t * p.head_dim,
               static_cast<const T*>(p.q) + b * p.q_batch_stride + (first + t) * p.q_token_stride +
                   h * p.q_head_stride,
               p.head_dim * sizeof(T));
      }
      const auto rows = [&](const void* base, int64_t batch_stride, int64_t token_stride,
                            int64_t head_stride) {
        const T* start = static_cast<const T*>(base) + b * batch_stride + h * head_stride;
        return KeyRows{reinterpret_cast<const char*>(start), token_stride * (int64_t)sizeof(T),
                       nullptr, 0, 0};
      };
      const Segment segment{rows(p.k, p.k_batch_stride, p.k_token_stride, p.k_head_stride),
                            rows(p.v, p.v_batch_stride, p.v_token_stride, p.v_head_stride),
                            p.seqlen, nullptr};
      const bool* padding = p.padding ? p.padding + b * p.padding_batch_stride : nullptr;
      AttentionTask task = {};
      task.q = q;
      task.out_token_stride = p.num_heads * p.head_dim;
      task.out =
          static_cast<T*>(p.out) + (b * p.seqlen + first) * task.out_token_stride + h * p.head_dim;
      if (p.lse)
        task.lse = static_cast<Scalar<T>*>(p.lse) + (b * p.num_heads + h) * p.seqlen + first;
      task.tokens = tokens;
      task.group = 1;
      task.head_dim = p.head_dim;
      task.segments = &segment;
      task.num_segments = 1;
      task.query_padding = padding ? padding + first : nullptr;
      task.key_padding = padding;
      task.softmax_scale = p.softmax_scale;
      attend<T>(task, scratch);
    }
  });
}

}  // namespace

void vision_attention(const VisionAttentionParams& p) {
  if (p.batch * p.seqlen * p.num_heads * p.head_dim == 0) return;
  with_dtype(p.dtype, [&]<typename T>(Type<T>) { run<T>(p); });
}

}  // namespace mllama::MLLAMA_ISA
