// patch_embed.
#include "../patch_embed.h"

#include "checks.h"

namespace mllama {
namespace {

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

}  // namespace
}  // namespace mllama

STABLE_TORCH_LIBRARY_FRAGMENT(mllama_kernels, m) {
  m.def(
      "patch_embed(Tensor pixel_values, Tensor aspect_ratio_ids, Tensor patch_weight, "
      "Tensor class_embedding, Tensor position_embedding, Tensor position_gate, "
      "Tensor tile_position_embedding, Tensor pre_tile_embedding, Tensor pre_tile_gate, "
      "Tensor norm_weight, Tensor norm_bias, float eps, int pad_to) -> Tensor");
}

MLLAMA_IMPLEMENT(m) { m.impl("patch_embed", TORCH_BOX(&mllama::patch_embed)); }
