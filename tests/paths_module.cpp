// Which kernels an op's entry calls, as a Python module: the entries are compiled with kernels that
// only say that they were called.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../csrc/cuda/cross_attention/cross_attention.cu"
#include "../csrc/cuda/patch_embed/patch_embed.cu"
#include "../csrc/cuda/rotary_attention/rotary_attention.cu"
#include "../csrc/cuda/sample/sample.cu"
#include "../csrc/cuda/skinny_linear/skinny_linear.cu"
#include "../csrc/cuda/vision_attention/vision_attention.cu"

namespace py = pybind11;

static std::vector<std::string> called;
static bool hopper, holds_clusters;

#define STUB(kernel, ...)                   \
  cudaError_t mllama::kernel(__VA_ARGS__) { \
    called.push_back(#kernel);              \
    return cudaSuccess;                     \
  }
STUB(rotary_append, const RotaryAttentionParams&, CUstream_st*)
STUB(rotary_prefill_sm80, const RotaryAttentionParams&, CUstream_st*)
STUB(rotary_prefill_sm90, const RotaryAttentionParams&, CUstream_st*)
STUB(rotary_decode_split, const RotaryAttentionParams&, CUstream_st*)
STUB(rotary_decode_cluster, const RotaryAttentionParams&, int64_t, CUstream_st*)
STUB(cross_fill_no_sequence, const CrossAttentionParams&, CUstream_st*)
STUB(cross_prefill_sm80, const CrossAttentionParams&, CUstream_st*)
STUB(cross_prefill_sm90, const CrossAttentionParams&, CUstream_st*)
STUB(cross_decode_split, const CrossAttentionParams&, CUstream_st*)
STUB(cross_decode_cluster, const CrossAttentionParams&, int64_t, CUstream_st*)
STUB(vision_dense_sm80, const VisionAttentionParams&, CUstream_st*)
STUB(vision_dense_sm90, const VisionAttentionParams&, CUstream_st*)
STUB(patch_forward_sm80, const PatchEmbedParams&, CUstream_st*)
STUB(patch_forward_sm90, const PatchEmbedParams&, CUstream_st*)
STUB(sample_in_blocks, const SampleParams&, CUstream_st*)
STUB(sample_in_clusters, const SampleParams&, CUstream_st*)
STUB(skinny_linear_simt, const SkinnyLinearParams&, bool, int, CUstream_st*)
STUB(skinny_linear_sm80, const SkinnyLinearParams&, int, CUstream_st*)
STUB(skinny_linear_sm90, const SkinnyLinearParams&, int, CUstream_st*)

namespace mllama {

bool runs_sm90a() { return hopper; }
cudaError_t count_multiprocessors(int& count) { return count = 132, cudaSuccess; }
int64_t rotary_decode_workspace(const RotaryAttentionParams&) { return 1; }
int64_t cross_decode_workspace(const CrossAttentionParams&) { return 1; }
int64_t rotary_cluster_blocks(const RotaryAttentionParams&) { return holds_clusters ? 16 : 0; }
int64_t cross_cluster_blocks(const CrossAttentionParams&) { return holds_clusters ? 16 : 0; }
bool holds_patch_clusters(const PatchEmbedParams&) { return holds_clusters; }
bool fits_sample_cluster(int64_t vocab) { return holds_clusters && vocab <= 1 << 18; }

}  // namespace mllama

using namespace mllama;

// The kernels called for a call, or its error.
template <typename Params>
static py::object run(int (*op)(const Params&, CUstream_st*), const Params& p) {
  called.clear();
  const int status = op(p, nullptr);
  if (status != cudaSuccess) return py::int_(status);
  return py::cast(called);
}

// By name, so that a test says what it changes of an ordinary call.
class Fields {
 public:
  explicit Fields(const py::dict& changes) : changes_(changes) {}
  ~Fields() noexcept(false) {
    if (known_ != changes_.size()) throw std::invalid_argument("a field that the call lacks");
  }
  int64_t operator()(const char* name, int64_t otherwise) {
    if (!changes_.contains(name)) return otherwise;
    ++known_;
    return changes_[name].cast<int64_t>();
  }

 private:
  const py::dict& changes_;
  size_t known_ = 0;
};

alignas(16) static char memory[16];
static const int32_t* const table = reinterpret_cast<const int32_t*>(memory);

static DType dtype(int64_t bytes) { return bytes == 2 ? DType::kBFloat16 : DType::kFloat32; }

PYBIND11_MODULE(paths_module, m) {
  m.def("use_device", [](bool is_hopper, bool holds) {
    hopper = is_hopper;
    holds_clusters = holds;
  });
  // Strides of batch (or slot), token and head are those of v.
  m.def("rotary_attention", [](const py::dict& changes) {
    Fields of(changes);
    RotaryAttentionParams p{};
    p.dtype = dtype(of("bytes", 2));
    p.batch = p.tokens = 2;
    p.max_seqlen = of("max_seqlen", 2);
    p.num_q_heads = of("num_q_heads", 4);
    p.num_kv_heads = of("num_kv_heads", 2);
    p.head_dim = 64;
    p.v_batch_stride = of("batch_stride", 256);
    p.v_token_stride = of("token_stride", 128);
    p.v_head_stride = of("head_stride", 64);
    if (of("paged", 0)) {
      p.page_table = table;
      p.num_pages = p.max_pages = 2;
      p.page_size = 16;
    }
    p.k = of("misaligned", 0) ? memory + 2 : memory;
    p.softmax_scale = 1;
    return py::make_tuple(run(rotary_attention_cuda, p), rotary_attention_workspace(p));
  });
  m.def("cross_attention", [](const py::dict& changes) {
    Fields of(changes);
    CrossAttentionParams p{};
    p.dtype = dtype(of("bytes", 2));
    p.batch = p.tokens = p.num_slots = p.tile_tokens = 2;
    p.max_seqlen = of("max_seqlen", 2);
    p.tiles = of("tiles", 1);
    p.num_q_heads = of("num_q_heads", 4);
    p.num_kv_heads = of("num_kv_heads", 2);
    p.head_dim = 64;
    p.k_slot_stride = 256;
    p.k_token_stride = 128;
    p.k_head_stride = 64;
    p.v_slot_stride = of("batch_stride", 256);
    p.v_token_stride = of("token_stride", 128);
    p.v_head_stride = of("head_stride", 64);
    if (of("packed", 0)) p.cu_seqlens = table;
    if (of("lse", 0)) p.lse = memory;
    p.k = of("misaligned", 0) ? memory + 2 : memory;
    p.softmax_scale = 1;
    return py::make_tuple(run(cross_attention_cuda, p), cross_attention_workspace(p));
  });
  m.def("vision_attention", [](const py::dict& changes) {
    Fields of(changes);
    VisionAttentionParams p{};
    p.dtype = dtype(of("bytes", 2));
    p.batch = p.seqlen = p.num_heads = 2;
    p.head_dim = 64;
    p.q_batch_stride = p.k_batch_stride = 256;
    p.q_token_stride = p.k_token_stride = 128;
    p.q_head_stride = p.k_head_stride = 64;
    p.v_batch_stride = of("batch_stride", 256);
    p.v_token_stride = of("token_stride", 128);
    p.v_head_stride = of("head_stride", 64);
    p.k = of("misaligned", 0) ? memory + 2 : memory;
    p.softmax_scale = 1;
    return run(vision_attention_cuda, p);
  });
  m.def("patch_embed", [](const py::dict& changes) {
    Fields of(changes);
    PatchEmbedParams p{};
    p.dtype = dtype(of("bytes", 2));
    p.images = p.tiles = 1;
    p.channels = 3;
    p.patch = of("patch", 14);
    p.grid = 2;
    p.size = p.patch * p.grid;
    p.dim = of("dim", 1280);
    p.out_tokens = 5;
    p.pixel_values = of("misaligned", 0) ? memory + 2 : memory;
    if (of("backward", 0)) p.tokens = memory;
    return run(patch_embed_cuda, p);
  });
  m.def("skinny_linear", [](const py::dict& changes) {
    Fields of(changes);
    SkinnyLinearParams p{};
    p.dtype = dtype(of("bytes", 2));
    p.rows = of("rows", 1);
    p.k = of("k", 128);
    p.n = of("n", 64);
    p.x_row_stride = p.k;
    p.weight_row_stride = of("weight_row_stride", p.k);
    p.weight = of("misaligned", 0) ? memory + 2 : memory;
    return run(skinny_linear_cuda, p);
  });
  m.def("sample", [](const py::dict& changes) {
    Fields of(changes);
    SampleParams p{};
    p.rows = 1;
    p.vocab = of("vocab", 1000);
    return run(sample_cuda, p);
  });
}
