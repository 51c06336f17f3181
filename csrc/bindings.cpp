// The only file that knows torch: schemas, checks, allocation, dispatch keys. LibTorch stable ABI,
// so one binary serves every torch from 2.11 on. Each op is checked once, here, for both devices.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "build_info.h"
#include "cross_attention.h"
#include "gated_residual.h"
#include "patch_embed.h"
#include "rms_norm.h"
#include "rotary_attention.h"
#include "sample.h"
#include "sample_math.h"
#include "skinny_linear.h"
#include "swiglu.h"
#include "vision_attention.h"

#ifdef MLLAMA_WITH_CUDA
// Weak: CPU builds of torch have no CUDA streams, yet must load a library that was built with CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#define MLLAMA_CUDA(function) function
#else
#define MLLAMA_CUDA(function) nullptr
#endif

namespace mllama {

void parallel_for(int64_t begin, int64_t end, int64_t grain_size,
                  void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(begin, end, grain_size,
                              [=](int64_t b, int64_t e) { body(b, e, context); });
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename... Args>
void check(bool condition, const char* op, const Args&... message) {
  if (condition) return;
  std::ostringstream text;
  text << "mllama_kernels." << op << ": ";
  ((text << message), ...);
  throw std::runtime_error(text.str());
}

std::string shape(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << (t.dim() == 1 ? ",)" : ")");
  return text.str();
}

const char* name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

// One call's op name and the tensor that fixes dtype and device.
struct Checker {
  const char* op;
  const Tensor& lead;
  const char* lead_name;

  DType dtype() const {
    const ScalarType type = lead.scalar_type();
    if (type == ScalarType::Float) return DType::kFloat32;
    if (type == ScalarType::Half) return DType::kFloat16;
    if (type == ScalarType::BFloat16) return DType::kBFloat16;
    check(type == ScalarType::Double && runs_on_cpu(), op, lead_name,
          " must be float32, float16 or bfloat16", runs_on_cpu() ? " or float64" : "", ", got ",
          name(type));
    return DType::kFloat64;
  }

  bool runs_on_cpu() const {
#ifdef MLLAMA_SIMULATE
    return false;
#else
    return lead.is_cpu();
#endif
  }

  void device(const Tensor& t, const char* what) const {
    check(t.is_cpu() == lead.is_cpu() && t.get_device_index() == lead.get_device_index(), op, what,
          " must be on the device of ", lead_name);
  }

  void floating(const Tensor& t, const char* what) const {
    device(t, what);
    check(t.scalar_type() == lead.scalar_type(), op, what, " must have the dtype of ", lead_name,
          ", ", name(lead.scalar_type()), ", got ", name(t.scalar_type()));
  }

  void typed(const Tensor& t, const char* what, ScalarType type) const {
    device(t, what);
    check(t.scalar_type() == type, op, what, " must be ", name(type), ", got ",
          name(t.scalar_type()));
  }

  void sizes(const Tensor& t, const char* what, std::initializer_list<int64_t> want) const {
    bool equal = t.dim() == static_cast<int64_t>(want.size());
    int64_t i = 0;
    for (int64_t size : want) equal = equal && t.size(i++) == size;
    if (equal) return;
    std::ostringstream text;
    i = 0;
    for (int64_t size : want) text << (i++ ? ", " : "") << size;
    check(false, op, what, " must have shape (", text.str(), want.size() == 1 ? ",)" : ")",
          ", got ", shape(t));
  }

  void last_contiguous(const Tensor& t, const char* what) const {
    check(t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) <= 1, op, what,
          " must be contiguous in its last dimension, got stride ", t.stride(t.dim() - 1));
  }

  void head_dim(int64_t d) const {
    if (runs_on_cpu()) {
      check(d >= 8 && d <= 256 && d % 8 == 0, op,
            "head_dim must be a multiple of 8 from 8 to 256 on CPU, got ", d);
    } else {
      check(d == 64 || d == 80 || d == 128, op, "head_dim must be 64, 80 or 128 on CUDA, got ", d);
    }
  }

  void softmax_scale(double scale) const {
    check(scale > 0 && std::isfinite(scale), op, "softmax_scale must be positive, got ", scale);
  }

  void heads(int64_t q_heads, int64_t kv_heads) const {
    check(kv_heads > 0 && q_heads % kv_heads == 0, op, "the number of key/value heads (", kv_heads,
          ") must divide the number of query heads (", q_heads, ")");
    check(runs_on_cpu() || q_heads / kv_heads <= 16, op,
          "at most 16 query heads may share a key/value head on CUDA, got ", q_heads / kv_heads);
  }
};

// The kernels move 16 bytes at a time: every row of an attention operand starts on a 16-byte
// boundary.
Tensor aligned(const Tensor& t) {
  const int64_t unit = 16 / static_cast<int64_t>(t.element_size());
  bool good = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < t.dim(); ++i)
    good = good && (t.size(i) <= 1 || t.stride(i) % unit == 0);
  if (good) return t;
  return t.is_contiguous() ? torch::stable::clone(t) : torch::stable::contiguous(t);
}

