// What the bindings of the attentions and of their gradients share: a call's tensors, checked, and
// the parameters that the kernels get.
#pragma once

#include "../cross_attention.h"
#include "../rotary_attention.h"
#include "../vision_attention.h"
#include "checks.h"

namespace mllama {

// How many sequences cu_seqlens (batch + 1,) cuts `tokens` rows into. Values are checked where the
// host can read them.
inline int64_t checked_batch(const Checker& c, const Tensor& cu_seqlens, int64_t tokens,
                             int64_t max_seqlen) {
  c.typed(cu_seqlens, "cu_seqlens", ScalarType::Int);
  check(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 && cu_seqlens.is_contiguous(), c.op,
        "cu_seqlens must be a contiguous (batch + 1,) tensor, got shape ", shape(cu_seqlens));
  const int64_t batch = cu_seqlens.size(0) - 1;
  if (!cu_seqlens.is_cpu()) return batch;
  const int32_t* bounds = cu_seqlens.const_data_ptr<int32_t>();
  check(bounds[0] == 0 && bounds[batch] == tokens, c.op, "cu_seqlens must run from 0 to ", tokens,
        ", got ", bounds[0], " to ", bounds[batch]);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = int64_t{bounds[b + 1]} - bounds[b];
    check(length >= 0 && length <= max_seqlen, c.op, "by cu_seqlens sequence ", b, " has ", length,
          " rows; max_seqlen says 0 to ", max_seqlen);
  }
  return batch;
}

// The bound on the rows of a packed sequence as the kernels get it: no more than there are. It does
// not become 1, which chooses the kernels of decoding, unless the caller says so.
inline int64_t row_bound(int64_t max_seqlen, int64_t tokens) {
  return std::min(max_seqlen, std::max<int64_t>(tokens, 2));
}

inline void check_max_seqlen(const Checker& c, int64_t max_seqlen) {
  check(max_seqlen >= 0, c.op, "max_seqlen must not be negative, got ", max_seqlen);
}

// Whether no sequence has a row: whatever the tables of a GPU hold, there is nothing to launch.
template <typename Params>
bool has_no_rows(const Params& p) {
  return p.tokens == 0 || p.batch == 0 || p.max_seqlen == 0;
}

inline bool has_no_keys(const CrossAttentionParams& p) {
  return p.tiles == 0 || p.tile_tokens == 0 || p.num_slots == 0;
}

