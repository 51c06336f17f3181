// quantized_pack and its undoing, quantized_unpack.
#include "quantized_weight.h"

namespace mllama {
namespace {

ScalarType scalar_type(PlaneType type) {
  switch (type) {
    case PlaneType::kFloat16:
      return ScalarType::Half;
    case PlaneType::kBFloat16:
      return ScalarType::BFloat16;
    case PlaneType::kUInt8:
      return ScalarType::Byte;
    default:
      return ScalarType::Float;
  }
}

ScalarType part_type(const QuantizedWeight& w, int part) {
  if (part == 1) return scalar_type(w.encoding == Encoding::kInt4 ? w.scale : PlaneType::kFloat32);
  if (part == 2) return scalar_type(w.zero);
  if (w.encoding == Encoding::kInt8) return ScalarType::Char;
  return w.encoding == Encoding::kFp8 ? ScalarType::Float8_e4m3fn : ScalarType::Byte;
}

int64_t type_size(ScalarType type) {
  if (type == ScalarType::Float) return 4;
  return type == ScalarType::Half || type == ScalarType::BFloat16 ? 2 : 1;
}

std::vector<int64_t> part_sizes(const QuantizedWeight& w, int part) {
  const bool is_row_scale =
      part == 1 && (w.encoding == Encoding::kInt8 || w.encoding == Encoding::kFp8);
  if (is_row_scale) return {w.n};
  return {w.n, part_row_bytes(w, part) / type_size(part_type(w, part))};
}

// data: the blocks of ggml's; scale: the absmax of nf4 and fp4.
Tensor quantized_pack(const Tensor& data, const OptionalTensor& scale, const OptionalTensor& zero,
                      int64_t encoding, int64_t n, int64_t k, int64_t group, int64_t scale_type,
                      int64_t zero_type) {
  const Checker c{"quantized_pack", data, "data"};
  QuantizedPackParams p{};
  p.w = described(c.op, {encoding, n, k, group, scale_type, zero_type});
  const EncodingTraits& found = traits(p.w.encoding);
  const OptionalTensor given[] = {data, scale, zero};
  std::vector<Tensor> held;
  for (int i = 0; i < kQuantizedParts; ++i) {
    check(given[i].has_value() == (i < found.parts), c.op, found.name, " is packed of ",
          found.parts, " of data, scale and zero, got ", 1 + scale.has_value() + zero.has_value());
    if (!given[i]) continue;
    c.typed(*given[i], found.part_names[i], part_type(p.w, i));
    c.sizes(*given[i], found.part_names[i], part_sizes(p.w, i));
    held.push_back(torch::stable::contiguous(*given[i]));
    p.parts[i] = held.back().const_data_ptr();
  }
  Tensor packed =
      torch::stable::new_empty(data, {packed_bytes(c.op, c.runs_on_cpu(), p.w)}, ScalarType::Byte);
  p.packed = packed.mutable_data_ptr<uint8_t>();
  if (p.w.n != 0) launch(c, p, quantized_pack_cpu, MLLAMA_CUDA(quantized_pack_cuda));
  return packed;
}

std::vector<Tensor> quantized_unpack(const Tensor& packed, int64_t encoding, int64_t n, int64_t k,
                                     int64_t group, int64_t scale_type, int64_t zero_type) {
  const Checker c{"quantized_unpack", packed, "packed"};
  QuantizedUnpackParams p{};
  p.w = stored_of(c, packed, {encoding, n, k, group, scale_type, zero_type});
  std::vector<Tensor> parts;
  for (int i = 0; i < traits(p.w.encoding).parts; ++i) {
    parts.push_back(torch::stable::new_empty(packed, part_sizes(p.w, i), part_type(p.w, i)));
    p.parts[i] = parts.back().mutable_data_ptr();
  }
  if (p.w.n != 0) launch(c, p, quantized_unpack_cpu, MLLAMA_CUDA(quantized_unpack_cuda));
  return parts;
}

}  // namespace
}  // namespace mllama

// Bytes of `packed`, for the shape of a call that is only traced; -1 for numbers of no weight, or
// where this build has no kernels.
extern "C" __attribute__((visibility("default"))) int64_t
mllama_kernels_quantized_packed_bytes(bool on_cpu, int64_t encoding, int64_t n, int64_t k,
                                      int64_t group, int64_t scale_type, int64_t zero_type) {
  try {
    const char* op = "quantized_pack";
    const mllama::QuantizedWeight w =
        mllama::described(op, {encoding, n, k, group, scale_type, zero_type});
    return mllama::packed_bytes(op, on_cpu, w);
  } catch (const std::runtime_error&) {
    return -1;
  }
}

// Rows of a tile: see quantized_linear.h.
extern "C" __attribute__((visibility("default"))) int64_t
mllama_kernels_quantized_tile_rows(bool on_cpu) {
  return on_cpu ? mllama::kQuantizedTileRowsCpu : mllama::kQuantizedTileRowsCuda;
}

STABLE_TORCH_LIBRARY_FRAGMENT(mllama_kernels, m) {
  m.def(
      "quantized_pack(Tensor data, Tensor? scale, Tensor? zero, int encoding, int n, int k, "
      "int group, int scale_type, int zero_type) -> Tensor");
  m.def(
      "quantized_unpack(Tensor packed, int encoding, int n, int k, int group, int scale_type, "
      "int zero_type) -> Tensor[]");
}

MLLAMA_IMPLEMENT(m) {
  m.impl("quantized_pack", TORCH_BOX(&mllama::quantized_pack));
  m.impl("quantized_unpack", TORCH_BOX(&mllama::quantized_unpack));
}
