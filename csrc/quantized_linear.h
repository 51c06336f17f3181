// quantized_linear: skinny_linear for a weight of 8, 6 or 4 bits, and any number of rows; the
// packing of such a weight, its undoing, and its decoding.
//
// A weight is made of parts, the same on every device (all contiguous; n rows, k columns):
//   ggml's         blocks (n, bytes of k / block blocks), ggml's bytes
//   int8, fp8      data (n, k) int8 or float8_e4m3fn; scale (n,) float32
//   int4           data (n, k / 2), the low nibble the even column; scale and zero (n, k / group)
//   nf4, fp4       data (n, k / 2) likewise; absmax (n, k / group) float32; table (16,) float32
// and its values are, in float32:
//   ggml's         what the gguf package decodes, bit for bit
//   int8, fp8      q * scale
//   int4           (q - zero) * scale
//   nf4, fp4       table[q] * absmax
// A kernel reads `packed`, the parts but for the table in an order of its own; whatever bits the
// parts hold, unpacking gives them back.
#pragma once

#include "common.h"

namespace mllama {

enum class Encoding : int32_t { kQ8_0, kQ6_K, kQ4_K, kQ4_0, kInt8, kFp8, kInt4, kNf4, kFp4 };

// Of int4's scale and zero planes; kNone for every other encoding. A zero plane has the type of the
// scale or is uint8.
enum class PlaneType : int32_t { kNone, kFloat32, kFloat16, kBFloat16, kUInt8 };

struct QuantizedWeight {
  const uint8_t* packed;
  const float* table;  // (16,) of nf4 and fp4; null for the others
  int64_t n, k;        // rows and columns of the weight; k is whole blocks or groups
  Encoding encoding;
  int32_t group;  // columns that share a scale: int4 32, 64 or 128; nf4 and fp4 64; the others 0
  PlaneType scale, zero;
};

// ---- what the parts are ----

constexpr int kQuantizedParts = 3;  // at most, without the table

// Columns of a block of ggml's; 0 for the other encodings.
constexpr int64_t ggml_block(Encoding encoding) {
  switch (encoding) {
    case Encoding::kQ8_0:
    case Encoding::kQ4_0:
      return 32;
    case Encoding::kQ6_K:
    case Encoding::kQ4_K:
      return 256;
    default:
      return 0;
  }
}

constexpr int64_t ggml_block_bytes(Encoding encoding) {
  switch (encoding) {
    case Encoding::kQ8_0:
      return 34;
    case Encoding::kQ6_K:
      return 210;
    case Encoding::kQ4_K:
      return 144;
    case Encoding::kQ4_0:
      return 18;
    default:
      return 0;
  }
}

constexpr int64_t plane_type_size(PlaneType type) {
  switch (type) {
    case PlaneType::kFloat32:
      return 4;
    case PlaneType::kFloat16:
    case PlaneType::kBFloat16:
      return 2;
    case PlaneType::kUInt8:
      return 1;
    case PlaneType::kNone:
      return 0;
  }
  return 0;
}

// Bytes of part 0, 1 or 2 of one row; 0 if there is no such part.
constexpr int64_t part_row_bytes(const QuantizedWeight& w, int part) {
  switch (w.encoding) {
    case Encoding::kInt8:
    case Encoding::kFp8:
      return part == 0 ? w.k : part == 1 ? 4 : 0;
    case Encoding::kInt4:
      return part == 0 ? w.k / 2 : w.k / w.group * plane_type_size(part == 1 ? w.scale : w.zero);
    case Encoding::kNf4:
    case Encoding::kFp4:
      return part == 0 ? w.k / 2 : part == 1 ? w.k / w.group * 4 : 0;
    default:
      return part == 0 ? w.k / ggml_block(w.encoding) * ggml_block_bytes(w.encoding) : 0;
  }
}

// ---- packing ----

// `packed` is tile after tile of rows, the last one filled up, all of one size: rows that begin on
// a tile's bound and end on one, or at n, are a byte range of it.
constexpr int64_t kQuantizedTileRowsCpu = 16;
constexpr int64_t kQuantizedTileRowsCuda = 8;

// Bytes of `packed`, whose start is to be aligned to 64 bytes on CPU, to 16 on CUDA.
int64_t quantized_packed_bytes_cpu(const QuantizedWeight& w);
int64_t quantized_packed_bytes_cuda(const QuantizedWeight& w);

struct QuantizedPackParams {
  QuantizedWeight w;                   // without `packed`
  const void* parts[kQuantizedParts];  // in the order above
  uint8_t* packed;                     // quantized_packed_bytes_*() bytes; every one is written
};

struct QuantizedUnpackParams {
  QuantizedWeight w;
  void* parts[kQuantizedParts];
};

void quantized_pack_cpu(const QuantizedPackParams& p);
void quantized_unpack_cpu(const QuantizedUnpackParams& p);
int quantized_pack_cuda(const QuantizedPackParams& p, CUstream_st* stream);
int quantized_unpack_cuda(const QuantizedUnpackParams& p, CUstream_st* stream);

// ---- decoding ----

// Rows of the weight, decoded in float32 and then rounded to the dtype.
struct QuantizedRowsParams {
  QuantizedWeight w;
  const int64_t* ids;   // (rows,), each in [0, w.n): on CPU the caller has checked, on CUDA those
                        // outside give NaN; null: rows begin, begin + 1, ...
  int64_t begin, rows;  // begin counts without ids only
  void* out;            // (rows, w.k), contiguous
  DType dtype;          // kFloat32, kFloat16 or kBFloat16
};

void quantized_rows_cpu(const QuantizedRowsParams& p);
int quantized_rows_cuda(const QuantizedRowsParams& p, CUstream_st* stream);

// ---- the product ----

// h = norm_weight ? rms_norm(x, norm_weight, eps) : x        (rounded to the dtype)
// y = h weight^T + bias                                      (float32 sums, rounded to the dtype)
// y = swiglu ? silu(y[:, :n]) * y[:, n:] : y                 (as swiglu.h)
// out = residual ? residual + tanh(gate) * row_mask * y : y  (as gated_residual.h; gate may be
// null) A row of out does not depend on the other rows, nor on the number of threads.
struct QuantizedLinearParams {
  QuantizedWeight w;        // (swiglu ? 2 * n : n, k)
  const void* x;            // (rows, k), last dimension contiguous
  const void* bias;         // (w.n,), or null
  const void* norm_weight;  // (k,), or null: no norm
  const void* residual;     // (rows, n), last dimension contiguous, or null
  const void* gate;         // (1,), or null; only with residual
  const bool* row_mask;     // (rows,), or null: all rows; only with gate
  void* out;                // (rows, n), contiguous; may be residual
  int64_t rows;             // any number on CPU; on CUDA 0 to kQuantizedLinearMaxRows
  int64_t n, k;             // columns of out, columns of x
  int64_t x_row_stride, residual_row_stride;
  double eps;
  bool swiglu;
  // The launch just before on this stream does not write the weight, so that it may be read before
  // that launch has ended.
  bool weight_is_constant;
  // h goes to 8-bit integers with a scale per 32 columns, the largest magnitude / 127: a change of
  // numerics, asked for by the caller. Of integer codes only.
  bool int8_activations;
  DType dtype;  // kFloat32, kFloat16 or kBFloat16
};

// Whose product takes int8_activations.
constexpr bool has_integer_codes(Encoding encoding) {
  return encoding != Encoding::kFp8 && encoding != Encoding::kNf4 && encoding != Encoding::kFp4;
}

// What int8_activations makes of x in the dtype, for the library's product on CUDA.
struct QuantizedRoundParams {
  const void* x;  // (rows, k), last dimension contiguous
  void* out;      // (rows, k), contiguous, of its own memory
  int64_t rows, k, x_row_stride;
  DType dtype;  // kFloat32, kFloat16 or kBFloat16
};

int quantized_round_cuda(const QuantizedRoundParams& p, CUstream_st* stream);

// Rows that the kernel of CUDA takes; more are given to the library's product, slab by slab.
constexpr int64_t kQuantizedLinearMaxRows = 64;

void quantized_linear_cpu(const QuantizedLinearParams& p);
int quantized_linear_cuda(const QuantizedLinearParams& p, CUstream_st* stream);

}  // namespace mllama
