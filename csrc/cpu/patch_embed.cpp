// patch_embed: the convolution as a matrix product of implicit im2col rows with the packed weight,
// then embeddings and LayerNorm on each row while it is in cache.
//
// Threads    Blocks of kBlockPatches patches of one tile; all threads pack the weight, once.
// Precision  Float32 products and statistics; rounded where the plain PyTorch modules round.
// Traffic    Pixels, weight and output once; position embeddings once per tile. For a backward the
//            tokens once more, as LayerNorm is given them.
#include "../patch_embed.h"

#include "common/dtypes.h"
#include "common/gemm_amx.h"
#include "common/gemm_dot.h"
#include "common/gemm_fma.h"
#include "common/machine.h"
#include "common/rows.h"
#include "common/scratch.h"
#include "ops.h"

namespace mllama::MLLAMA_ISA {
namespace {

constexpr int64_t kBlockPatches = 64;

template <typename T, typename Gemm>
class Embedder {
  using S = Scalar<T>;
  using E = typename Gemm::Element;

 public:
  explicit Embedder(const PatchEmbedParams& p)
      : p_(p),
        position_gate_(tanh_gate<T>(p.position_gate)),
        position_rest_(round_scalar<T>(1 - position_gate_)),
        pre_tile_gate_(tanh_gate<T>(p.pre_tile_gate)),
        patches_(p.grid * p.grid),
        depth_(p.channels * p.patch * p.patch),
        padded_depth_(Gemm::padded_depth(depth_)),
        padded_dim_(Gemm::padded_columns(p.dim)),
        weight_(scratch_.take<E>(Gemm::packed_elements(padded_depth_, p.dim))) {}

  void pack_weight() {
    const int64_t panels = ceil_div<int64_t>(p_.dim, Gemm::kPanel);
    parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * Gemm::kPanel, last = min(p_.dim, end * Gemm::kPanel);
      const auto row = [&](int64_t j) {
        return reinterpret_cast<const char*>(static_cast<const T*>(p_.patch_weight) +
                                             (first + j) * depth_);
      };
      Gemm::template pack_transposed<T>(row, last - first, depth_, weight_ + first * padded_depth_);
    });
  }

