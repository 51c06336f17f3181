// The attentions.
#include "../cross_attention.h"
#include "../rotary_attention.h"
#include "../vision_attention.h"
#include "checks.h"

namespace mllama {
namespace {

// cu_seqlens (batch + 1,) over `tokens` rows. Values are checked where the host can read them.
void check_cu_seqlens(const Checker& c, const Tensor& cu_seqlens, int64_t tokens,
                      int64_t max_seqlen) {
  c.typed(cu_seqlens, "cu_seqlens", ScalarType::Int);
  check(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 && cu_seqlens.is_contiguous(), c.op,
        "cu_seqlens must be a contiguous (batch + 1,) tensor, got shape ", shape(cu_seqlens));
  if (!cu_seqlens.is_cpu()) return;
  const int32_t* bounds = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t last = cu_seqlens.size(0) - 1;
  check(bounds[0] == 0 && bounds[last] == tokens, c.op, "cu_seqlens must run from 0 to ", tokens,
        ", got ", bounds[0], " to ", bounds[last]);
  for (int64_t b = 0; b < last; ++b) {
    const int64_t length = bounds[b + 1] - bounds[b];
    check(length >= 0 && length <= max_seqlen, c.op, "sequence ", b, " has ", length,
          " rows; max_seqlen says 0 to ", max_seqlen);
  }
}

const int32_t* int_data(const OptionalTensor& t) {
  return t ? t->const_data_ptr<int32_t>() : nullptr;
}

template <typename Params>
Tensor workspace(const Checker& c, Params& p,
                 std::type_identity_t<int64_t (*)(const Params&)> bytes) {
  const int64_t size = c.runs_on_cpu() || bytes == nullptr ? 0 : bytes(p);
  Tensor buffer = torch::stable::new_empty(c.lead, {size}, ScalarType::Byte);
  p.workspace = buffer.mutable_data_ptr();
  return buffer;
}

// q, k, v of rotary attention: dense (B, L, H, D) or packed (N, H, D).
RotaryAttentionParams rotary_params(const Checker& c, const Tensor& q, const Tensor& k,
                                    const Tensor& v, const Tensor& cos, const Tensor& sin,
                                    bool packed, int64_t batch, int64_t max_seqlen,
                                    double softmax_scale, bool interleaved) {
  const int64_t n = q.dim() - 1;  // index of the head dimension
  const int64_t d = q.size(n), heads = q.size(n - 1), kv_heads = k.size(n - 1);
  c.head_dim(d);
  c.heads(heads, kv_heads);
  c.softmax_scale(softmax_scale);
  check(max_seqlen >= 0, c.op, "max_seqlen must not be negative, got ", max_seqlen);
  for (const auto& [t, what] : {std::pair<const Tensor&, const char*>{k, "k"}, {v, "v"}}) {
    c.floating(t, what);
    c.last_contiguous(t, what);
    packed ? c.sizes(t, what, {q.size(0), kv_heads, d})
           : c.sizes(t, what, {q.size(0), q.size(1), kv_heads, d});
  }
  c.last_contiguous(q, "q");
  for (const auto& [t, what] : {std::pair<const Tensor&, const char*>{cos, "cos"}, {sin, "sin"}}) {
    c.floating(t, what);
    packed ? c.sizes(t, what, {q.size(0), d / 2})
           : c.sizes(t, what, {cos.size(0), q.size(1), d / 2});
  }
  check(packed || cos.size(0) == q.size(0) || cos.size(0) == 1, c.op,
        "cos must have batch size 1 or ", q.size(0), ", got ", cos.size(0));
  RotaryAttentionParams p{};
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.cos = cos.const_data_ptr();
  p.sin = sin.const_data_ptr();
  p.tokens = packed ? q.size(0) : q.size(0) * q.size(1);
  p.batch = batch;
  p.max_seqlen = max_seqlen;
  p.num_q_heads = heads;
  p.num_kv_heads = kv_heads;
  p.head_dim = d;
  p.q_batch_stride = packed ? 0 : q.stride(0);
  p.q_token_stride = q.stride(n - 2);
  p.q_head_stride = q.stride(n - 1);
  p.k_batch_stride = packed ? 0 : k.stride(0);
  p.k_token_stride = k.stride(n - 2);
  p.k_head_stride = k.stride(n - 1);
  p.v_batch_stride = packed ? 0 : v.stride(0);
  p.v_token_stride = v.stride(n - 2);
  p.v_head_stride = v.stride(n - 1);
  p.cos_rows = packed ? cos.size(0) : cos.size(0) * cos.size(1);
  p.cos_row_stride = cos.stride(cos.dim() - 2);
  p.sin_row_stride = sin.stride(sin.dim() - 2);
  p.softmax_scale = softmax_scale;
  p.interleaved = interleaved;
  p.dtype = c.dtype();
  return p;
}

// Tables of angles: rows at one stride, each on a 16-byte boundary.
Tensor table(const Checker& c, const Tensor& t, const char* what) {
  check(t.dim() == 2 || t.dim() == 3, c.op, what, " must have 2 or 3 dimensions, got shape ",
        shape(t));
  const bool uniform = t.dim() == 2 || t.size(0) == 1 || t.stride(0) == t.stride(1) * t.size(1);
  return uniform && t.stride(t.dim() - 1) == 1 ? aligned(t) : torch::stable::contiguous(t);
}

Tensor rotary_attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                        const Tensor& cos_in, const Tensor& sin_in, double softmax_scale,
                        bool interleaved, const OptionalTensor& cu_seqlens, int64_t max_seqlen) {
  const Checker c{"rotary_attention", q_in, "q"};
  const bool packed = cu_seqlens.has_value();
  for (const auto& [t, what] :
       {std::pair<const Tensor&, const char*>{q_in, "q"}, {k_in, "k"}, {v_in, "v"}}) {
    check(t.dim() == (packed ? 3 : 4), c.op, what, " must be ",
          packed ? "(N, H, D) with cu_seqlens" : "(B, L, H, D)", ", got shape ", shape(t));
  }
  const Tensor q = aligned(q_in), k = aligned(k_in), v = aligned(v_in);
  const Tensor cos = table(c, cos_in, "cos"), sin = table(c, sin_in, "sin");
  const int64_t batch = packed ? cu_seqlens->size(0) - 1 : q.size(0);
  RotaryAttentionParams p =
      rotary_params(c, q, k, v, cos, sin, packed, batch, packed ? max_seqlen : q.size(1),
                    softmax_scale, interleaved);
  if (packed) check_cu_seqlens(c, *cu_seqlens, p.tokens, max_seqlen);
  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor rotated = torch::stable::new_empty(q, {p.tokens, p.num_kv_heads, p.head_dim});
  p.out = out.mutable_data_ptr();
  p.k_cache = rotated.mutable_data_ptr();
  p.cu_seqlens = int_data(cu_seqlens);
  if (p.tokens == 0) return out;
  Tensor scratch = workspace(c, p, MLLAMA_CUDA(rotary_attention_workspace));
  launch(c, p, rotary_attention_cpu, MLLAMA_CUDA(rotary_attention_cuda));
  return out;
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

// ---------------------------------------------------------------- cross_attention

// Dense k, v (B, T, P, H, D) as slots (B * T, P, H, D): one stride must reach every tile.
Tensor slots(const Tensor& t) {
  const bool uniform = t.size(0) <= 1 || t.stride(0) == t.stride(1) * t.size(1);
  return aligned(uniform && t.stride(4) == 1 ? t : torch::stable::contiguous(t));
}

Tensor cross_attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                       const OptionalTensor& tile_mask_in, const OptionalTensor& q_norm_weight_in,
                       double eps, double softmax_scale, const OptionalTensor& tile_table,
                       const OptionalTensor& cu_seqlens, int64_t max_seqlen) {
  const Checker c{"cross_attention", q_in, "q"};
  const bool packed = tile_table.has_value();
  check(packed == cu_seqlens.has_value(), c.op,
        "tile_table and cu_seqlens are given together or not at all");
  check(q_in.dim() == (packed ? 3 : 4), c.op, "q must be ",
        packed ? "(N, Hq, D) with tile_table" : "(B, Lq, Hq, D)", ", got shape ", shape(q_in));
  check(k_in.dim() == (packed ? 4 : 5), c.op, "k must be ",
        packed ? "(num_slots, P, Hkv, D) with tile_table" : "(B, T, P, Hkv, D)", ", got shape ",
        shape(k_in));
  const int64_t n = q_in.dim() - 1, m = k_in.dim() - 1;
  const int64_t d = q_in.size(n), heads = q_in.size(n - 1), kv_heads = k_in.size(m - 1);
  c.head_dim(d);
  c.heads(heads, kv_heads);
  c.softmax_scale(softmax_scale);
  c.last_contiguous(q_in, "q");
  for (const auto& [t, what] : {std::pair<const Tensor&, const char*>{k_in, "k"}, {v_in, "v"}}) {
    c.floating(t, what);
    c.last_contiguous(t, what);
    packed ? c.sizes(t, what, {k_in.size(0), k_in.size(1), kv_heads, d})
           : c.sizes(t, what, {q_in.size(0), k_in.size(1), k_in.size(2), kv_heads, d});
  }
  check(eps >= 0, c.op, "eps must not be negative, got ", eps);
  CrossAttentionParams p{};
  p.tokens = packed ? q_in.size(0) : q_in.size(0) * q_in.size(1);
  p.batch = packed ? cu_seqlens->size(0) - 1 : q_in.size(0);
  p.max_seqlen = packed ? max_seqlen : q_in.size(1);
  if (packed) {
    check_cu_seqlens(c, *cu_seqlens, p.tokens, max_seqlen);
    c.typed(*tile_table, "tile_table", ScalarType::Int);
    check(tile_table->dim() == 2 && tile_table->size(0) == p.batch && tile_table->is_contiguous(),
          c.op, "tile_table must be a contiguous (", p.batch, ", T) tensor, got shape ",
          shape(*tile_table));
    if (tile_table->is_cpu()) {
      const int32_t* slot = tile_table->const_data_ptr<int32_t>();
      for (int64_t i = 0; i < tile_table->numel(); ++i) {
        check(slot[i] >= -1 && slot[i] < k_in.size(0), c.op, "tile_table holds slot ", slot[i],
              "; k has slots 0 to ", k_in.size(0) - 1, " and -1 means absent");
      }
    }
  }
  p.tiles = packed ? tile_table->size(1) : k_in.size(1);
  OptionalTensor tile_mask, q_norm_weight;
  if (tile_mask_in) {
    c.typed(*tile_mask_in, "tile_mask", ScalarType::Bool);
    packed ? c.sizes(*tile_mask_in, "tile_mask", {p.tokens, p.tiles})
           : c.sizes(*tile_mask_in, "tile_mask", {q_in.size(0), q_in.size(1), p.tiles});
    tile_mask = torch::stable::contiguous(*tile_mask_in);
    p.tile_mask_row_stride = p.tiles;
  }
  if (q_norm_weight_in) {
    c.floating(*q_norm_weight_in, "q_norm_weight");
    c.sizes(*q_norm_weight_in, "q_norm_weight", {d});
    q_norm_weight = aligned(*q_norm_weight_in);
  }
  const Tensor q = aligned(q_in);
  const Tensor k = packed ? aligned(k_in) : slots(k_in);
  const Tensor v = packed ? aligned(v_in) : slots(v_in);
  Tensor out = torch::stable::new_empty(q, q.sizes());
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.q_norm_weight = data(q_norm_weight);
  p.out = out.mutable_data_ptr();
  p.tile_mask = static_cast<const bool*>(data(tile_mask));
  p.tile_table = int_data(tile_table);
  p.cu_seqlens = int_data(cu_seqlens);
  p.num_slots = packed ? k.size(0) : p.batch * p.tiles;
  p.tile_tokens = k.size(m - 2);
  p.num_q_heads = heads;
  p.num_kv_heads = kv_heads;
  p.head_dim = d;
  p.q_batch_stride = packed ? 0 : q.stride(0);
  p.q_token_stride = q.stride(n - 2);
  p.q_head_stride = q.stride(n - 1);
  p.k_slot_stride = k.stride(m - 3);
  p.k_token_stride = k.stride(m - 2);
  p.k_head_stride = k.stride(m - 1);
  p.v_slot_stride = v.stride(m - 3);
  p.v_token_stride = v.stride(m - 2);
  p.v_head_stride = v.stride(m - 1);
  p.eps = eps;
  p.softmax_scale = softmax_scale;
  p.dtype = c.dtype();
  if (p.tokens == 0) return out;
  if (p.tiles == 0 || p.tile_tokens == 0) {
    torch::stable::zero_(out);
    return out;
  }
  Tensor scratch = workspace(c, p, MLLAMA_CUDA(cross_attention_workspace));
  launch(c, p, cross_attention_cpu, MLLAMA_CUDA(cross_attention_cuda));
  return out;
}

// ---------------------------------------------------------------- vision_attention

Tensor vision_attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                        const OptionalTensor& padding_in, double softmax_scale) {
  const Checker c{"vision_attention", q_in, "q"};
  check(q_in.dim() == 4, c.op, "q must be (B, S, H, D), got shape ", shape(q_in));
  c.last_contiguous(q_in, "q");
  for (const auto& [t, what] : {std::pair<const Tensor&, const char*>{k_in, "k"}, {v_in, "v"}}) {
    c.floating(t, what);
    c.sizes(t, what, {q_in.size(0), q_in.size(1), q_in.size(2), q_in.size(3)});
    c.last_contiguous(t, what);
  }
  c.head_dim(q_in.size(3));
  c.softmax_scale(softmax_scale);
  const Tensor q = aligned(q_in), k = aligned(k_in), v = aligned(v_in);
  OptionalTensor padding;
  if (padding_in) {
    c.typed(*padding_in, "padding", ScalarType::Bool);
    c.sizes(*padding_in, "padding", {q.size(0), q.size(1)});
    padding = torch::stable::contiguous(*padding_in);
  }
  Tensor out = torch::stable::new_empty(q, q.sizes());
  VisionAttentionParams p{};
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.padding = static_cast<const bool*>(data(padding));
  p.out = out.mutable_data_ptr();
  p.batch = q.size(0);
  p.seqlen = q.size(1);
  p.num_heads = q.size(2);
  p.head_dim = q.size(3);
  p.q_batch_stride = q.stride(0);
  p.q_token_stride = q.stride(1);
  p.q_head_stride = q.stride(2);
  p.k_batch_stride = k.stride(0);
  p.k_token_stride = k.stride(1);
  p.k_head_stride = k.stride(2);
  p.v_batch_stride = v.stride(0);
  p.v_token_stride = v.stride(1);
  p.v_head_stride = v.stride(2);
  p.padding_batch_stride = p.seqlen;
  p.softmax_scale = softmax_scale;
  p.dtype = c.dtype();
  if (out.numel() != 0) launch(c, p, vision_attention_cpu, MLLAMA_CUDA(vision_attention_cuda));
  return out;
}

}  // namespace
}  // namespace mllama

