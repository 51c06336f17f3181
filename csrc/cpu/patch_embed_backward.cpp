// Gradient of patch_embed up to the patches: with h the normalised token and m() the mean of a row,
//   grad_token = (g * w - m(g * w) - h * m(g * w * h)) / deviation,   grad_w += g * h, grad_b += g,
// and every embedding gets the sum of grad_token over the tokens it was added to, times its gate.
//
// Threads    Tasks of kBlockPositions positions take these in all tiles of all images, images with
//            the same aspect ratio one after another, so that a row of every table is summed and
//            written once. Sums over positions (norm, gates, pre-tile) are finished in a second
//            pass, over columns. No sum depends on the number of threads.
// Precision  float32 (float64 for float64); gates in float64. Embeddings sum unrounded gradients,
//            pre_tile_embedding those that grad_patches stores.
// Traffic    grad_out and tokens read, grad_patches written and read again; the tables read and
//            their gradients written once, also rows of zeros that no image has chosen.
#include "../patch_embed.h"
#include "common/dtypes.h"
#include "common/rows.h"
#include "common/scratch.h"
#include "ops.h"

namespace mllama::MLLAMA_ISA {
namespace {

constexpr int64_t kColumns = 128;  // of a task of the second pass: eight vectors or more
constexpr int64_t kChain = 32;     // rows summed before the sum is added to the total

// sum of rows `stride` elements apart, added to total (columns, at most kColumns).
template <typename T>
void add_rows(const T* first, int64_t rows, int64_t stride, int64_t columns, Scalar<T>* total) {
  for (int64_t begin = 0; begin < rows; begin += kChain) {
    const int64_t end = min(rows, begin + kChain);
    for_vectors(columns, [&](int64_t i, auto part) {
      Vec<T> sum = {};
      for (int64_t row = begin; row < end; ++row) sum += load(first + row * stride + i, part);
      store(total + i, load(total + i, part) + sum, part);
    });
  }
}

template <typename T>
struct Gate {
  Scalar<T> open, shut;  // tanh(g), 1 - tanh(g)
  double slope;          // of tanh

  explicit Gate(const void* gate) {
    const double x = (double)to_scalar(*static_cast<const T*>(gate)), y = __builtin_tanh(x);
    open = (Scalar<T>)y;
    shut = (Scalar<T>)(1 - y);
    slope = 1 - y * y;
  }
};

template <typename T>
class Backward {
  using S = Scalar<T>;

 public:
  explicit Backward(const PatchEmbedBackwardParams& p)
      : p_(p),
        position_gate_(p.position_gate),
        pre_tile_gate_(p.pre_tile_gate),
        order_(scratch_.take<int64_t>(p.images)) {
    int64_t* next = order_;
    for (int64_t ratio = 0; ratio < p.ratios; ++ratio) {
      for (int64_t image = 0; image < p.images; ++image) {
        if (p.aspect_ratio_ids[image] == ratio) *next++ = image;
      }
    }
  }

  void run() const {
    parallel_for(0, p_.blocks(), 1, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t block = begin; block < end; ++block) positions(block, scratch);
    });
    if (p_.grad_norm_weight != nullptr) finish_norm(p_.grad_norm_weight, 0);
    if (p_.grad_norm_bias != nullptr) finish_norm(p_.grad_norm_bias, 1);
    if (p_.grad_pre_tile_embedding != nullptr) finish_pre_tile();
    finish_gate(p_.grad_position_gate, position_gate_, 0);
    finish_gate(p_.grad_pre_tile_gate, pre_tile_gate_, 1);
  }

 private:
  // Sums of one thread, rows of dim elements.
  struct Sums {
    S *weight, *bias;    // of a block
    S *position, *tile;  // of a position; and within it of a tile of images of one aspect ratio
    double gates[2];
  };

  // Row `row` of a tensor of rows of dim elements.
  const T* row_of(const void* tensor, int64_t row) const {
    return static_cast<const T*>(tensor) + row * p_.dim;
  }
  T* row_of(void* tensor, int64_t row) const { return static_cast<T*>(tensor) + row * p_.dim; }

  void clear(S* row) const { memset(row, 0, p_.dim * sizeof(S)); }

