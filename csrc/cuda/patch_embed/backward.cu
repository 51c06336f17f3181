// Gradient of patch_embed up to the patches: with h the normalised token and m() the mean of a row,
//   grad_token = (g * w - m(g * w) - h * m(g * w * h)) / deviation,   grad_w += g * h, grad_b += g,
// and every embedding gets the sum of grad_token over the tokens it was added to, times its gate.
//
// Kernels    1. Tokens: a block takes kBlockPositions positions, one after another, in all tiles of
//            all images; a thread 16 bytes of the columns. Images with the same aspect ratio follow
//            one another, so that a row of every table is summed in registers and written once,
//            also where no image has chosen it. The next token is loaded before the sums over this
//            one's row, two barriers. 2. Sums over the positions: a block of 64 bytes of columns
//            for the norm's parameters (from a row of partial sums per block of the first kernel)
//            and for each row of pre_tile_embedding (from grad_patches); one block for the gates.
// Precision  float32, statistics of float32 tokens in float64, gates in float64. Embeddings sum
//            unrounded gradients, pre_tile_embedding those that grad_patches stores. The order of
//            all sums is fixed by the shape; no atomics.
// Traffic    Read: grad_out, tokens, the chosen rows of the tables. Written: grad_patches and whole
//            tables, mostly zeros. One image of 4 tiles of 560 x 560, 9 aspect ratios, dim 1280,
//            bf16: 3 * 16.4 MB for the tokens, 8.2 for position_embedding, 16.4 + 147.5 for
//            tile_position_embedding, together 221 MB, 51 us at 4.3 TB/s. Beyond that, 8 MB of
//            partial sums, and grad_patches once more for pre_tile_embedding, from L2 where that
//            holds it (50 MB on Hopper). What is not wanted is not computed: with frozen tables
//            and patches 33 MB, 8 us, and the partial sums.
// Bad ids    An image with an aspect_ratio_id outside [0, ratios) has NaN gradients, writes to no
//            row of the tables and reads none.
// Launch     On Hopper before the previous kernel has ended (sm90.cuh: the rule).
// Aliasing   No result overlaps anything. Any alignment: 16-byte vectors where dim and addresses
//            allow.

#include "../../patch_embed.h"
#include "../common/alignment.h"
#include "../common/device.h"
#include "../common/dispatch.cuh"
#include "../common/launch.h"
#include "../common/row_tiles.cuh"
#include "../common/sm90.cuh"
#include "../common/vec_math.cuh"
#include "sums.cuh"

namespace mllama {
namespace {

// What a thread's columns of a row are summed in.
template <typename T>
using Columns = float[Vec<T>::kSize];

template <typename T>
constexpr int kMaxThreads = static_cast<int>(kPatchBackwardMaxDim) / Vec<T>::kSize;

struct SortedImage {
  int index, ratio;  // a bad id counts as one more ratio
};

// By aspect ratio, then by index. Ends with a barrier.
__device__ __forceinline__ void sort_images(const PatchEmbedBackwardParams& p,
                                            SortedImage* sorted) {
  const int images = static_cast<int>(p.images);
  const auto ratio_of = [&p](int image) {
    const int64_t id = p.aspect_ratio_ids[image];
    return static_cast<int>(id < 0 || id >= p.ratios ? p.ratios : id);
  };
  for (int image = threadIdx.x; image < images; image += blockDim.x) {
    const int ratio = ratio_of(image);
    int rank = 0;
    for (int i = 0; i < images; ++i) {
      const int other = ratio_of(i);
      rank += other < ratio || (other == ratio && i < image) ? 1 : 0;
    }
    sorted[rank] = {image, ratio};
  }
  __syncthreads();
}

template <typename T>
struct TokenShared {
  Statistic<T> means[kWarpSize][1], products[kWarpSize][3];
  double gates[kWarpSize][2];
  float position[Vec<T>::kSize][kMaxThreads<T>];  // sums of a position, of each thread its own
  float open_gate;                                // tanh(position_gate)
};

// A thread's columns of the tokens of a block.
template <typename T, bool kVectorized>
class TokenColumns {
  static constexpr int kSize = Vec<T>::kSize;
  using S = Statistic<T>;

 public:
  __device__ __forceinline__ TokenColumns(const PatchEmbedBackwardParams& p, TokenShared<T>& shared,
                                          const SortedImage* images)
      : p_(p),
        shared_(shared),
        images_(images),
        column_(static_cast<int>(threadIdx.x) * kSize),
        dim_(static_cast<int>(p.dim)),
        position_(static_cast<int>(blockIdx.x * p.kBlockPositions)),
        last_position_(static_cast<int>(min(p.positions, position_ + p.kBlockPositions))),
        weight_(load(p.norm_weight, 0)) {}