// The leading dimensions of tensors of one shape, merged to (outer, inner); false if two do not
// suffice.
struct Rows {
  int64_t outer = 1, inner = 1;
  std::vector<int64_t> outer_stride, inner_stride;
};

bool merge_rows(std::initializer_list<const Tensor*> tensors, int64_t levels, Rows& rows) {
  struct Level {
    int64_t size;
    std::vector<int64_t> strides;
  };
  std::vector<Level> found;  // innermost first
  const Tensor& lead = **tensors.begin();
  for (int64_t i = lead.dim() - 2; i >= 0; --i) {
    if (lead.size(i) == 1) continue;
    Level level{lead.size(i), {}};
    for (const Tensor* t : tensors) level.strides.push_back(t->stride(i));
    bool merge = !found.empty();
    for (size_t t = 0; merge && t < level.strides.size(); ++t) {
      merge = level.strides[t] == found.back().strides[t] * found.back().size;
    }
    if (merge) {
      found.back().size *= level.size;
    } else {
      found.push_back(level);
    }
  }
  if (static_cast<int64_t>(found.size()) > levels) return false;
  const std::vector<int64_t> none(tensors.size(), 0);
  if (found.size() == 1 && levels == 2) found.insert(found.begin(), Level{1, none});
  rows.inner = found.empty() ? 1 : found[0].size;
  rows.inner_stride = found.empty() ? none : found[0].strides;
  rows.outer = found.size() < 2 ? 1 : found[1].size;
  rows.outer_stride = found.size() < 2 ? none : found[1].strides;
  return true;
}

// Runs the CPU or the CUDA function on the device of `lead`, on its current stream.
template <typename Params>
void launch(const Checker& c, const Params& p, void (*cpu)(const Params&),
            std::type_identity_t<int (*)(const Params&, CUstream_st*)> cuda) {
  if (c.runs_on_cpu()) return cpu(p);
  check(cuda != nullptr, c.op, "this build has no CUDA kernels; reinstall with nvcc on PATH");
#ifdef MLLAMA_WITH_CUDA
  int status = 0;
  if (c.lead.is_cpu()) {  // a simulated device works on host memory and has one stream
    status = cuda(p, nullptr);
  } else {
    check(aoti_torch_get_current_cuda_stream != nullptr, c.op,
          "this torch has no CUDA streams; install a CUDA build of torch");
    const int32_t index = c.lead.get_device_index();
    torch::stable::accelerator::DeviceGuard guard(index);
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream(index, &stream) == AOTI_TORCH_SUCCESS, c.op,
          "no current CUDA stream on device ", index);
    status = cuda(p, static_cast<CUstream_st*>(stream));
  }
  check(status == 0, c.op, "the CUDA launch failed: ", cuda_error_text(status));
#endif
}

const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// ---------------------------------------------------------------- rms_norm, add_rms_norm

