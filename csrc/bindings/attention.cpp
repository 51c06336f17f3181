// The attentions.
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
  if (p.tokens == 0) return {out, lse};
  Tensor scratch = workspace(c, p, MLLAMA_CUDA(rotary_attention_workspace));
  launch(c, p, rotary_attention_cpu, MLLAMA_CUDA(rotary_attention_cuda));
  return {out, lse};
}

Tensor rotary_attention_cached(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                               const Tensor& cos_in, const Tensor& sin_in, const Tensor& k_cache,
                               const Tensor& v_cache, const Tensor& page_table,
                               const Tensor& cu_seqlens, const Tensor& cache_lens,
                               int64_t max_seqlen, double softmax_scale, bool interleaved) {
  const Checker c{"rotary_attention_cached", q_in, "q"};
  for (const auto& [t, what] :
       {std::pair<const Tensor&, const char*>{q_in, "q"}, {k_in, "k"}, {v_in, "v"}}) {
    check(t.dim() == 3, c.op, what, " must be (N, H, D), got shape ", shape(t));
  }
  const Tensor q = aligned(q_in), k = aligned(k_in), v = aligned(v_in);
  const Tensor cos = table(c, cos_in, "cos"), sin = table(c, sin_in, "sin");
  check(page_table.dim() == 2 && page_table.is_contiguous(), c.op,
        "page_table must be a contiguous (batch, max_pages) tensor, got shape ", shape(page_table));
  c.typed(page_table, "page_table", ScalarType::Int);
  const int64_t batch = page_table.size(0);
  RotaryAttentionParams p =
      rotary_params(c, q, k, v, cos, sin, true, batch, max_seqlen, softmax_scale, interleaved);
  c.sizes(cu_seqlens, "cu_seqlens", {batch + 1});
  check_cu_seqlens(c, cu_seqlens, p.tokens, max_seqlen);
  c.typed(cache_lens, "cache_lens", ScalarType::Int);
  c.sizes(cache_lens, "cache_lens", {batch});
  check(cache_lens.is_contiguous(), c.op, "cache_lens must be contiguous");
  check(k_cache.dim() == 4, c.op, "k_cache must be (num_pages, Hkv, page_size, D), got shape ",
        shape(k_cache));
  for (const auto& [t, what] :
       {std::pair<const Tensor&, const char*>{k_cache, "k_cache"}, {v_cache, "v_cache"}}) {
    c.floating(t, what);
    c.sizes(t, what, {k_cache.size(0), p.num_kv_heads, k_cache.size(2), p.head_dim});
    check(t.is_contiguous() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, c.op,
          what, " must be contiguous and start on a 16-byte boundary");
  }
  p.num_pages = k_cache.size(0);
  p.page_size = k_cache.size(2);
  p.max_pages = page_table.size(1);
  check(p.page_size > 0 && p.page_size % 16 == 0, c.op,
        "page_size must be a positive multiple of 16, got ", p.page_size);
  if (page_table.is_cpu()) {
    const int32_t* bounds = cu_seqlens.const_data_ptr<int32_t>();
    const int32_t* past = cache_lens.const_data_ptr<int32_t>();
    const int32_t* pages = page_table.const_data_ptr<int32_t>();
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t total = past[b] + bounds[b + 1] - bounds[b];
      check(past[b] >= 0 && total <= p.max_pages * p.page_size, c.op, "sequence ", b,
            " would hold ", total, " tokens; its pages hold ", p.max_pages * p.page_size);
      for (int64_t i = 0; i < ceil_div(total, p.page_size); ++i) {
        const int32_t page = pages[b * p.max_pages + i];
        check(page >= 0 && page < p.num_pages, c.op, "page_table[", b, "][", i, "] is ", page,
              "; the cache has pages 0 to ", p.num_pages - 1);
      }
    }
  }
  Tensor out = torch::stable::new_empty(q, q.sizes());
  p.out = out.mutable_data_ptr();
  p.k_cache = k_cache.mutable_data_ptr();
  p.v_cache = v_cache.mutable_data_ptr();
  p.page_table = page_table.const_data_ptr<int32_t>();
  p.cu_seqlens = cu_seqlens.const_data_ptr<int32_t>();
  p.cache_lens = cache_lens.const_data_ptr<int32_t>();
  if (p.tokens == 0) return out;
  Tensor scratch = workspace(c, p, MLLAMA_CUDA(rotary_attention_workspace));
  launch(c, p, rotary_attention_cpu, MLLAMA_CUDA(rotary_attention_cuda));
  return out;
}

std::tuple<Tensor, Tensor> cross_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const OptionalTensor& tile_mask,
                                           const OptionalTensor& q_norm_weight, double eps,
                                           double softmax_scale, const OptionalTensor& tile_table,
                                           const OptionalTensor& cu_seqlens, int64_t max_seqlen,
                                           bool with_lse) {
  const Checker c{"cross_attention", q, "q"};
  CrossCall call = cross_call(c, q, k, v, tile_mask, q_norm_weight, eps, softmax_scale, tile_table,
                              cu_seqlens, max_seqlen);
  CrossAttentionParams& p = call.params;
  Tensor out = empty_like_contiguous(q), lse = new_lse(c, call.lse_sizes, with_lse);
  p.out = out.mutable_data_ptr();
  p.lse = with_lse ? lse.mutable_data_ptr() : nullptr;
  if (p.tokens == 0) return {out, lse};
  if (p.tiles == 0 || p.tile_tokens == 0) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, HUGE_VAL);
    return {out, lse};
  }
  Tensor scratch = workspace(c, p, MLLAMA_CUDA(cross_attention_workspace));
  launch(c, p, cross_attention_cpu, MLLAMA_CUDA(cross_attention_cuda));
  return {out, lse};
}

std::tuple<Tensor, Tensor> vision_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const OptionalTensor& padding, double softmax_scale,
                                            bool with_lse) {
  const Checker c{"vision_attention", q, "q"};
  VisionCall call = vision_call(c, q, k, v, padding, softmax_scale);
  VisionAttentionParams& p = call.params;
  Tensor out = empty_like_contiguous(q), lse = new_lse(c, call.lse_sizes, with_lse);
  p.out = out.mutable_data_ptr();
  p.lse = with_lse ? lse.mutable_data_ptr() : nullptr;
  if (out.numel() != 0) launch(c, p, vision_attention_cpu, MLLAMA_CUDA(vision_attention_cuda));
  return {out, lse};
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
      "cross_attention(Tensor q, Tensor k, Tensor v, Tensor? tile_mask, Tensor? q_norm_weight, "
      "float eps, float softmax_scale, Tensor? tile_table, Tensor? cu_seqlens, SymInt max_seqlen, "
      "bool with_lse) -> (Tensor, Tensor)");
  m.def(
      "vision_attention(Tensor q, Tensor k, Tensor v, Tensor? padding, float softmax_scale, "
      "bool with_lse) -> (Tensor, Tensor)");
}

MLLAMA_IMPLEMENT(m) {
  m.impl("rotary_attention", TORCH_BOX(&mllama::rotary_attention));
  m.impl("rotary_attention_cached", TORCH_BOX(&mllama::rotary_attention_cached));
  m.impl("cross_attention", TORCH_BOX(&mllama::cross_attention));
  m.impl("vision_attention", TORCH_BOX(&mllama::vision_attention));
}
