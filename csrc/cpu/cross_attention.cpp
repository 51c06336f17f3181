// cross_attention: one task per (sequence, key head, run of tokens), a segment per tile; see attention.cpp.
// Queries are normalised on their way into the task. A tile that no row of a task sees is not read.
#include "../cross_attention.h"

#include "attention.h"
#include "dtypes.h"
#include "kernels.h"
#include "rows.h"

namespace mllama::MLLAMA_ISA {
namespace {

template <typename T>
void load_queries(const CrossAttentionParams& p, const T* q, int64_t tokens, int64_t group, T* out) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t g = 0; g < group; ++g, out += p.head_dim) {
      const T* row = q + t * p.q_token_stride + g * p.q_head_stride;
      if (p.q_norm_weight) {
        rms_norm_row(row, static_cast<const T*>(p.q_norm_weight), out, p.head_dim, p.eps);
      } else {
        memcpy(out, row, p.head_dim * sizeof(T));
      }
    }
  }
}

// The present tiles of sequence b for key head h; returns their number.
template <typename T>
int64_t find_segments(const CrossAttentionParams& p, int64_t b, int64_t h, const bool* mask, Segment* segments) {
  int64_t count = 0;
  for (int64_t t = 0; t < p.tiles; ++t) {
    const int64_t slot = p.tile_table ? p.tile_table[b * p.tiles + t] : b * p.tiles + t;
    if (slot < 0) continue;
    const auto rows = [&](const void* base, int64_t slot_stride, int64_t token_stride, int64_t head_stride) {
      const T* start = static_cast<const T*>(base) + slot * slot_stride + h * head_stride;
      return KeyRows{reinterpret_cast<const char*>(start), token_stride * (int64_t)sizeof(T), nullptr, 0, 0};
    };
    segments[count++] = {rows(p.k, p.k_slot_stride, p.k_token_stride, p.k_head_stride),
                         rows(p.v, p.v_slot_stride, p.v_token_stride, p.v_head_stride), p.tile_tokens,
                         mask ? mask + t : nullptr};
  }
  return count;
}

template <typename T>
void run(const CrossAttentionParams& p) {
  const int64_t group = p.num_q_heads / p.num_kv_heads;
  const int64_t chunk_tokens = task_tokens(group), chunks = ceil_div(p.max_seqlen, chunk_tokens);
  parallel_for(0, p.batch * p.num_kv_heads * chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % chunks * chunk_tokens, h = i / chunks % p.num_kv_heads;
      const int64_t b = i / chunks / p.num_kv_heads;
      const int64_t start = p.cu_seqlens ? p.cu_seqlens[b] : b * p.max_seqlen;
      const int64_t length = p.cu_seqlens ? p.cu_seqlens[b + 1] - start : p.max_seqlen;
      const int64_t tokens = min(chunk_tokens, length - first);
      if (tokens <= 0) continue;
      const Scratch::Mark mark(scratch);
      const T* sequence_q =
          static_cast<const T*>(p.q) + (p.cu_seqlens ? start * p.q_token_stride : b * p.q_batch_stride);
      T* q = scratch.take<T>(tokens * group * p.head_dim);
      load_queries(p, sequence_q + first * p.q_token_stride + h * group * p.q_head_stride, tokens, group, q);
      const bool* mask = p.tile_mask ? p.tile_mask + (start + first) * p.tile_mask_row_stride : nullptr;
      Segment* segments = scratch.take<Segment>(p.tiles);
      AttentionTask task = {};
      task.q = q;
      task.out_token_stride = p.num_q_heads * p.head_dim;
      task.out = static_cast<T*>(p.out) + (start + first) * task.out_token_stride + h * group * p.head_dim;
      task.tokens = tokens;
      task.group = group;
      task.head_dim = p.head_dim;
      task.segments = segments;
      task.num_segments = find_segments<T>(p, b, h, mask, segments);
      task.visible_stride = p.tile_mask_row_stride;
      task.softmax_scale = p.softmax_scale;
      attend<T>(task, scratch);
    }
  });
}

}  // namespace

void cross_attention(const CrossAttentionParams& p) {
  if (p.tokens * p.num_q_heads * p.head_dim == 0) return;
  with_dtype(p.dtype, [&]<typename T>(Type<T>) { run<T>(p); });
}

}  // namespace mllama::MLLAMA_ISA
