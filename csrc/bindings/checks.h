// What the bindings of all ops share: argument checks and the launch on a tensor's device. This
// folder is the only code that knows torch. LibTorch stable ABI, so one binary serves every torch
// from 2.11 on.
#pragma once

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

#include "../build_info.h"
#include "../common.h"
#include "memory.h"

#ifdef MLLAMA_WITH_CUDA
// Weak: CPU builds of torch have no CUDA streams, yet must load a library that was built with CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#define MLLAMA_CUDA(function) function
#else
#define MLLAMA_CUDA(function) nullptr
#endif

// MLLAMA_IMPLEMENT(m) { m.impl(name, TORCH_BOX(&function)); ... } for CPU and CUDA tensors alike.
// CUDA in every build: without CUDA kernels, launch() says so in words.
#define MLLAMA_IMPLEMENT(m)                                                        \
  static void implement(torch::stable::detail::StableLibrary& m);                  \
  STABLE_TORCH_LIBRARY_IMPL(mllama_kernels, CPU, library) { implement(library); }  \
  STABLE_TORCH_LIBRARY_IMPL(mllama_kernels, CUDA, library) { implement(library); } \
  static void implement(torch::stable::detail::StableLibrary& m)

namespace mllama {

using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

template <typename... Args>
void check(bool condition, const char* op, const Args&... message) {
  if (condition) return;
  std::ostringstream text;
  text << "mllama_kernels." << op << ": ";
  ((text << message), ...);
  throw std::runtime_error(text.str());
}

inline std::string shape(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << (t.dim() == 1 ? ",)" : ")");
  return text.str();
}

inline const char* name(ScalarType type) {
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
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    default:
      return "another dtype";
  }
}

// One call's op name and the tensor that fixes dtype and device.
struct Checker {
  const char* op;
  const Tensor& lead;
  const char* lead_name;

  Checker(const char* op, const Tensor& lead, const char* lead_name)
      : op(op), lead(lead), lead_name(lead_name) {
    present(lead, lead_name);
  }

  void present(const Tensor& t, const char* what) const {
    const auto [needed, held] = storage_bytes(t);
    check(needed <= held, op, what, " needs ", needed, " bytes of memory; its storage holds ",
          held);
  }

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
    present(t, what);
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

  // Contiguous; bytes that are no bool are refused where the host can read them.
  Tensor bools(const Tensor& t, const char* what) const {
    typed(t, what, ScalarType::Bool);
    const Tensor flags = torch::stable::contiguous(t);
    check(!flags.is_cpu() || holds_bools(flags), op, what, " must hold bytes 0 and 1 alone");
    return flags;
  }

  // Of sizes that are not negative.
  int64_t product(const char* what, std::initializer_list<int64_t> factors) const {
    int64_t total = 1;
    for (int64_t factor : factors)
      check(!__builtin_mul_overflow(total, factor, &total), op, "the sizes of ", what,
            " are too large");
    return total;
  }

  void sizes(const Tensor& t, const char* what, const std::vector<int64_t>& want) const {
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
    check(rows_contiguous(t), op, what, " must be contiguous in its last dimension, got stride ",
          stride(t, t.dim() - 1));
  }

  void head_dim(int64_t d) const {
    if (runs_on_cpu()) {
      check(d >= 8 && d <= 256 && d % 8 == 0, op,
            "head_dim must be a multiple of 8 from 8 to 256 on CPU, got ", d);
    } else {
      check(d == 64 || d == 80 || d == 128, op, "head_dim must be 64, 80 or 128 on CUDA, got ", d);
    }
  }

  // The kernels multiply by the float32 value: 0 times a hidden score would be NaN.
  void softmax_scale(double scale) const {
    const float used = static_cast<float>(scale);
    check(used > 0 && std::isfinite(used), op, "softmax_scale must be positive in float32, got ",
          scale);
  }

  void eps(double value) const {
    check(value >= 0 && std::isfinite(value), op, "eps must not be negative or infinite, got ",
          value);
  }

  void heads(int64_t q_heads, int64_t kv_heads) const {
    check(kv_heads > 0 && q_heads % kv_heads == 0, op, "the number of key/value heads (", kv_heads,
          ") must divide the number of query heads (", q_heads, ")");
    check(runs_on_cpu() || q_heads / kv_heads <= 16, op,
          "at most 16 query heads may share a key/value head on CUDA, got ", q_heads / kv_heads);
  }
};

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
  if (status != 0) check(false, c.op, "the CUDA launch failed: ", take_cuda_error(status));
#endif
}

inline const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

inline Tensor empty_like_contiguous(const Tensor& t) {
  return torch::stable::new_empty(t, t.sizes());
}

// Of what is added to a residual of x's shape.
inline void check_gate(const Checker& c, const Tensor& x, const char* x_name,
                       const OptionalTensor& gate, const OptionalTensor& row_mask) {
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
    check(rows_equal, c.op, "row_mask must have the leading shape of ", x_name, ", ", shape(x),
          ", got ", shape(*row_mask));
  }
}

inline void check_residual(const Checker& c, const Tensor& x, const Tensor& residual,
                           const OptionalTensor& gate, const OptionalTensor& row_mask) {
  c.floating(residual, "residual");
  bool equal = residual.dim() == x.dim();
  for (int64_t i = 0; equal && i < x.dim(); ++i) equal = residual.size(i) == x.size(i);
  check(equal, c.op, "residual must have the shape of x, ", shape(x), ", got ", shape(residual));
  check_gate(c, x, "x", gate, row_mask);
}

}  // namespace mllama
