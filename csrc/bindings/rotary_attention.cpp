// Causal self-attention, with and without a cache, and its gradients.
#include "attention_call.h"

namespace mllama {
namespace {

std::tuple<Tensor, Tensor> rotary_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& cos, const Tensor& sin,
                                            double softmax_scale, bool interleaved,
                                            const OptionalTensor& cu_seqlens, int64_t max_seqlen,
                                            bool with_lse) {
  const Checker c{"rotary_attention", q, "q"};
  RotaryCall call =
      rotary_call(c, q, k, v, cos, sin, softmax_scale, interleaved, cu_seqlens, max_seqlen);
  RotaryAttentionParams& p = call.params;
  Tensor out = empty_like_contiguous(q), lse = new_lse(c, call.lse_sizes, with_lse);
  p.out = out.mutable_data_ptr();
  p.lse = with_lse ? lse.mutable_data_ptr() : nullptr;
  if (has_no_rows(p)) return seeing_nothing(out, lse);
  Tensor scratch = workspace(c, p, MLLAMA_CUDA(rotary_attention_workspace));
  launch(c, p, rotary_attention_cpu, MLLAMA_CUDA(rotary_attention_cuda));
  return {out, lse};
}

using Named = std::pair<const Tensor&, const char*>;

// The caches are written while the others are read, the tables after they were checked.
void check_apart(const Checker& c, const Tensor& k_cache, const Tensor& v_cache,
                 std::initializer_list<Named> others) {
  const ByteRange k(k_cache), v(v_cache);
  check(!k.overlaps(v), c.op, "k_cache and v_cache must not share memory");
  for (const auto& [t, what] : others) {
    const ByteRange range(t);
    check(!range.overlaps(k) && !range.overlaps(v), c.op, what,
          " must not share memory with the caches, which are written");
  }
}

// Of every sequence: its length with the new tokens, and each page that holds one of them.
void check_pages(const Checker& c, const RotaryAttentionParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t past = p.cache_lens[b];
    const int64_t total = past + (int64_t{p.cu_seqlens[b + 1]} - p.cu_seqlens[b]);
    check(past >= 0, c.op, "cache_lens[", b, "] must not be negative, got ", past);
    const int64_t pages = ceil_div(total, p.page_size);
    if (pages > p.max_pages) {
      check(false, c.op, "sequence ", b, " would hold ", total, " tokens; its pages hold ",
            p.max_pages * p.page_size, " (cache_lens, page_table)");
    }
    for (int64_t i = 0; i < pages; ++i) {
      const int32_t page = p.page_table[b * p.max_pages + i];
      check(page >= 0 && page < p.num_pages, c.op, "page_table[", b, "][", i, "] is ", page,
            "; the cache has pages 0 to ", p.num_pages - 1);
    }
  }
}