  __device__ __forceinline__ void run() {
    const float open = shared_.open_gate;
    load_token(p_.images * p_.tiles > 0, 0, 0, position_);
    for (; position_ < last_position_; ++position_) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) shared_.position[i][threadIdx.x] = 0;
      for (int tile = 0; tile < p_.tiles; ++tile) {
        int image = 0;
        for (int ratio = 0; ratio <= p_.ratios; ++ratio) {
          Columns<T> sum = {};
          const int first = image;
          for (; image < p_.images && images_[image].ratio == ratio; ++image) {
            add_token(image, tile, sum);
          }
          const bool chosen = image > first, bad = ratio == p_.ratios;
          const int64_t row = ratio * p_.tiles + tile;
          if (p_.grad_tile_position_embedding != nullptr && !bad) {
            store(p_.grad_tile_position_embedding, row * p_.positions + position_,
                  chosen ? rounded(sum, open) : zero_vec<T>());
          }
          if (chosen) {
            add_gates(row, bad, sum);
#pragma unroll
            for (int i = 0; i < kSize; ++i) shared_.position[i][threadIdx.x] += sum[i];
          }
        }
      }
      Columns<T> position_sum;
#pragma unroll
      for (int i = 0; i < kSize; ++i) position_sum[i] = shared_.position[i][threadIdx.x];
      if (p_.grad_class_embedding != nullptr && position_ == 0) {
        store(p_.grad_class_embedding, 0, rounded(position_sum, 1.0f));
      }
      if (p_.grad_position_embedding != nullptr) {
        store(p_.grad_position_embedding, position_, rounded(position_sum, 1.0f - open));
      }
    }
    store_sums();
  }

 private:
  __device__ __forceinline__ Vec<T> load(const void* rows, int64_t row, bool wanted = true) const {
    return load_tile<kVectorized>(static_cast<const T*>(rows) + row * dim_, column_,
                                  wanted ? dim_ : 0);
  }
  __device__ __forceinline__ void store(void* rows, int64_t row, const Vec<T>& v) const {
    store_tile<kVectorized>(static_cast<T*>(rows) + row * dim_, column_, dim_, v);
  }
  __device__ __forceinline__ static Vec<T> rounded(const Columns<T>& sum, float scale) {
    Vec<T> v;
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) v.data[i] = sum[i] * scale;
    } else {
#pragma unroll
      for (int i = 0; i < kSize / 2; ++i) {
        pair_word(v, i) = pack_pair<T>(sum[2 * i] * scale, sum[2 * i + 1] * scale);
      }
    }
    return v;
  }

  __device__ __forceinline__ void load_token(bool wanted, int image, int tile, int position) {
    const int64_t image_tile = wanted ? images_[image].index * p_.tiles + tile : 0;
    token_ = load(p_.tokens, image_tile * p_.positions + position, wanted);
    grad_ = load(p_.grad_out, image_tile * p_.out_tokens + position, wanted);
  }

  // The one behind token `image` of `tile`, in the order of run().
  __device__ __forceinline__ void load_next(int image, int tile) {
    int position = position_;
    if (++image == p_.images) image = 0, ++tile;
    if (tile == p_.tiles) tile = 0, ++position;
    load_token(position < last_position_, image, tile, position);
  }

  // The token that is loaded: adds its gradient to `sum`, and to the norm's.
  __device__ __forceinline__ void add_token(int image, int tile, Columns<T>& sum) {
    const Vec<T> token = token_, grad = grad_;
    load_next(image, tile);
    S total[1] = {};
#pragma unroll
    for (int i = 0; i < kSize; ++i) total[0] += to_f32(token.data[i]);
    block_sums(total, &shared_.means);
    const S mean = total[0] / static_cast<S>(dim_);

    S sums[3] = {};  // of squares, g * w, g * w * (x - mean)
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const S centred = column_ + i < dim_ ? to_f32(token.data[i]) - mean : 0;
      const S scaled = to_f32(grad.data[i]) * to_f32(weight_.data[i]);
      sums[0] += centred * centred;
      sums[1] += scaled;
      sums[2] += scaled * centred;
    }
    block_sums(sums, &shared_.products);
    const S dim = static_cast<S>(dim_), nan = static_cast<S>(NAN);
    const bool bad = images_[image].ratio == p_.ratios;
    const S rstd = bad ? nan : 1 / sqrt(sums[0] / dim + static_cast<S>(p_.eps));
    const S offset = sums[1] / dim, slope = sums[2] / dim * rstd;

    Columns<T> gradient;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float g = to_f32(grad.data[i]);
      const S normalized = (to_f32(token.data[i]) - mean) * rstd;
      gradient[i] =
          static_cast<float>((g * to_f32(weight_.data[i]) - offset - normalized * slope) * rstd);
      sum[i] += gradient[i];
      norm_weight_[i] += g * static_cast<float>(normalized);
      norm_bias_[i] += g;
    }
    if (p_.grad_patches != nullptr && position_ > 0) {
      const int64_t image_tile = images_[image].index * p_.tiles + tile;
      store(p_.grad_patches, image_tile * (p_.positions - 1) + position_ - 1,
            rounded(gradient, 1.0f));
    }
  }

  // Products of a sum of gradients with what the gates scale. A bad id has NaN in it.
  __device__ __forceinline__ void add_gates(int64_t row, bool bad, const Columns<T>& sum) {
    if (p_.grad_position_gate != nullptr) {
      const Vec<T> near = load(p_.position_embedding, position_);
      const Vec<T> far = load(p_.tile_position_embedding, row * p_.positions + position_, !bad);
      float product = 0;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        product = fmaf(sum[i], to_f32(far.data[i]) - to_f32(near.data[i]), product);
      }
      gates_[0] += product;
    }
    if (p_.grad_pre_tile_gate != nullptr && position_ > 0) {
      const Vec<T> pre_tile = load(p_.pre_tile_embedding, row, !bad);
      float product = 0;
#pragma unroll
      for (int i = 0; i < kSize; ++i) product = fmaf(sum[i], to_f32(pre_tile.data[i]), product);
      gates_[1] += product;
    }
  }

  __device__ __forceinline__ void store_sums() {
    float* const rows = static_cast<float*>(p_.norm_sums) + blockIdx.x * 2 * p_.dim;
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      const auto four = [i](const Columns<T>& sum) {
        return Vec<float>{{sum[i], sum[i + 1], sum[i + 2], sum[i + 3]}};
      };
      store_tile<kVectorized>(rows, column_ + i, p_.dim, four(norm_weight_));
      store_tile<kVectorized>(rows + p_.dim, column_ + i, p_.dim, four(norm_bias_));
    }
    block_sums(gates_, &shared_.gates);
    if (threadIdx.x == 0) {
      p_.gate_sums[blockIdx.x * 2] = gates_[0];
      p_.gate_sums[blockIdx.x * 2 + 1] = gates_[1];
    }
  }

  const PatchEmbedBackwardParams& p_;
  TokenShared<T>& shared_;
  const SortedImage* const images_;
  const int column_;
  const int dim_;
  int position_;
  const int last_position_;
  const Vec<T> weight_;
  Vec<T> token_, grad_;  // loaded ahead
  Columns<T> norm_weight_ = {}, norm_bias_ = {};
  double gates_[2] = {};
};