  void store_scaled(T* out, const S* sum, S scale) const {
    for_vectors(p_.dim,
                [&](int64_t i, auto part) { store(out + i, load(sum + i, part) * scale, part); });
  }

  void positions(int64_t block, Scratch& scratch) const {
    const Scratch::Mark mark(scratch);
    Sums sums = {scratch.take<S>(p_.dim),
                 scratch.take<S>(p_.dim),
                 scratch.take<S>(p_.dim),
                 scratch.take<S>(p_.dim),
                 {}};
    clear(sums.weight);
    clear(sums.bias);
    const int64_t first = block * p_.kBlockPositions;
    const int64_t last = min(p_.positions, first + p_.kBlockPositions);
    for (int64_t position = first; position < last; ++position) {
      clear(sums.position);
      for (int64_t tile = 0; tile < p_.tiles; ++tile) tiles(position, tile, sums);
      if (position == 0 && p_.grad_class_embedding != nullptr) {
        store_scaled(row_of(p_.grad_class_embedding, 0), sums.position, 1);
      }
      if (p_.grad_position_embedding != nullptr) {
        store_scaled(row_of(p_.grad_position_embedding, position), sums.position,
                     position_gate_.shut);
      }
    }
    S* norm_sums = static_cast<S*>(p_.norm_sums) + block * 2 * p_.dim;
    memcpy(norm_sums, sums.weight, p_.dim * sizeof(S));
    memcpy(norm_sums + p_.dim, sums.bias, p_.dim * sizeof(S));
    memcpy(p_.gate_sums + block * 2, sums.gates, sizeof(sums.gates));
  }

  // One position of a tile, of all images.
  void tiles(int64_t position, int64_t tile, Sums& sums) const {
    const int64_t* next = order_;
    for (int64_t ratio = 0; ratio < p_.ratios; ++ratio) {
      const int64_t choice = ratio * p_.tiles + tile, row = choice * p_.positions + position;
      T* const out = p_.grad_tile_position_embedding == nullptr
                         ? nullptr
                         : row_of(p_.grad_tile_position_embedding, row);
      const auto is_next = [&] {
        return next < order_ + p_.images && p_.aspect_ratio_ids[*next] == ratio;
      };
      if (!is_next()) {
        if (out != nullptr) memset(out, 0, p_.dim * sizeof(T));
        continue;
      }
      clear(sums.tile);
      for (; is_next(); ++next) add_token(*next * p_.tiles + tile, position, sums);
      if (out != nullptr) store_scaled(out, sums.tile, position_gate_.open);
      finish_tile(position, row, choice, sums);
    }
  }

  // Layer norm's gradient of one token, added to the sums.
  void add_token(int64_t image_tile, int64_t position, Sums& sums) const {
    const int64_t dim = p_.dim;
    const T* grad = row_of(p_.grad_out, image_tile * p_.out_tokens + position);
    const T* x = row_of(p_.tokens, image_tile * p_.positions + position);
    const T* weight = static_cast<const T*>(p_.norm_weight);
    Vec<T> total = {};
    for_vectors(dim, [&](int64_t i, auto part) { total += load(x + i, part); });
    const S mean = sum_lanes(total) / (S)dim;
    Vec<T> squares = {}, scaled = {}, products = {};
    for_vectors(dim, [&](int64_t i, auto part) {
      const Vec<T> centred = load(x + i, part) - splat_part(mean, part);
      const Vec<T> g = load(grad + i, part) * load(weight + i, part);
      squares += centred * centred;
      scaled += g;
      products += g * centred;
    });
    const S rstd = (S)(1 / __builtin_sqrt((double)sum_lanes(squares) / (double)dim + p_.eps));
    const S offset = sum_lanes(scaled) / (S)dim;
    const S slope = sum_lanes(products) / (S)dim * rstd;
    const bool stored = position > 0 && p_.grad_patches != nullptr;
    T* out =
        stored ? row_of(p_.grad_patches, image_tile * (p_.positions - 1) + position - 1) : nullptr;
    for_vectors(dim, [&](int64_t i, auto part) {
      const Vec<T> normalized = (load(x + i, part) - splat_part(mean, part)) * rstd;
      const Vec<T> g = load(grad + i, part);
      const Vec<T> token =
          (g * load(weight + i, part) - splat_part(offset, part) - normalized * slope) * rstd;
      if (stored) store(out + i, token, part);
      store(sums.tile + i, load(sums.tile + i, part) + token, part);
      store(sums.weight + i, load(sums.weight + i, part) + g * normalized, part);
      store(sums.bias + i, load(sums.bias + i, part) + g, part);
    });
  }