inline const int32_t* int_data(const OptionalTensor& t) {
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

// The log-sum-exp of each query in `sizes`, (B, H, L) or (H, N); empty when not wanted.
inline Tensor new_lse(const Checker& c, std::vector<int64_t> sizes, bool wanted) {
  if (!wanted) sizes = {0};
  const bool wide = c.dtype() == DType::kFloat64;
  return torch::stable::new_empty(c.lead, sizes, wide ? ScalarType::Double : ScalarType::Float);
}

// What a forward call gave for q, and the gradient of it.
struct Results {
  Tensor grad_out, out, lse;
};

template <typename BackwardParams>
Results results(const Checker& c, const Tensor& q, const Tensor& grad_out, const Tensor& out,
                const Tensor& lse, const std::vector<int64_t>& lse_sizes, BackwardParams& p) {
  const std::vector<int64_t> sizes(q.sizes().begin(), q.sizes().end());
  c.floating(grad_out, "grad_out");
  c.sizes(grad_out, "grad_out", sizes);
  c.floating(out, "out");
  c.sizes(out, "out", sizes);
  c.typed(lse, "lse", p.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float);
  c.sizes(lse, "lse", lse_sizes);
  const int64_t n = q.dim() - 1;
  Results r{aligned(with_contiguous_rows(grad_out)), aligned(torch::stable::contiguous(out)),
            torch::stable::contiguous(lse)};
  p.grad_out = r.grad_out.const_data_ptr();
  p.grad_out_batch_stride = n == 3 ? stride(r.grad_out, 0) : 0;
  p.grad_out_token_stride = stride(r.grad_out, n - 2);
  p.grad_out_head_stride = stride(r.grad_out, n - 1);
  p.out = const_cast<void*>(r.out.const_data_ptr());  // read alone
  p.lse = const_cast<void*>(r.lse.const_data_ptr());
  return r;
}

// ---------------------------------------------------------------- rotary_attention

// Tables of angles: rows at one stride, each on a 16-byte boundary.
inline Tensor table(const Checker& c, const Tensor& t, const char* what) {
  c.floating(t, what);
  check(t.dim() == 2 || t.dim() == 3, c.op, what, " must have 2 or 3 dimensions, got shape ",
        shape(t));
  const bool uniform = t.dim() == 2 || joint_stride(t, 0);
  return uniform && rows_contiguous(t) ? aligned(t) : torch::stable::contiguous(t);
}

// Between the rows of such a table.
inline int64_t table_stride(const Tensor& t) {
  return t.dim() == 2 ? stride(t, 0) : joint_stride(t, 0).value();
}

// q, k, v of rotary attention: dense (B, L, H, D) or packed (N, H, D).
inline RotaryAttentionParams rotary_params(const Checker& c, const Tensor& q, const Tensor& k,
                                           const Tensor& v, const Tensor& cos, const Tensor& sin,
                                           bool packed, int64_t batch, int64_t max_seqlen,
                                           double softmax_scale, bool interleaved) {
  const int64_t n = q.dim() - 1;  // index of the head dimension
  const int64_t d = q.size(n), heads = q.size(n - 1), kv_heads = k.size(n - 1);
  c.head_dim(d);
  c.heads(heads, kv_heads);
  c.softmax_scale(softmax_scale);
  for (const auto& [t, what] : {std::pair<const Tensor&, const char*>{k, "k"}, {v, "v"}}) {
    c.last_contiguous(t, what);
    packed ? c.sizes(t, what, {q.size(0), kv_heads, d})
           : c.sizes(t, what, {q.size(0), q.size(1), kv_heads, d});
  }
  c.last_contiguous(q, "q");
  for (const auto& [t, what] : {std::pair<const Tensor&, const char*>{cos, "cos"}, {sin, "sin"}}) {
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
  p.q_batch_stride = packed ? 0 : stride(q, 0);
  p.q_token_stride = stride(q, n - 2);
  p.q_head_stride = stride(q, n - 1);
  p.k_batch_stride = packed ? 0 : stride(k, 0);
  p.k_token_stride = stride(k, n - 2);
  p.k_head_stride = stride(k, n - 1);
  p.v_batch_stride = packed ? 0 : stride(v, 0);
  p.v_token_stride = stride(v, n - 2);
  p.v_head_stride = stride(v, n - 1);
  p.cos_rows = packed ? cos.size(0) : cos.size(0) * cos.size(1);
  p.cos_row_stride = table_stride(cos);
  p.sin_row_stride = table_stride(sin);
  p.softmax_scale = softmax_scale;
  p.interleaved = interleaved;
  p.dtype = c.dtype();
  return p;
}

struct RotaryCall {
  Tensor q, k, v, cos, sin, rotated_k;
  std::vector<int64_t> lse_sizes;
  RotaryAttentionParams params;
};

inline RotaryCall rotary_call(const Checker& c, const Tensor& q, const Tensor& k, const Tensor& v,
                              const Tensor& cos, const Tensor& sin, double softmax_scale,
                              bool interleaved, const OptionalTensor& cu_seqlens,
                              int64_t max_seqlen) {
  const bool packed = cu_seqlens.has_value();
  check_max_seqlen(c, max_seqlen);
  for (const auto& [t, what] :
       {std::pair<const Tensor&, const char*>{q, "q"}, {k, "k"}, {v, "v"}}) {
    c.floating(t, what);
    check(t.dim() == (packed ? 3 : 4), c.op, what, " must be ",
          packed ? "(N, H, D) with cu_seqlens" : "(B, L, H, D)", ", got shape ", shape(t));
  }
  const int64_t batch = packed ? checked_batch(c, *cu_seqlens, q.size(0), max_seqlen) : q.size(0);
  const int64_t longest = packed ? row_bound(max_seqlen, q.size(0)) : q.size(1);
  RotaryCall call{aligned(q), aligned(k), aligned(v), table(c, cos, "cos"), table(c, sin, "sin")};
  RotaryAttentionParams& p = call.params;
  p = rotary_params(c, call.q, call.k, call.v, call.cos, call.sin, packed, batch, longest,
                    softmax_scale, interleaved);
  call.rotated_k = torch::stable::new_empty(call.q, {p.tokens, p.num_kv_heads, p.head_dim});
  call.lse_sizes = packed ? std::vector{p.num_q_heads, p.tokens}
                          : std::vector{batch, p.num_q_heads, p.max_seqlen};
  p.k_cache = call.rotated_k.mutable_data_ptr();
  p.cu_seqlens = int_data(cu_seqlens);
  return call;
}

// ---------------------------------------------------------------- cross_attention

// Dense k, v (B, T, P, H, D) as slots (B * T, P, H, D): one stride must reach every tile.
inline Tensor slots(const Tensor& t) {
  return aligned(joint_stride(t, 0) && rows_contiguous(t) ? t : torch::stable::contiguous(t));
}

// Between such slots, or those of a pool (num_slots, P, H, D).
inline int64_t slot_stride(const Tensor& t) {
  return t.dim() == 4 ? stride(t, 0) : joint_stride(t, 0).value();
}

struct CrossCall {
  Tensor q, k, v;
  OptionalTensor tile_mask, q_norm_weight;
  std::vector<int64_t> lse_sizes;
  CrossAttentionParams params;
};

inline CrossCall cross_call(const Checker& c, const Tensor& q_in, const Tensor& k_in,
                            const Tensor& v_in, const OptionalTensor& tile_mask,
                            const OptionalTensor& q_norm_weight, double eps, double softmax_scale,
                            const OptionalTensor& tile_table, const OptionalTensor& cu_seqlens,
                            int64_t max_seqlen) {
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
    packed ? c.sizes(t, what, {k_in.size(0), k_in.size(1), kv_heads, d})
           : c.sizes(t, what, {q_in.size(0), k_in.size(1), k_in.size(2), kv_heads, d});
    c.last_contiguous(t, what);
  }
  c.eps(eps);
  check_max_seqlen(c, max_seqlen);
  CrossCall call{};
  CrossAttentionParams& p = call.params;
  p.tokens = packed ? q_in.size(0) : q_in.size(0) * q_in.size(1);
  p.batch = packed ? checked_batch(c, *cu_seqlens, p.tokens, max_seqlen) : q_in.size(0);
  p.max_seqlen = packed ? row_bound(max_seqlen, p.tokens) : q_in.size(1);
  if (packed) {
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
  if (tile_mask) {
    packed ? c.sizes(*tile_mask, "tile_mask", {p.tokens, p.tiles})
           : c.sizes(*tile_mask, "tile_mask", {q_in.size(0), q_in.size(1), p.tiles});
    call.tile_mask = c.bools(*tile_mask, "tile_mask");
    p.tile_mask_row_stride = p.tiles;
  }
  if (q_norm_weight) {
    c.floating(*q_norm_weight, "q_norm_weight");
    c.sizes(*q_norm_weight, "q_norm_weight", {d});
    call.q_norm_weight = aligned(torch::stable::contiguous(*q_norm_weight));
  }
  const Tensor& q = call.q = aligned(q_in);
  const Tensor& k = call.k = packed ? aligned(k_in) : slots(k_in);
  const Tensor& v = call.v = packed ? aligned(v_in) : slots(v_in);
  call.lse_sizes = packed ? std::vector{heads, p.tokens} : std::vector{p.batch, heads, q.size(1)};
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.q_norm_weight = data(call.q_norm_weight);
  p.tile_mask = static_cast<const bool*>(data(call.tile_mask));
  p.tile_table = int_data(tile_table);
  p.cu_seqlens = int_data(cu_seqlens);
  p.num_slots = packed ? k.size(0) : p.batch * p.tiles;
  p.tile_tokens = k.size(m - 2);
  p.num_q_heads = heads;
  p.num_kv_heads = kv_heads;
  p.head_dim = d;
  p.q_batch_stride = packed ? 0 : stride(q, 0);
  p.q_token_stride = stride(q, n - 2);
  p.q_head_stride = stride(q, n - 1);
  p.k_slot_stride = slot_stride(k);
  p.k_token_stride = stride(k, m - 2);
  p.k_head_stride = stride(k, m - 1);
  p.v_slot_stride = slot_stride(v);
  p.v_token_stride = stride(v, m - 2);
  p.v_head_stride = stride(v, m - 1);
  p.eps = eps;
  p.softmax_scale = softmax_scale;
  p.dtype = c.dtype();
  return call;
}

// ---------------------------------------------------------------- vision_attention

struct VisionCall {
  Tensor q, k, v;
  OptionalTensor padding;
  std::vector<int64_t> lse_sizes;
  VisionAttentionParams params;
};

inline VisionCall vision_call(const Checker& c, const Tensor& q_in, const Tensor& k_in,
                              const Tensor& v_in, const OptionalTensor& padding,
                              double softmax_scale) {
  check(q_in.dim() == 4, c.op, "q must be (B, S, H, D), got shape ", shape(q_in));
  c.last_contiguous(q_in, "q");
  for (const auto& [t, what] : {std::pair<const Tensor&, const char*>{k_in, "k"}, {v_in, "v"}}) {
    c.floating(t, what);
    c.sizes(t, what, {q_in.size(0), q_in.size(1), q_in.size(2), q_in.size(3)});
    c.last_contiguous(t, what);
  }
  c.head_dim(q_in.size(3));
  c.softmax_scale(softmax_scale);
  VisionCall call{aligned(q_in), aligned(k_in), aligned(v_in)};
  const Tensor &q = call.q, &k = call.k, &v = call.v;
  if (padding) {
    c.sizes(*padding, "padding", {q.size(0), q.size(1)});
    call.padding = c.bools(*padding, "padding");
  }
  call.lse_sizes = {q.size(0), q.size(2), q.size(1)};
  VisionAttentionParams& p = call.params;
  p = {};
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.padding = static_cast<const bool*>(data(call.padding));
  p.batch = q.size(0);
  p.seqlen = q.size(1);
  p.num_heads = q.size(2);
  p.head_dim = q.size(3);
  p.q_batch_stride = stride(q, 0);
  p.q_token_stride = stride(q, 1);
  p.q_head_stride = stride(q, 2);
  p.k_batch_stride = stride(k, 0);
  p.k_token_stride = stride(k, 1);
  p.k_head_stride = stride(k, 2);
  p.v_batch_stride = stride(v, 0);
  p.v_token_stride = stride(v, 1);
  p.v_head_stride = stride(v, 2);
  p.padding_batch_stride = p.seqlen;
  p.softmax_scale = softmax_scale;
  p.dtype = c.dtype();
  return call;
}

// The results of rows none of which sees a key.
inline std::tuple<Tensor, Tensor> seeing_nothing(Tensor& out, Tensor& lse) {
  torch::stable::zero_(out);
  torch::stable::fill_(lse, HUGE_VAL);
  return {out, lse};
}

}  // namespace mllama