Tensor rotary_attention_cached(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                               const Tensor& cos_in, const Tensor& sin_in, const Tensor& k_cache,
                               const Tensor& v_cache, const Tensor& page_table,
                               const Tensor& cu_seqlens, const Tensor& cache_lens,
                               int64_t max_seqlen, double softmax_scale, bool interleaved) {
  const Checker c{"rotary_attention_cached", q_in, "q"};
  check_max_seqlen(c, max_seqlen);
  for (const auto& [t, what] : {Named{q_in, "q"}, {k_in, "k"}, {v_in, "v"}}) {
    c.floating(t, what);
    check(t.dim() == 3, c.op, what, " must be (N, H, D), got shape ", shape(t));
  }
  const int64_t tokens = q_in.size(0), batch = checked_batch(c, cu_seqlens, tokens, max_seqlen);
  const Tensor q = aligned(q_in), k = aligned(k_in), v = aligned(v_in);
  const Tensor cos = table(c, cos_in, "cos"), sin = table(c, sin_in, "sin");
  RotaryAttentionParams p = rotary_params(
      c, q, k, v, cos, sin, true, batch, row_bound(max_seqlen, tokens), softmax_scale, interleaved);
  c.typed(page_table, "page_table", ScalarType::Int);
  check(page_table.dim() == 2 && page_table.size(0) == batch && page_table.is_contiguous(), c.op,
        "page_table must be a contiguous (", batch, ", max_pages) tensor, got shape ",
        shape(page_table));
  c.typed(cache_lens, "cache_lens", ScalarType::Int);
  c.sizes(cache_lens, "cache_lens", {batch});
  check(cache_lens.is_contiguous(), c.op, "cache_lens must be contiguous");
  check(k_cache.dim() == 4, c.op, "k_cache must be (num_pages, Hkv, page_size, D), got shape ",
        shape(k_cache));
  for (const auto& [t, what] : {Named{k_cache, "k_cache"}, {v_cache, "v_cache"}}) {
    c.floating(t, what);
    c.sizes(t, what, {k_cache.size(0), p.num_kv_heads, k_cache.size(2), p.head_dim});
    check(t.is_contiguous() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, c.op,
          what, " must be contiguous and start on a 16-byte boundary");
  }
  check(p.tokens == 0 || p.num_q_heads > 0, c.op, "q must have at least one head, got shape ",
        shape(q_in));
  check_apart(c, k_cache, v_cache,
              {{q_in, "q"},
               {k_in, "k"},
               {v_in, "v"},
               {cos_in, "cos"},
               {sin_in, "sin"},
               {page_table, "page_table"},
               {cu_seqlens, "cu_seqlens"},
               {cache_lens, "cache_lens"}});
  p.num_pages = k_cache.size(0);
  p.page_size = k_cache.size(2);
  p.max_pages = page_table.size(1);
  check(p.page_size > 0 && p.page_size % 16 == 0, c.op,
        "page_size must be a positive multiple of 16, got ", p.page_size);
  check(p.tokens == 0 || p.num_pages > 0, c.op, "k_cache has no pages for ", p.tokens, " tokens");
  p.page_table = page_table.const_data_ptr<int32_t>();
  p.cu_seqlens = cu_seqlens.const_data_ptr<int32_t>();
  p.cache_lens = cache_lens.const_data_ptr<int32_t>();
  if (page_table.is_cpu()) check_pages(c, p);
  Tensor out = torch::stable::new_empty(q, q.sizes());
  if (has_no_rows(p)) return torch::stable::zero_(out);
  p.out = out.mutable_data_ptr();
  p.k_cache = k_cache.mutable_data_ptr();
  p.v_cache = v_cache.mutable_data_ptr();
  Tensor scratch = workspace(c, p, MLLAMA_CUDA(rotary_attention_workspace));
  launch(c, p, rotary_attention_cpu, MLLAMA_CUDA(rotary_attention_cuda));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> rotary_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
    const Tensor& sin, const Tensor& out, const Tensor& lse, double softmax_scale, bool interleaved,
    const OptionalTensor& cu_seqlens, int64_t max_seqlen) {
  const Checker c{"rotary_attention_backward", q, "q"};
  const RotaryCall call =
      rotary_call(c, q, k, v, cos, sin, softmax_scale, interleaved, cu_seqlens, max_seqlen);
  RotaryAttentionBackwardParams p{call.params};
  const Results given = results(c, q, grad_out, out, lse, call.lse_sizes, p);
  Tensor grad_q = empty_like_contiguous(q), grad_k = empty_like_contiguous(k),
         grad_v = empty_like_contiguous(v);
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_k = grad_k.mutable_data_ptr();
  p.grad_v = grad_v.mutable_data_ptr();
  if (q.numel() == 0 || has_no_rows(p)) {
    for (Tensor* grad : {&grad_q, &grad_k, &grad_v}) torch::stable::zero_(*grad);
    return {grad_q, grad_k, grad_v};
  }
  Tensor scratch = workspace(c, p, MLLAMA_CUDA(rotary_attention_backward_workspace));
  launch(c, p, rotary_attention_backward_cpu, MLLAMA_CUDA(rotary_attention_backward_cuda));
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace mllama

STABLE_TORCH_LIBRARY_FRAGMENT(mllama_kernels, m) {
  m.def(
      "rotary_attention(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, float softmax_scale, "
      "bool interleaved, Tensor? cu_seqlens, SymInt max_seqlen, bool with_lse) -> (Tensor, "
      "Tensor)");
  m.def(
      "rotary_attention_cached(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, "
      "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor page_table, Tensor cu_seqlens, "
      "Tensor cache_lens, SymInt max_seqlen, float softmax_scale, bool interleaved) -> Tensor");
  m.def(
      "rotary_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor cos, "
      "Tensor sin, Tensor out, Tensor lse, float softmax_scale, bool interleaved, "
      "Tensor? cu_seqlens, SymInt max_seqlen) -> (Tensor, Tensor, Tensor)");
}

MLLAMA_IMPLEMENT(m) {
  m.impl("rotary_attention", TORCH_BOX(&mllama::rotary_attention));
  m.impl("rotary_attention_cached", TORCH_BOX(&mllama::rotary_attention_cached));
  m.impl("rotary_attention_backward", TORCH_BOX(&mllama::rotary_attention_backward));
}
