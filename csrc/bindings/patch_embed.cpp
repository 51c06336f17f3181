// patch_embed and its backward.
#include "../patch_embed.h"

#include "checks.h"

namespace mllama {
namespace {

// Far beyond any picture and any tile of a kernel: what is computed from them stays within 63 bits.
constexpr int64_t kMaxSide = 1 << 20, kMaxPadTo = 1 << 20;

// Operands of one dtype, made contiguous and aligned; they live until the launch.
class Operands {
 public:
  explicit Operands(const Checker& c) : c_(c) {}

  const void* take(const Tensor& tensor, const char* what, const std::vector<int64_t>& sizes) {
    c_.floating(tensor, what);
    c_.sizes(tensor, what, sizes);
    return keep(aligned(torch::stable::contiguous(tensor)));
  }

  // (images,), on the CPU all in [0, ratios); a CUDA kernel looks for itself.
  const int64_t* take_ids(const Tensor& tensor, int64_t images, int64_t ratios) {
    c_.typed(tensor, "aspect_ratio_ids", ScalarType::Long);
    c_.sizes(tensor, "aspect_ratio_ids", {images});
    const auto* ids = static_cast<const int64_t*>(keep(torch::stable::contiguous(tensor)));
    for (int64_t i = 0; tensor.is_cpu() && i < images; ++i) {
      check(ids[i] >= 0 && ids[i] < ratios, c_.op, "aspect_ratio_ids[", i, "] is ", ids[i],
            "; the tables have ids 0 to ", ratios - 1);
    }
    return ids;
  }

 private:
  const void* keep(const Tensor& tensor) {
    kept_.push_back(tensor);
    return tensor.const_data_ptr();
  }