void run_rms_norm(const Checker& c, Tensor x, OptionalTensor residual, const OptionalTensor& gate,
                  const OptionalTensor& row_mask, const Tensor& weight, double eps, Tensor& y,
                  Tensor* residual_out) {
  check(x.dim() >= 1, c.op, "x must have at least one dimension");
  const int64_t dim = x.size(x.dim() - 1);
  c.floating(weight, "weight");
  c.sizes(weight, "weight", {dim});
  check(eps >= 0, c.op, "eps must not be negative, got ", eps);
  const DType dtype = c.dtype();
  const Tensor w = torch::stable::contiguous(weight);
  Rows rows;
  const auto strided = [&] {
    return x.stride(x.dim() - 1) == 1 &&
           (!residual || residual->stride(residual->dim() - 1) == 1) &&
           (residual ? merge_rows({&x, &*residual}, 2, rows) : merge_rows({&x}, 2, rows));
  };
  if (!strided()) {
    x = torch::stable::contiguous(x);
    if (residual) residual = torch::stable::contiguous(*residual);
    strided();
  }
  OptionalTensor g, mask;
  if (gate) g = torch::stable::contiguous(*gate);
  if (row_mask) mask = torch::stable::contiguous(*row_mask);
  RmsNormParams p{};
  p.x = x.const_data_ptr();
  p.residual = data(residual);
  p.gate = data(g);
  p.row_mask = static_cast<const bool*>(data(mask));
  p.weight = w.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.residual_out = residual_out ? residual_out->mutable_data_ptr() : nullptr;
  p.outer = x.numel() == 0 ? 0 : rows.outer;
  p.inner = rows.inner;
  p.dim = dim;
  p.x_outer_stride = rows.outer_stride[0];
  p.x_inner_stride = rows.inner_stride[0];
  p.residual_outer_stride = residual ? rows.outer_stride[1] : 0;
  p.residual_inner_stride = residual ? rows.inner_stride[1] : 0;
  p.eps = eps;
  p.dtype = dtype;
  launch(c, p, rms_norm_cpu, MLLAMA_CUDA(rms_norm_cuda));
}

Tensor empty_like_contiguous(const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); }

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Checker c{"rms_norm", x, "x"};
  Tensor y = empty_like_contiguous(x);
  run_rms_norm(c, x, std::nullopt, std::nullopt, std::nullopt, weight, eps, y, nullptr);
  return y;
}

void check_residual(const Checker& c, const Tensor& x, const Tensor& residual,
                    const OptionalTensor& gate, const OptionalTensor& row_mask) {
  c.floating(residual, "residual");
  bool equal = residual.dim() == x.dim();
  for (int64_t i = 0; equal && i < x.dim(); ++i) equal = residual.size(i) == x.size(i);
  check(equal, c.op, "residual must have the shape of x, ", shape(x), ", got ", shape(residual));
  if (gate) {
    c.floating(*gate, "gate");
    check(gate->numel() == 1, c.op, "gate must have one element, got shape ", shape(*gate));
  }
  if (row_mask) {
    c.typed(*row_mask, "row_mask", ScalarType::Bool);
    bool rows_equal = row_mask->dim() == x.dim() - 1;
    for (int64_t i = 0; rows_equal && i + 1 < x.dim(); ++i) {
      rows_equal = row_mask->size(i) == x.size(i);
    }
    check(rows_equal, c.op, "row_mask must have the leading shape of x, ", shape(x), ", got ",
          shape(*row_mask));
  }
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                        const Tensor& weight, double eps,
                                        const OptionalTensor& gate,
                                        const OptionalTensor& row_mask) {
  const Checker c{"add_rms_norm", x, "x"};
  check(x.dim() >= 1, c.op, "x must have at least one dimension");
  check_residual(c, x, residual, gate, row_mask);
  Tensor y = empty_like_contiguous(x), residual_out = empty_like_contiguous(x);
  run_rms_norm(c, x, residual, gate, row_mask, weight, eps, y, &residual_out);
  return {y, residual_out};
}

// ---------------------------------------------------------------- gated_residual, swiglu

