// Launches, and rows of ragged sequences, as a Python module; the runtime is fake_cuda's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <utility>

#include "../csrc/cuda/common/error_text.cu"
#include "../csrc/cuda/common/launch.cu"
#include "../csrc/cuda/common/ragged.cuh"

namespace py = pybind11;
using namespace mllama;

// Every test takes some of its own: what is known of a kernel stays known.
template <int>
void kernel(int) {}
static constexpr auto kernels = []<int... kNumber>(std::integer_sequence<int, kNumber...>) {
  return std::array{&kernel<kNumber>...};
}(std::make_integer_sequence<int, 32>());

PYBIND11_MODULE(launch_module, m) {
  m.def("use_device", [](int device, int multiprocessors) {
    fake::device = device;
    fake::multiprocessors = multiprocessors;
  });
  m.def("most_shared", [] { return fake::most_shared - fake::static_shared; });
  // 0 or the error's number; without the interpreter's lock, so that threads meet.
  m.def(
      "launch",
      [](size_t kernel, int64_t shared_bytes, unsigned cluster, int times) {
        int status = 0;
        for (int i = 0; i < times && status == 0; ++i) {
          status = launch(kernels.at(kernel), int64_t{cluster}, 128, shared_bytes, nullptr,
                          {.cluster = cluster}, 0);
        }
        return status;
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("holds_cluster", [](size_t kernel, int64_t shared_bytes, unsigned cluster) {
    return holds_cluster(address_of(kernels.at(kernel)), 128, shared_bytes, cluster);
  });
  m.def("take_cuda_error", [](int status) { return std::string(take_cuda_error(status)); });
  m.def("last_error", [] { return static_cast<int>(fake::last_error); });
  m.def("launches", [] { return fake::launches; });
  m.def("cluster_questions", [] { return fake::cluster_questions; });
  m.def("settings", [](size_t kernel) {
    py::list found;
    for (const auto& [of, device, attribute, value] : fake::settings) {
      if (of == address_of(kernels.at(kernel))) {
        found.append(py::make_tuple(device, attribute, value));
      }
    }
    return found;
  });
  m.def("sequence_rows",
        [](const std::vector<int32_t>& bounds, int64_t b, int64_t max_seqlen, int64_t tokens) {
          const SequenceRows rows = sequence_rows(bounds.data(), b, max_seqlen, tokens);
          return py::make_tuple(rows.begin, rows.count);
        });
  m.def("find_sequence",
        [](const std::vector<int32_t>& bounds, int64_t max_seqlen, int64_t token, int64_t tokens) {
          return find_sequence(bounds.data(), static_cast<int64_t>(bounds.size()) - 1, max_seqlen,
                               token, tokens);
        });
}