  const Checker& c_;
  std::vector<Tensor> kept_;
};

std::tuple<Tensor, Tensor> patch_embed(
    const Tensor& pixel_values, const Tensor& aspect_ratio_ids, const Tensor& patch_weight,
    const Tensor& class_embedding, const Tensor& position_embedding, const Tensor& position_gate,
    const Tensor& tile_position_embedding, const Tensor& pre_tile_embedding,
    const Tensor& pre_tile_gate, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
    int64_t pad_to, bool with_tokens) {
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
  check(p.channels > 0, c.op, "pixel_values must have channels, got shape ", shape(pixel_values));
  check(p.size <= kMaxSide, c.op, "pixel_values must have at most ", kMaxSide,
        " pixels a side, got shape ", shape(pixel_values));
  check(pad_to > 0 && pad_to <= kMaxPadTo, c.op, "pad_to must be from 1 to ", kMaxPadTo, ", got ",
        pad_to);
  c.eps(eps);
  p.grid = p.size / p.patch;
  const int64_t tokens = p.grid * p.grid + 1;
  p.out_tokens = round_up(tokens, pad_to);
  check(tile_position_embedding.dim() == 2, c.op,
        "tile_position_embedding must be (ratios, T * P * E), got shape ",
        shape(tile_position_embedding));
  p.ratios = tile_position_embedding.size(0);
  const int64_t e = p.dim;
  Operands operands(c);
  p.aspect_ratio_ids = operands.take_ids(aspect_ratio_ids, p.images, p.ratios);
  p.pixel_values =
      operands.take(pixel_values, "pixel_values", {p.images, p.tiles, p.channels, p.size, p.size});
  p.patch_weight = operands.take(patch_weight, "patch_weight", {e, p.channels, p.patch, p.patch});
  p.class_embedding = operands.take(class_embedding, "class_embedding", {e});
  p.position_embedding = operands.take(position_embedding, "position_embedding", {tokens, e});
  p.position_gate = operands.take(position_gate, "position_gate", {1});
  p.tile_position_embedding =
      operands.take(tile_position_embedding, "tile_position_embedding",
                    {p.ratios, c.product("pixel_values", {p.tiles, tokens, e})});
  p.pre_tile_embedding =
      operands.take(pre_tile_embedding, "pre_tile_embedding", {p.ratios, p.tiles * e});
  p.pre_tile_gate = operands.take(pre_tile_gate, "pre_tile_gate", {1});
  p.norm_weight = operands.take(norm_weight, "norm_weight", {e});
  p.norm_bias = operands.take(norm_bias, "norm_bias", {e});
  Tensor out = torch::stable::new_empty(pixel_values, {p.images, p.tiles, p.out_tokens, e});
  p.out = out.mutable_data_ptr();
  Tensor kept = torch::stable::new_empty(
      pixel_values,
      with_tokens ? std::vector<int64_t>{p.images, p.tiles, tokens, e} : std::vector<int64_t>{0});
  p.tokens = with_tokens ? kept.mutable_data_ptr() : nullptr;
  p.eps = eps;
  p.dtype = c.dtype();
  if (out.numel() != 0) launch(c, p, patch_embed_cpu, MLLAMA_CUDA(patch_embed_cuda));
  return {out, kept};
}

std::vector<Tensor> patch_embed_backward(const Tensor& grad_out, const Tensor& tokens,
                                         const Tensor& aspect_ratio_ids,
                                         const Tensor& position_embedding,
                                         const Tensor& position_gate,
                                         const Tensor& tile_position_embedding,
                                         const Tensor& pre_tile_embedding,
                                         const Tensor& pre_tile_gate, const Tensor& norm_weight,
                                         double eps, const std::vector<bool>& wanted) {
  const Checker c{"patch_embed_backward", tokens, "tokens"};
  check(tokens.dim() == 4, c.op, "tokens must be (M, T, P, E), got shape ", shape(tokens));
  check(tile_position_embedding.dim() == 2, c.op,
        "tile_position_embedding must be (ratios, T * P * E), got shape ",
        shape(tile_position_embedding));
  PatchEmbedBackwardParams p{};
  p.images = tokens.size(0);
  p.tiles = tokens.size(1);
  p.positions = tokens.size(2);
  p.dim = tokens.size(3);
  p.ratios = tile_position_embedding.size(0);
  check(p.positions > 0 && p.dim > 0, c.op, "tokens must not be empty but for images, got shape ",
        shape(tokens));
  check(c.runs_on_cpu() || p.dim <= kPatchBackwardMaxDim, c.op, "E must be at most ",
        kPatchBackwardMaxDim, " on CUDA for gradients, got ", p.dim);
  check(grad_out.dim() == 4 && grad_out.size(2) >= p.positions, c.op,
        "grad_out must be (M, T, P rounded up, E) for tokens of shape ", shape(tokens),
        ", got shape ", shape(grad_out));
  p.out_tokens = grad_out.size(2);
  const int64_t tile_elements = c.product("tokens", {p.tiles, p.positions, p.dim});
  Operands operands(c);
  p.grad_out = operands.take(grad_out, "grad_out", {p.images, p.tiles, p.out_tokens, p.dim});
  p.tokens = operands.take(tokens, "tokens", {p.images, p.tiles, p.positions, p.dim});
  p.aspect_ratio_ids = operands.take_ids(aspect_ratio_ids, p.images, p.ratios);
  p.position_embedding =
      operands.take(position_embedding, "position_embedding", {p.positions, p.dim});
  p.position_gate = operands.take(position_gate, "position_gate", {1});
  p.tile_position_embedding =
      operands.take(tile_position_embedding, "tile_position_embedding", {p.ratios, tile_elements});
  p.pre_tile_embedding =
      operands.take(pre_tile_embedding, "pre_tile_embedding", {p.ratios, p.tiles * p.dim});
  p.pre_tile_gate = operands.take(pre_tile_gate, "pre_tile_gate", {1});
  p.norm_weight = operands.take(norm_weight, "norm_weight", {p.dim});
  c.eps(eps);
  p.eps = eps;
  p.dtype = c.dtype();

  struct Result {
    void** field;
    std::vector<int64_t> sizes;
  };
  const Result results[] = {
      {&p.grad_patches, {p.images, p.tiles, p.positions - 1, p.dim}},
      {&p.grad_class_embedding, {p.dim}},
      {&p.grad_position_embedding, {p.positions, p.dim}},
      {&p.grad_position_gate, {1}},
      {&p.grad_tile_position_embedding, {p.ratios, tile_elements}},
      {&p.grad_pre_tile_embedding, {p.ratios, p.tiles * p.dim}},
      {&p.grad_pre_tile_gate, {1}},
      {&p.grad_norm_weight, {p.dim}},
      {&p.grad_norm_bias, {p.dim}},
  };
  check(wanted.size() == std::size(results), c.op, "wanted must have ", std::size(results),
        " elements, got ", wanted.size());
  std::vector<Tensor> grads;
  for (size_t i = 0; i < wanted.size(); ++i) {
    grads.push_back(
        torch::stable::new_empty(tokens, wanted[i] ? results[i].sizes : std::vector<int64_t>{0}));
    if (wanted[i]) *results[i].field = grads.back().mutable_data_ptr();
  }
  if (tokens.numel() == 0) {
    for (Tensor& grad : grads) torch::stable::zero_(grad);
    return grads;
  }
  Tensor patches = grads[0];
  if (p.grad_pre_tile_embedding != nullptr && p.grad_patches == nullptr) {
    patches = torch::stable::new_empty(tokens, results[0].sizes);
    p.grad_patches = patches.mutable_data_ptr();
  }
  const auto sums_type = p.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  Tensor norm_sums = torch::stable::new_empty(tokens, {p.blocks(), 2, p.dim}, sums_type);
  Tensor gate_sums = torch::stable::new_empty(tokens, {p.blocks(), 2}, ScalarType::Double);
  p.norm_sums = norm_sums.mutable_data_ptr();
  p.gate_sums = gate_sums.mutable_data_ptr<double>();
  launch(c, p, patch_embed_backward_cpu, MLLAMA_CUDA(patch_embed_backward_cuda));
  return grads;
}

}  // namespace
}  // namespace mllama

STABLE_TORCH_LIBRARY_FRAGMENT(mllama_kernels, m) {
  m.def(
      "patch_embed(Tensor pixel_values, Tensor aspect_ratio_ids, Tensor patch_weight, "
      "Tensor class_embedding, Tensor position_embedding, Tensor position_gate, "
      "Tensor tile_position_embedding, Tensor pre_tile_embedding, Tensor pre_tile_gate, "
      "Tensor norm_weight, Tensor norm_bias, float eps, int pad_to, "
      "bool with_tokens) -> (Tensor, Tensor)");
  m.def(
      "patch_embed_backward(Tensor grad_out, Tensor tokens, Tensor aspect_ratio_ids, "
      "Tensor position_embedding, Tensor position_gate, Tensor tile_position_embedding, "
      "Tensor pre_tile_embedding, Tensor pre_tile_gate, Tensor norm_weight, float eps, "
      "bool[] wanted) -> Tensor[]");
}

MLLAMA_IMPLEMENT(m) {
  m.impl("patch_embed", TORCH_BOX(&mllama::patch_embed));
  m.impl("patch_embed_backward", TORCH_BOX(&mllama::patch_embed_backward));
}