Tensor gated_residual(const Tensor& x_in, const Tensor& residual_in, const Tensor& gate,
                      const OptionalTensor& row_mask) {
  Tensor x = x_in, residual = residual_in;
  const Checker c{"gated_residual", x_in, "x"};
  check(x.dim() >= 1, c.op, "x must have at least one dimension");
  check_residual(c, x, residual, gate, row_mask);
  Rows rows;
  if (x.stride(x.dim() - 1) != 1 || residual.stride(x.dim() - 1) != 1 ||
      !merge_rows({&x, &residual}, 1, rows)) {
    x = torch::stable::contiguous(x);
    residual = torch::stable::contiguous(residual);
    merge_rows({&x, &residual}, 1, rows);
  }
  Tensor out = empty_like_contiguous(x);
  OptionalTensor mask;
  if (row_mask) mask = torch::stable::contiguous(*row_mask);
  GatedResidualParams p{};
  p.x = x.const_data_ptr();
  p.residual = residual.const_data_ptr();
  p.gate = gate.const_data_ptr();
  p.row_mask = static_cast<const bool*>(data(mask));
  p.out = out.mutable_data_ptr();
  p.rows = x.numel() == 0 ? 0 : rows.inner;
  p.dim = x.size(x.dim() - 1);
  p.x_row_stride = rows.inner_stride[0];
  p.residual_row_stride = rows.inner_stride[1];
  p.dtype = c.dtype();
  launch(c, p, gated_residual_cpu, MLLAMA_CUDA(gated_residual_cuda));
  return out;
}

Tensor swiglu(const Tensor& gate_up_in) {
  Tensor gate_up = gate_up_in;
  const Checker c{"swiglu", gate_up_in, "gate_up"};
  check(gate_up.dim() >= 1 && gate_up.size(gate_up.dim() - 1) % 2 == 0, c.op,
        "gate_up must have an even last dimension, got shape ", shape(gate_up));
  Rows rows;
  if (gate_up.stride(gate_up.dim() - 1) != 1 || !merge_rows({&gate_up}, 1, rows)) {
    gate_up = torch::stable::contiguous(gate_up);
    merge_rows({&gate_up}, 1, rows);
  }
  std::vector<int64_t> out_sizes(gate_up.sizes().begin(), gate_up.sizes().end());
  out_sizes.back() /= 2;
  Tensor out = torch::stable::new_empty(gate_up, out_sizes);
  SwigluParams p{};
  p.gate_up = gate_up.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.rows = out.numel() == 0 ? 0 : rows.inner;
  p.dim = out_sizes.back();
  p.gate_up_row_stride = rows.inner_stride[0];
  p.dtype = c.dtype();
  launch(c, p, swiglu_cpu, MLLAMA_CUDA(swiglu_cuda));
  return out;
}

// ---------------------------------------------------------------- skinny_linear