  // Takes the sum of a tile, which some image has, to those of the position and of the gates.
  void finish_tile(int64_t position, int64_t row, int64_t choice, Sums& sums) const {
    for_vectors(p_.dim, [&](int64_t i, auto part) {
      store(sums.position + i, load(sums.position + i, part) + load(sums.tile + i, part), part);
    });
    if (p_.grad_position_gate != nullptr) {
      const T* near = row_of(p_.position_embedding, position);
      const T* far = row_of(p_.tile_position_embedding, row);
      Vec<T> product = {};
      for_vectors(p_.dim, [&](int64_t i, auto part) {
        product += load(sums.tile + i, part) * (load(far + i, part) - load(near + i, part));
      });
      sums.gates[0] += (double)sum_lanes(product);
    }
    if (p_.grad_pre_tile_gate != nullptr && position > 0) {
      const T* pre_tile = row_of(p_.pre_tile_embedding, choice);
      Vec<T> product = {};
      for_vectors(p_.dim, [&](int64_t i, auto part) {
        product += load(sums.tile + i, part) * load(pre_tile + i, part);
      });
      sums.gates[1] += (double)sum_lanes(product);
    }
  }

  // f(first column, columns) of a row of dim elements, for `rows` rows.
  template <typename F>
  void for_columns(int64_t rows, const F& f) const {
    const int64_t parts = ceil_div(p_.dim, kColumns);
    parallel_for(0, rows * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % parts * kColumns;
        f(i / parts, first, min(kColumns, p_.dim - first));
      }
    });
  }

  void finish_norm(void* out, int64_t which) const {
    const S* sums = static_cast<const S*>(p_.norm_sums) + which * p_.dim;
    for_columns(1, [&](int64_t, int64_t first, int64_t columns) {
      S total[kColumns] = {};
      add_rows(sums + first, p_.blocks(), 2 * p_.dim, columns, total);
      for_vectors(columns, [&](int64_t i, auto part) {
        store(static_cast<T*>(out) + first + i, load(total + i, part), part);
      });
    });
  }

  void finish_pre_tile() const {
    const int64_t patches = p_.positions - 1;
    for_columns(p_.ratios * p_.tiles, [&](int64_t choice, int64_t first, int64_t columns) {
      S total[kColumns] = {};
      for (int64_t image = 0; image < p_.images; ++image) {
        if (p_.aspect_ratio_ids[image] != choice / p_.tiles) continue;
        const int64_t image_tile = image * p_.tiles + choice % p_.tiles;
        add_rows(row_of(p_.grad_patches, image_tile * patches) + first, patches, p_.dim, columns,
                 total);
      }
      T* out = row_of(p_.grad_pre_tile_embedding, choice) + first;
      for_vectors(columns, [&](int64_t i, auto part) {
        store(out + i, load(total + i, part) * pre_tile_gate_.open, part);
      });
    });
  }

  void finish_gate(void* out, const Gate<T>& gate, int64_t which) const {
    if (out == nullptr) return;
    double sum = 0;
    for (int64_t block = 0; block < p_.blocks(); ++block) sum += p_.gate_sums[block * 2 + which];
    *static_cast<T*>(out) = from_scalar<T>((S)(sum * gate.slope));
  }

  const PatchEmbedBackwardParams& p_;
  const Gate<T> position_gate_, pre_tile_gate_;
  Scratch scratch_;
  int64_t* order_;  // images, by aspect ratio
};

}  // namespace

void patch_embed_backward(const PatchEmbedBackwardParams& p) {
  with_dtype(p.dtype, [&]<typename T>(Type<T>) { Backward<T>(p).run(); });
}

}  // namespace mllama::MLLAMA_ISA
