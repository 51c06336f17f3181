#include <cudaTypedefs.h>

#include "error_text.h"
#include "tensor_map.h"

namespace mllama {

namespace {

// The driver's function by name: the library must load where there is no driver.
PFN_cuTensorMapEncodeTiled_v12000 encode_function() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                              12000, cudaEnableDefault, &found);
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

CUtensorMapDataType map_type(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case DType::kFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    default:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  }
}

CUtensorMapSwizzle map_swizzle(Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::k32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    case Swizzle::k64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case Swizzle::k128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
    default:
      return CU_TENSOR_MAP_SWIZZLE_NONE;
  }
}

}  // namespace

cudaError_t make_tensor_map(CUtensorMap& map, DType dtype, const void* base,
                            std::initializer_list<TensorMapDim> dims, Swizzle swizzle) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = encode_function();
  if (encode == nullptr) {
    explain_error("this driver has no cuTensorMapEncodeTiled");
    return cudaErrorNotSupported;
  }
  const int64_t element_bytes = dtype == DType::kFloat32 ? 4 : 2;
  cuuint64_t sizes[5], strides[5];
  cuuint32_t box[5], steps[5];
  unsigned rank = 0;
  for (const TensorMapDim& dim : dims) {
    if (rank == 5) return cudaErrorInvalidValue;
    sizes[rank] = static_cast<cuuint64_t>(dim.size);
    strides[rank] = static_cast<cuuint64_t>(dim.stride * element_bytes);
    box[rank] = static_cast<cuuint32_t>(dim.box);
    steps[rank] = 1;
    ++rank;
  }
  const CUresult result =
      encode(&map, map_type(dtype), rank, const_cast<void*>(base), sizes, strides + 1, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, map_swizzle(swizzle),
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return cudaSuccess;
  explain_error("the driver refused a tensor map with CUresult " + std::to_string(result) + ": " +
                tensor_map_fault(dims, element_bytes));
  return cudaErrorInvalidValue;
}

}  // namespace mllama