Tensor skinny_linear(const Tensor& x_in, const Tensor& weight, const OptionalTensor& norm_weight_in,
                     double eps, const OptionalTensor& residual_in, const OptionalTensor& gate,
                     const OptionalTensor& row_mask_in, bool swiglu, bool weight_is_constant) {
  const Checker c{"skinny_linear", x_in, "x"};
  check(x_in.dim() == 2, c.op, "x must be (rows, K), got shape ", shape(x_in));
  const int64_t rows = x_in.size(0), k = x_in.size(1);
  check(rows <= kSkinnyLinearMaxRows, c.op, "x must have at most ", kSkinnyLinearMaxRows,
        " rows, got ", rows);
  check(k > 0, c.op, "x must have at least one column, got shape ", shape(x_in));
  c.floating(weight, "weight");
  check(weight.dim() == 2 && weight.size(1) == k, c.op, "weight must be (", swiglu ? "2 N" : "N",
        ", ", k, "), got shape ", shape(weight));
  check(!swiglu || weight.size(0) % 2 == 0, c.op,
        "weight must have an even number of rows with swiglu, got ", weight.size(0));
  c.last_contiguous(weight, "weight");  // a copy would cost more than the product
  const int64_t n = swiglu ? weight.size(0) / 2 : weight.size(0);
  check(eps >= 0, c.op, "eps must not be negative, got ", eps);
  check(!gate || residual_in, c.op, "gate is given without residual");
  check(!row_mask_in || gate, c.op, "row_mask is given without gate");
  OptionalTensor norm_weight, residual, row_mask;
  if (norm_weight_in) {
    c.floating(*norm_weight_in, "norm_weight");
    c.sizes(*norm_weight_in, "norm_weight", {k});
    norm_weight = torch::stable::contiguous(*norm_weight_in);
  }
  if (residual_in) {
    c.floating(*residual_in, "residual");
    c.sizes(*residual_in, "residual", {rows, n});
    residual = residual_in->stride(1) == 1 ? *residual_in : torch::stable::contiguous(*residual_in);
  }
  if (gate) {
    c.floating(*gate, "gate");
    check(gate->numel() == 1, c.op, "gate must have one element, got shape ", shape(*gate));
  }
  if (row_mask_in) {
    c.typed(*row_mask_in, "row_mask", ScalarType::Bool);
    c.sizes(*row_mask_in, "row_mask", {rows});
    row_mask = torch::stable::contiguous(*row_mask_in);
  }
  const Tensor x = x_in.stride(1) == 1 ? x_in : torch::stable::contiguous(x_in);
  Tensor out = torch::stable::new_empty(x, {rows, n});
  SkinnyLinearParams p{};
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.norm_weight = data(norm_weight);
  p.residual = data(residual);
  p.gate = data(gate);
  p.row_mask = static_cast<const bool*>(data(row_mask));
  p.out = out.mutable_data_ptr();
  p.rows = rows;
  p.n = n;
  p.k = k;
  p.x_row_stride = x.stride(0);
  p.weight_row_stride = weight.stride(0);
  p.residual_row_stride = residual ? residual->stride(0) : 0;
  p.eps = eps;
  p.swiglu = swiglu;
  p.weight_is_constant = weight_is_constant;
  p.dtype = c.dtype();
  if (out.numel() != 0) launch(c, p, skinny_linear_cpu, MLLAMA_CUDA(skinny_linear_cuda));
  return out;
}

// ---------------------------------------------------------------- attention: what the ops share

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

// ---------------------------------------------------------------- vision_attention, patch_embed

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

