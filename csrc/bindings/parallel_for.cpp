// What the CPU kernels know of torch's threads.
#include <torch/csrc/stable/ops.h>

#include "../common.h"

void mllama::parallel_for(int64_t begin, int64_t end, int64_t grain_size,
                          void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(begin, end, grain_size,
                              [=](int64_t b, int64_t e) { body(b, e, context); });
}