  void embed() const {
    const int64_t blocks = ceil_div(patches_, kBlockPatches);
    parallel_for(0, p_.images * p_.tiles * blocks, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      [[maybe_unused]] const typename Gemm::Session session;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % blocks * kBlockPatches;
        if (first == 0) embed_rest(i / blocks);
        embed_patches(i / blocks, first, min(kBlockPatches, patches_ - first), scratch);
      }
    });
  }

 private:
  const T* aspect_row(const void* table, int64_t tile, int64_t width) const {
    const int64_t id = p_.aspect_ratio_ids[tile / p_.tiles];
    return static_cast<const T*>(table) + (id * p_.tiles + tile % p_.tiles) * width;
  }

  // One row of the product's left side: the pixels of a patch, channel by channel.
  void load_patch(int64_t tile, int64_t patch, T* pixels, E* out) const {
    const int64_t plane = p_.size * p_.size;
    const T* corner = static_cast<const T*>(p_.pixel_values) + tile * p_.channels * plane +
                      patch / p_.grid * p_.patch * p_.size + patch % p_.grid * p_.patch;
    T* next = pixels;
    for (int64_t c = 0; c < p_.channels; ++c) {
      for (int64_t y = 0; y < p_.patch; ++y, next += p_.patch) {
        memcpy(next, corner + c * plane + y * p_.size, p_.patch * sizeof(T));
      }
    }
    Gemm::template load_row<T>(pixels, depth_, (S)1, out);
  }

  void embed_patches(int64_t tile, int64_t first, int64_t count, Scratch& scratch) const {
    const Scratch::Mark mark(scratch);
    E* a = scratch.take<E>(kBlockPatches * padded_depth_);
    S* c = scratch.take<S>(kBlockPatches * padded_dim_);
    T* pixels = scratch.take<T>(depth_);
    const int64_t rows = round_up<int64_t>(count, Gemm::kRowsPerStep);
    for (int64_t r = 0; r < count; ++r) load_patch(tile, first + r, pixels, a + r * padded_depth_);
    memset(a + count * padded_depth_, 0, (rows - count) * padded_depth_ * sizeof(E));
    const typename Gemm::Packed weight = {weight_, padded_depth_, p_.dim};
    Gemm::multiply(a, padded_depth_, weight, rows, p_.dim, padded_depth_, c, padded_dim_, false);
    const T* pre_tile = aspect_row(p_.pre_tile_embedding, tile, p_.dim);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t token = first + r + 1;
      T* out = static_cast<T*>(p_.out) + (tile * p_.out_tokens + token) * p_.dim;
      const S* product = c + r * padded_dim_;
      for_vectors(p_.dim, [&](int64_t i, auto part) {
        const Vec<T> gated = round_to<T>(load(pre_tile + i, part) * pre_tile_gate_);
        store(out + i, round_to<T>(load(product + i, part)) + gated, part);
      });
      finish_row(tile, token, out);
    }
  }

  // The class token, and the zero tokens behind the last patch.
  void embed_rest(int64_t tile) const {
    T* out = static_cast<T*>(p_.out) + tile * p_.out_tokens * p_.dim;
    memcpy(out, p_.class_embedding, p_.dim * sizeof(T));
    finish_row(tile, 0, out);
    const int64_t used = patches_ + 1;
    memset(out + used * p_.dim, 0, (p_.out_tokens - used) * p_.dim * sizeof(T));
  }

  // Position and tile-position embeddings, then LayerNorm, in place.
  void finish_row(int64_t tile, int64_t token, T* x) const {
    const int64_t dim = p_.dim;
    const T* position = static_cast<const T*>(p_.position_embedding) + token * dim;
    const T* tile_position =
        aspect_row(p_.tile_position_embedding, tile, (patches_ + 1) * dim) + token * dim;
    const T* weight = static_cast<const T*>(p_.norm_weight);
    const T* bias = static_cast<const T*>(p_.norm_bias);
    Vec<T> sums = {};
    for_vectors(dim, [&](int64_t i, auto part) {
      const Vec<T> near = round_to<T>(load(position + i, part) * position_rest_);
      const Vec<T> far = round_to<T>(load(tile_position + i, part) * position_gate_);
      const Vec<T> value = round_to<T>(round_to<T>(load(x + i, part) + near) + far);
      store(x + i, value, part);
      sums += value;
    });
    if (p_.tokens != nullptr) {
      memcpy(static_cast<T*>(p_.tokens) + (tile * (patches_ + 1) + token) * dim, x,
             dim * sizeof(T));
    }
    const S mean = sum_lanes(sums) / (S)dim;
    Vec<T> squares = {};
    for_vectors(dim, [&](int64_t i, auto part) {
      const Vec<T> centred = load(x + i, part) - splat_part(mean, part);
      squares += centred * centred;
    });
    const S scale = (S)(1 / __builtin_sqrt((double)sum_lanes(squares) / (double)dim + p_.eps));
    for_vectors(dim, [&](int64_t i, auto part) {
      store(x + i,
            (load(x + i, part) - mean) * scale * load(weight + i, part) + load(bias + i, part),
            part);
    });
  }

  const PatchEmbedParams& p_;
  const S position_gate_, position_rest_, pre_tile_gate_;
  const int64_t patches_, depth_, padded_depth_, padded_dim_;
  Scratch scratch_;
  E* weight_;
};

template <typename T, typename Gemm>
void run_with(const PatchEmbedParams& p) {
  Embedder<T, Gemm> embedder(p);
  embedder.pack_weight();
  embedder.embed();
}

template <typename T>
void run(const PatchEmbedParams& p) {
#ifdef __AVX512BF16__
  if constexpr (__is_same(T, BF16)) {
    if (amx_available()) return run_with<T, AmxGemm>(p);
    return run_with<T, DotGemm>(p);
  }
#endif
  run_with<T, FmaGemm<Scalar<T>>>(p);
}

}  // namespace

void patch_embed(const PatchEmbedParams& p) {
  if (p.images * p.tiles * p.out_tokens * p.dim == 0) return;
  with_dtype(p.dtype, [&]<typename T>(Type<T>) { run<T>(p); });
}

}  // namespace mllama::MLLAMA_ISA