Tensor patch_embed(const Tensor& pixel_values, const Tensor& aspect_ratio_ids,
                   const Tensor& patch_weight, const Tensor& class_embedding,
                   const Tensor& position_embedding, const Tensor& position_gate,
                   const Tensor& tile_position_embedding, const Tensor& pre_tile_embedding,
                   const Tensor& pre_tile_gate, const Tensor& norm_weight, const Tensor& norm_bias,
                   double eps, int64_t pad_to) {
  const Checker c{"patch_embed", pixel_values, "pixel_values"};
  check(pixel_values.dim() == 5 && pixel_values.size(3) == pixel_values.size(4), c.op,
        "pixel_values must be (M, T, C, size, size), got shape ", shape(pixel_values));
  check(patch_weight.dim() == 4 && patch_weight.size(2) == patch_weight.size(3), c.op,
        "patch_weight must be (E, C, patch, patch), got shape ", shape(patch_weight));
  PatchEmbedParams p{};
  p.images = pixel_values.size(0);
  p.tiles = pixel_values.size(1);
  p.channels = pixel_values.size(2);
  p.size = pixel_values.size(3);
  p.dim = patch_weight.size(0);
  p.patch = patch_weight.size(2);
  check(p.dim > 0 && p.patch > 0 && p.size >= p.patch && patch_weight.size(1) == p.channels, c.op,
        "patch_weight ", shape(patch_weight), " does not fit pixel_values ", shape(pixel_values));
  check(pad_to > 0, c.op, "pad_to must be positive, got ", pad_to);
  check(eps >= 0, c.op, "eps must not be negative, got ", eps);
  p.grid = p.size / p.patch;
  const int64_t tokens = p.grid * p.grid + 1;
  p.out_tokens = round_up(tokens, pad_to);
  check(tile_position_embedding.dim() == 2, c.op,
        "tile_position_embedding must be (ratios, T * P * E), got shape ",
        shape(tile_position_embedding));
  p.ratios = tile_position_embedding.size(0);
  c.typed(aspect_ratio_ids, "aspect_ratio_ids", ScalarType::Long);
  c.sizes(aspect_ratio_ids, "aspect_ratio_ids", {p.images});
  struct Operand {
    const Tensor& tensor;
    const char* what;
    std::initializer_list<int64_t> sizes;
    const void** field;
  };
  const int64_t e = p.dim;
  const Operand operands[] = {
      {pixel_values,
       "pixel_values",
       {p.images, p.tiles, p.channels, p.size, p.size},
       &p.pixel_values},
      {patch_weight, "patch_weight", {e, p.channels, p.patch, p.patch}, &p.patch_weight},
      {class_embedding, "class_embedding", {e}, &p.class_embedding},
      {position_embedding, "position_embedding", {tokens, e}, &p.position_embedding},
      {position_gate, "position_gate", {1}, &p.position_gate},
      {tile_position_embedding,
       "tile_position_embedding",
       {p.ratios, p.tiles * tokens * e},
       &p.tile_position_embedding},
      {pre_tile_embedding, "pre_tile_embedding", {p.ratios, p.tiles * e}, &p.pre_tile_embedding},
      {pre_tile_gate, "pre_tile_gate", {1}, &p.pre_tile_gate},
      {norm_weight, "norm_weight", {e}, &p.norm_weight},
      {norm_bias, "norm_bias", {e}, &p.norm_bias},
  };
  std::vector<Tensor> kept;  // aligned copies live until the launch
  for (const Operand& operand : operands) {
    c.floating(operand.tensor, operand.what);
    c.sizes(operand.tensor, operand.what, operand.sizes);
    kept.push_back(aligned(torch::stable::contiguous(operand.tensor)));
    *operand.field = kept.back().const_data_ptr();
  }
  const Tensor ids = torch::stable::contiguous(aspect_ratio_ids);
  p.aspect_ratio_ids = ids.const_data_ptr<int64_t>();
  if (ids.is_cpu()) {
    for (int64_t i = 0; i < p.images; ++i) {
      check(p.aspect_ratio_ids[i] >= 0 && p.aspect_ratio_ids[i] < p.ratios, c.op,
            "aspect_ratio_ids[", i, "] is ", p.aspect_ratio_ids[i], "; the tables have ids 0 to ",
            p.ratios - 1);
    }
  }
  Tensor out = torch::stable::new_empty(pixel_values, {p.images, p.tiles, p.out_tokens, e});
  p.out = out.mutable_data_ptr();
  p.eps = eps;
  p.dtype = c.dtype();
  if (out.numel() != 0) launch(c, p, patch_embed_cpu, MLLAMA_CUDA(patch_embed_cuda));
  return out;
}

// ---------------------------------------------------------------- sample

Tensor sample(const Tensor& logits_in, const Tensor& seeds_in, const Tensor& step, bool do_sample,
              double temperature, int64_t top_k, double top_p, double min_p,
              double repetition_penalty, const OptionalTensor& seen_in) {
  const Checker c{"sample", logits_in, "logits"};
  check(logits_in.dim() == 2 && logits_in.size(1) > 0 && logits_in.size(1) < kMaxVocab, c.op,
        "logits must be (B, V) with V from 1 to ", kMaxVocab - 1, ", got shape ", shape(logits_in));
  SampleParams p{};
  p.rows = logits_in.size(0);
  p.vocab = logits_in.size(1);
  p.dtype = c.dtype();
  c.typed(seeds_in, "seeds", ScalarType::Long);
  c.sizes(seeds_in, "seeds", {p.rows});
  c.typed(step, "step", ScalarType::Long);
  check(step.numel() == 1, c.op, "step must have one element, got shape ", shape(step));
  // What the kernels divide by is the float32 value.
  p.temperature = static_cast<float>(temperature);
  p.repetition_penalty = static_cast<float>(repetition_penalty);
  check(p.temperature > 0 && std::isfinite(p.temperature), c.op,
        "temperature must be a positive float32, got ", temperature);
  check(p.repetition_penalty > 0 && std::isfinite(p.repetition_penalty), c.op,
        "repetition_penalty must be a positive float32, got ", repetition_penalty);
  check(top_k >= 0, c.op, "top_k must not be negative, got ", top_k);
  check(top_p >= 0 && top_p <= 1, c.op, "top_p must be from 0 to 1, got ", top_p);
  check(min_p >= 0 && min_p <= 1, c.op, "min_p must be from 0 to 1, got ", min_p);
  OptionalTensor seen;
  if (seen_in) {
    c.typed(*seen_in, "seen", ScalarType::Bool);
    c.sizes(*seen_in, "seen", {p.rows, p.vocab});
    if (repetition_penalty != 1) seen = torch::stable::contiguous(*seen_in);
  }
  const Tensor logits = logits_in.stride(1) == 1 ? logits_in : torch::stable::contiguous(logits_in);
  const Tensor seeds = torch::stable::contiguous(seeds_in);
  Tensor tokens = torch::stable::new_empty(seeds, {p.rows});
  p.logits = logits.const_data_ptr();
  p.seeds = seeds.const_data_ptr<int64_t>();
  p.step = step.const_data_ptr<int64_t>();
  p.seen = static_cast<const bool*>(data(seen));
  p.tokens = tokens.mutable_data_ptr<int64_t>();
  p.logits_row_stride = logits.stride(0);
  p.top_k = top_k;
  p.drop_share = 1 - top_p;
  p.min_weight = std::max<int64_t>(1, static_cast<int64_t>(std::ceil(min_p * kMaxWeight)));
  p.do_sample = do_sample;
  if (p.rows != 0) launch(c, p, sample_cpu, MLLAMA_CUDA(sample_cuda));
  return tokens;
}

}  // namespace
}  // namespace mllama