// Bounds for 96 registers: of dim 1280 in 16 bits four blocks fit on a multiprocessor, and the 401
// of 1601 positions on 132 of them run at once.
template <typename T, bool kVectorized>
__global__ void __launch_bounds__(kMaxThreads<T>, kVectorized ? 640 / kMaxThreads<T> : 1)
    patch_backward_kernel(const __grid_constant__ PatchEmbedBackwardParams p) {
  extern __shared__ __align__(8) char memory[];
  __shared__ TokenShared<T> shared;
  wait_for_previous_kernel();
  start_next_kernel();
  const auto images = reinterpret_cast<SortedImage*>(memory);
  if (threadIdx.x == 0) shared.open_gate = unrounded_tanh_gate<T>(p.position_gate);
  sort_images(p, images);
  TokenColumns<T, kVectorized>(p, shared, images).run();
}

template <typename T, bool kVectorized>
cudaError_t launch_dtype(const PatchEmbedBackwardParams& p, cudaStream_t stream) {
  const LaunchOptions options = {.overlap = runs_sm90a()};
  const int64_t threads = round_up<int64_t>(ceil_div<int64_t>(p.dim, Vec<T>::kSize), kWarpSize);
  const cudaError_t status =
      launch(patch_backward_kernel<T, kVectorized>, p.blocks(), static_cast<int>(threads),
             p.images * static_cast<int64_t>(sizeof(SortedImage)), stream, options, p);
  if (status != cudaSuccess) return status;
  const PatchSums sums = PatchSums::of<T>(p);
  if (sums.blocks() == 0) return cudaSuccess;
  return launch(patch_sums_kernel<T, kVectorized>, sums.blocks(), kPatchSumThreads, 0, stream,
                options, p, sums);
}

}  // namespace

int patch_embed_backward_cuda(const PatchEmbedBackwardParams& p, CUstream_st* stream) {
  // Images and the parts of a row are counted in int.
  if (p.dim <= 0 || p.dim > kPatchBackwardMaxDim || p.images > INT32_MAX || p.ratios >= INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  return dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    bool vectorized = p.dim % Vec<T>::kSize == 0;
    for (const void* pointer :
         {p.grad_out, p.tokens, p.position_embedding, p.tile_position_embedding,
          p.pre_tile_embedding, p.norm_weight, static_cast<const void*>(p.grad_patches),
          static_cast<const void*>(p.grad_class_embedding),
          static_cast<const void*>(p.grad_position_embedding),
          static_cast<const void*>(p.grad_tile_position_embedding),
          static_cast<const void*>(p.norm_sums)}) {
      vectorized = vectorized && is_aligned16(pointer, 0, p.dtype);
    }
    return vectorized ? launch_dtype<T, true>(p, stream) : launch_dtype<T, false>(p, stream);
  });
}

}  // namespace mllama