STABLE_TORCH_LIBRARY_FRAGMENT(mllama_kernels, m) {
  m.def(
      "rotary_attention(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, float softmax_scale, "
      "bool interleaved, Tensor? cu_seqlens, int max_seqlen) -> Tensor");
  m.def(
      "rotary_attention_cached(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, "
      "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor page_table, Tensor cu_seqlens, "
      "Tensor cache_lens, int max_seqlen, float softmax_scale, bool interleaved) -> Tensor");
  m.def(
      "cross_attention(Tensor q, Tensor k, Tensor v, Tensor? tile_mask, Tensor? q_norm_weight, "
      "float eps, float softmax_scale, Tensor? tile_table, Tensor? cu_seqlens, int max_seqlen) "
      "-> Tensor");
  m.def(
      "vision_attention(Tensor q, Tensor k, Tensor v, Tensor? padding, float softmax_scale) -> "
      "Tensor");
}

MLLAMA_IMPLEMENT(m) {
  m.impl("rotary_attention", TORCH_BOX(&mllama::rotary_attention));
  m.impl("rotary_attention_cached", TORCH_BOX(&mllama::rotary_attention_cached));
  m.impl("cross_attention", TORCH_BOX(&mllama::cross_attention));
  m.impl("vision_attention", TORCH_BOX(&mllama::vision_attention));
}