STABLE_TORCH_LIBRARY(mllama_kernels, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, Tensor? gate, "
      "Tensor? row_mask) -> (Tensor, Tensor)");
  m.def("gated_residual(Tensor x, Tensor residual, Tensor gate, Tensor? row_mask) -> Tensor");
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def(
      "skinny_linear(Tensor x, Tensor weight, Tensor? norm_weight, float eps, Tensor? residual, "
      "Tensor? gate, Tensor? row_mask, bool swiglu, bool weight_is_constant) -> Tensor");
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
  m.def(
      "patch_embed(Tensor pixel_values, Tensor aspect_ratio_ids, Tensor patch_weight, "
      "Tensor class_embedding, Tensor position_embedding, Tensor position_gate, "
      "Tensor tile_position_embedding, Tensor pre_tile_embedding, Tensor pre_tile_gate, "
      "Tensor norm_weight, Tensor norm_bias, float eps, int pad_to) -> Tensor");
  m.def(
      "sample(Tensor logits, Tensor seeds, Tensor step, bool do_sample, float temperature, "
      "int top_k, float top_p, float min_p, float repetition_penalty, Tensor? seen) -> Tensor");
}

#define MLLAMA_REGISTER(m)                                                        \
  m.impl("rms_norm", TORCH_BOX(&mllama::rms_norm));                               \
  m.impl("add_rms_norm", TORCH_BOX(&mllama::add_rms_norm));                       \
  m.impl("gated_residual", TORCH_BOX(&mllama::gated_residual));                   \
  m.impl("swiglu", TORCH_BOX(&mllama::swiglu));                                   \
  m.impl("skinny_linear", TORCH_BOX(&mllama::skinny_linear));                     \
  m.impl("rotary_attention", TORCH_BOX(&mllama::rotary_attention));               \
  m.impl("rotary_attention_cached", TORCH_BOX(&mllama::rotary_attention_cached)); \
  m.impl("cross_attention", TORCH_BOX(&mllama::cross_attention));                 \
  m.impl("vision_attention", TORCH_BOX(&mllama::vision_attention));               \
  m.impl("patch_embed", TORCH_BOX(&mllama::patch_embed));                         \
  m.impl("sample", TORCH_BOX(&mllama::sample));

STABLE_TORCH_LIBRARY_IMPL(mllama_kernels, CPU, m){MLLAMA_REGISTER(m)}
// Registered in every build: without CUDA kernels, launch() says so in words.
STABLE_TORCH_LIBRARY_IMPL(mllama_kernels, CUDA, m) {
  MLLAMA_REGISTER(m)
}
