// Causal grouped-query attention with rotary embedding for sm_90a: the prefill kernel of
// rotary_attention.cu on the core of core_sm90.cuh, for 16-bit elements. Rows, masks and
// precision are described there.
//
// Tiling     One block per (sequence, key/value head, 128 rows of packed query heads), 128 keys at
//            a time. The longest blocks first. q is rotated by the computing warps on its way into
//            shared memory, while the first keys arrive.
// Keys       Tensor copies of 128 rows or, from pages, of as many as a page surely holds (the
//            largest power of two in page_size). Pages behind the sequence's last key are not
//            read: coordinates outside the tensor bring zeros.
// Banks      Rotated queries are stored without conflicts but for interleaved pairs (two-way: eight
//            lanes store every other chunk of a row) and head dim 80 (up to four-way); once per
//            block.
// Traffic    2 * S^2 * Hq * D FLOP: S 4096, 32 heads of 128: 137 GFLOP, 174 us at 790 TFLOP/s.
//            K and V come from L2 but for the first time.

#include "../attention/masks.cuh"
#include "../attention/rows_sm90.cuh"
#include "../common/launch.h"
#include "../common/tensor_map.h"
#include "block.cuh"
#include "kernels.h"

namespace mllama {
namespace {

// K and V as tensors (head_dim, rows, key/value heads, pages or sequences), innermost first.
struct KeyMaps {
  CUtensorMap k, v;
  int box_rows;
};

template <typename Config>
struct RotaryKeys {
  const KeyMaps& maps;
  const int32_t* page_table;  // of the sequence, or null
  int first_row, sequence;    // not paged: where the tensor holds the first key
  int kv_head, length, page_size;
  bool zeros_behind;  // the tensor ends with the sequence

  __device__ __forceinline__ void copy_k(int block, char* tile, uint64_t* barrier) const {
    copy(maps.k, block, tile, barrier);
  }
  __device__ __forceinline__ void copy_v(int block, char* tile, uint64_t* barrier) const {
    copy(maps.v, block, tile, barrier);
  }
  __device__ __forceinline__ int count(int block) const {
    return zeros_behind ? Config::kBlockN : length - block * Config::kBlockN;
  }

 private:
  // A copy is one panel of one box; each lane starts some.
  __device__ __forceinline__ void copy(const CUtensorMap& map, int block, char* tile,
                                       uint64_t* barrier) const {
    using Layout = typename Config::KeyLayout;
    const int copies = Config::kBlockN / maps.box_rows * Layout::kPanels;
    for (int i = threadIdx.x % kWarpSize; i < copies; i += kWarpSize) {
      const int panel = i % Layout::kPanels, row = i / Layout::kPanels * maps.box_rows;
      const int key = block * Config::kBlockN + row;
      int tensor_row = first_row + key, outer = sequence;
      if (page_table != nullptr) {
        // Behind the last key, and where the unchecked table names no page: outside the tensor.
        const int slot = key / page_size;
        tensor_row = key - slot * page_size;
        outer = key < length ? __ldg(page_table + slot) : -1;
      }
      copy_panel<Layout>(tile, row, panel, map, barrier, tensor_row, kv_head, outer);
    }
  }
};

template <typename T, int kHeadDim>
using RotaryConfig = AttentionSm90Config<T, kHeadDim, kCausalSm90Tile.rows, kCausalSm90Tile.keys>;

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    rotary_attention_sm90_kernel(const __grid_constant__ RotaryAttentionParams p,
                                 const __grid_constant__ KeyMaps maps) {
#ifdef MLLAMA_SM90A_DEVICE
  using T = typename Config::T;
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<AttentionSm90Shared<Config>*>(memory);
  const RotaryBlock block(p, Config::kBlockM);
  if (block.empty()) return;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&maps.k);
    prefetch_tensor_map(&maps.v);
    shared.init_barriers();
    block.fill(shared.rows, p, Config::kHeadDim);
  }
  __syncthreads();

  const bool paged = p.page_table != nullptr, packed = p.cu_seqlens != nullptr;
  const RotaryQuery<T> query = block.query<T>(p);
  const RotaryKeys<Config> keys{maps,
                                paged ? p.page_table + block.b * p.max_pages : nullptr,
                                packed ? static_cast<int>(block.sequence.begin) : 0,
                                packed ? 0 : static_cast<int>(block.b),
                                static_cast<int>(block.kv_head),
                                static_cast<int>(block.length),
                                static_cast<int>(p.page_size),
                                !paged && !packed};
  CausalMask<Config> mask(block.first, block.count, block.group, static_cast<int>(block.past));
  attend_sm90<Config>(shared, query, keys, mask, softmax_scale_log2(p.softmax_scale));
#else
  __trap();
#endif
}

template <typename Config>
cudaError_t make_maps(KeyMaps& maps, const RotaryAttentionParams& p) {
  using Layout = typename Config::KeyLayout;
  maps.box_rows = p.page_table == nullptr
                      ? Config::kBlockN
                      : static_cast<int>(page_box_rows(p.page_size, Config::kBlockN));
  const cudaError_t status = make_rows_map<Layout>(maps.k, p.dtype, rotary_keys(p), maps.box_rows);
  return status != cudaSuccess
             ? status
             : make_rows_map<Layout>(maps.v, p.dtype, rotary_values(p), maps.box_rows);
}

template <typename Config>
cudaError_t launch_config(const RotaryAttentionParams& p, cudaStream_t stream) {
  const int64_t blocks = rotary_blocks(p, Config::kBlockM);
  if (blocks == 0) return cudaSuccess;
  KeyMaps maps;
  const cudaError_t status = make_maps<Config>(maps, p);
  if (status != cudaSuccess) return status;
  return launch(rotary_attention_sm90_kernel<Config>, blocks, Config::kThreads,
                sizeof(AttentionSm90Shared<Config>), stream, {}, p, maps);
}

}  // namespace

cudaError_t rotary_prefill_sm90(const RotaryAttentionParams& p, CUstream_st* stream) {
  return dispatch_sm90(p.dtype, p.head_dim, [&](auto element, auto head_dim) {
    return launch_config<RotaryConfig<decltype(element), decltype(head_dim)::value>>(p, stream);
  });
}

}  // namespace mllama
