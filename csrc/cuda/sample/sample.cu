// Tokens drawn from logits (sample_math.h defines them, bit for bit): by a cluster of blocks per
// row where the device has them and the row fits, else by one block.

#include "../../sample.h"
#include "../common/device.h"
#include "kernels.h"

namespace mllama {

int sample_cuda(const SampleParams& p, CUstream_st* stream) {
  if (p.rows == 0) return cudaSuccess;
  return runs_sm90a() && fits_sample_cluster(p.vocab) ? sample_in_clusters(p, stream)
                                                      : sample_in_blocks(p, stream);
}

}  // namespace mllama
