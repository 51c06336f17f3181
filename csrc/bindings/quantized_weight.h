// A quantised weight as the ops take it: `packed`, its table, and the numbers that say what they
// hold. Encodings and types of planes are numbers in the schemas: the stable ABI leaks a string.
#pragma once

#include "../quantized_linear.h"
#include "checks.h"

namespace mllama {

struct EncodingTraits {
  const char* name;
  int parts;  // of `packed`
  const char* part_names[kQuantizedParts];
};

// In the order of Encoding.
constexpr EncodingTraits kEncodings[] = {
    {"q8_0", 1, {"blocks"}},
    {"q6_k", 1, {"blocks"}},
    {"q4_k", 1, {"blocks"}},
    {"q4_0", 1, {"blocks"}},
    {"int8", 2, {"data", "scale"}},
    {"fp8", 2, {"data", "scale"}},
    {"int4", 3, {"data", "scale", "zero"}},
    {"nf4", 2, {"data", "absmax"}},
    {"fp4", 2, {"data", "absmax"}},
};
constexpr int64_t kNumEncodings = std::size(kEncodings);
constexpr int64_t kMaxWeights = int64_t{1} << 56;  // so that bytes can be counted

// What the numbers of a call say, checked: n rows of k columns.
struct WeightForm {
  int64_t encoding, n, k, group, scale_type, zero_type;
};

inline const EncodingTraits& traits(Encoding encoding) {
  return kEncodings[static_cast<int32_t>(encoding)];
}

inline bool has_table(Encoding encoding) {
  return encoding == Encoding::kNf4 || encoding == Encoding::kFp4;
}

inline QuantizedWeight described(const char* op, const WeightForm& form) {
  check(form.encoding >= 0 && form.encoding < kNumEncodings, op, "encoding must be from 0 to ",
        kNumEncodings - 1, ", got ", form.encoding);
  QuantizedWeight w{};
  w.encoding = static_cast<Encoding>(form.encoding);
  const char* name = traits(w.encoding).name;
  check(form.n >= 0 && form.n <= INT32_MAX && form.k > 0 && form.k <= INT32_MAX &&
            form.n * form.k <= kMaxWeights,
        op, "n must be from 0 to 2^31 - 1 and k from 1 to 2^31 - 1, got ", form.n, ", ", form.k);
  const bool is_int4 = w.encoding == Encoding::kInt4;
  const int64_t block = ggml_block(w.encoding);
  if (is_int4) {
    check(form.group == 32 || form.group == 64 || form.group == 128, op,
          "group must be 32, 64 or 128 for int4, got ", form.group);
  } else {
    const int64_t group = has_table(w.encoding) ? 64 : 0;
    check(form.group == group, op, "group must be ", group, " for ", name, ", got ", form.group);
  }
  const int64_t unit = block != 0 ? block : std::max<int64_t>(form.group, 1);
  check(form.k % unit == 0, op, "k must be whole blocks of ", unit, " columns for encoding ", name,
        ", got ", form.k);
  const int64_t scale = form.scale_type, zero = form.zero_type;
  const auto byte = static_cast<int64_t>(PlaneType::kUInt8);
  const bool planes_fit =
      is_int4 ? scale >= 1 && scale < byte && (zero == scale || zero == byte) : !scale && !zero;
  check(planes_fit, op, "scale_type and zero_type must be ",
        is_int4 ? "1 to 3, and the same or 4, for int4" : "0", ", got ", scale, ", ", zero);
  w.n = form.n;
  w.k = form.k;
  w.group = static_cast<int32_t>(form.group);
  w.scale = static_cast<PlaneType>(scale);
  w.zero = static_cast<PlaneType>(zero);
  return w;
}

inline int64_t packed_bytes(const char* op, bool on_cpu, const QuantizedWeight& w) {
  if (on_cpu) return quantized_packed_bytes_cpu(w);
#ifdef MLLAMA_WITH_CUDA
  return quantized_packed_bytes_cuda(w);
#else
  check(false, op, "this build has no CUDA kernels; reinstall with nvcc on PATH");
  return 0;
#endif
}

// The weight without its table.
inline QuantizedWeight stored_of(const Checker& c, const Tensor& packed, const WeightForm& form) {
  QuantizedWeight w = described(c.op, form);
  c.typed(packed, "packed", ScalarType::Byte);
  c.sizes(packed, "packed", {packed_bytes(c.op, c.runs_on_cpu(), w)});
  const uintptr_t alignment = c.runs_on_cpu() ? 64 : 16;
  const bool is_aligned = reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % alignment == 0;
  check(packed.is_contiguous() && (w.n == 0 || is_aligned), c.op,
        "packed must be contiguous and start on a boundary of ", alignment, " bytes");
  w.packed = packed.const_data_ptr<uint8_t>();
  return w;
}

// The whole weight. `table` may become a contiguous copy, and is to live as long.
inline QuantizedWeight weight_of(const Checker& c, const Tensor& packed, OptionalTensor& table,
                                 const WeightForm& form) {
  QuantizedWeight w = stored_of(c, packed, form);
  check(table.has_value() == has_table(w.encoding), c.op, traits(w.encoding).name,
        has_table(w.encoding) ? " needs a table" : " has no table, but one was given");
  if (table) {
    c.typed(*table, "table", ScalarType::Float);
    c.sizes(*table, "table", {16});
    table = torch::stable::contiguous(*table);
    w.table = table->const_data_ptr<float>();
  }
  return w;
}

// Of decoded values.
inline DType decoded_dtype(const Checker& c, ScalarType type) {
  if (type == ScalarType::Half) return DType::kFloat16;
  if (type == ScalarType::BFloat16) return DType::kBFloat16;
  check(type == ScalarType::Float, c.op, "dtype must be float32, float16 or bfloat16, got ",
        name(type));
  return DType::kFloat32;
}

}  // namespace mllama
