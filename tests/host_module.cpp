// The host-side C++ of the kernels as a Python module, so that pytest can call it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../csrc/cpu/common/machine.cpp"
#include "../csrc/cuda/attention/decode.h"
#include "../csrc/cuda/attention/tile_size.h"
#include "../csrc/cuda/common/tensor_map_dims.h"
#include "../csrc/cuda/cross_attention/kernels.h"

namespace py = pybind11;
using namespace mllama;

static int64_t threads = 1;
int64_t mllama::num_threads() { return threads; }

PYBIND11_MODULE(host_module, m) {
  m.def("ceil_div", &ceil_div<int64_t>);
  m.def("bytes_of", [](const char* text) { return bytes_of(text); });
  m.def("cores_of", [](const char* text) { return cores_of(text); });
  m.def("last_cache_bytes", [](int64_t with_threads) {
    threads = with_threads;
    return last_cache_bytes();
  });
  m.def("round_up", &round_up<int64_t>);
  m.def("attention_tile", [](int64_t head_dim, int64_t element_bytes, bool hides_rows) {
    const AttentionTile tile = attention_tile(head_dim, element_bytes, hides_rows);
    return py::make_tuple(tile.rows, tile.keys, tile.warps);
  });
  m.def("attention_tile_swizzled", &attention_tile_swizzled);
  m.def("attention_tile_stride", &attention_tile_stride);
  m.def("attention_shared_bytes", &attention_shared_bytes);
  m.def("attention_backward_tile", [](int64_t head_dim, int64_t element_bytes) {
    const AttentionBackwardTile tile = attention_backward_tile(head_dim, element_bytes);
    return py::make_tuple(tile.rows, tile.columns, tile.warps);
  });
  m.def("attention_backward_shared_bytes", &attention_backward_shared_bytes);
  m.def("attention_sm90_tiles", [](int64_t head_dim) {
    const AttentionSm90Tile causal = kCausalSm90Tile, dense = dense_sm90_tile(head_dim);
    return py::make_tuple(py::make_tuple(causal.rows, causal.keys),
                          py::make_tuple(dense.rows, dense.keys),
                          py::make_tuple(kCrossSm90Tile.rows, kCrossSm90Tile.keys));
  });
  m.def("attention_sm90_panel_bytes", &attention_sm90_panel_bytes);
  m.def("page_box_rows", &page_box_rows);
  m.def("cross_sm90_cluster", &cross_sm90_cluster);
  m.def("paged_splits", [](int64_t capacity) {
    const SplitGeometry geometry = paged_splits(capacity);
    return py::make_tuple(geometry.splits, geometry.split_size);
  });
  m.def("tile_splits", [](int64_t tokens) {
    const SplitGeometry geometry = tile_splits(tokens);
    return py::make_tuple(geometry.splits, geometry.split_size);
  });
  m.def("split_kv_workspace", &split_kv_workspace);
  m.attr("strands") = kStrands;
  m.attr("cluster_max_group") = kClusterMaxGroup;
  m.def("cluster_blocks", &cluster_blocks);
  m.def("cluster_slice_log2", &cluster_slice_log2);
  m.def("cluster_merge_bytes", &cluster_merge_bytes);
  m.def("mappable", &mappable);
  m.def("tensor_map_fault", [](std::array<std::array<int64_t, 3>, 3> dims, int64_t element_bytes) {
    const auto dim = [&](int i) { return TensorMapDim{dims[i][0], dims[i][1], dims[i][2]}; };
    return tensor_map_fault({dim(0), dim(1), dim(2)}, element_bytes);
  });
}
