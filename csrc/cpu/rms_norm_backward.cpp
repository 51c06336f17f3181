// Gradient of rms_norm and add_rms_norm. With r = 1 / rms(total), n = r * total (n' rounded, as the
// forward rounds it) and g = weight * grad_y, a row's
//   grad_residual = r * (g - n * mean(g * n)) + grad_total,   grad_weight += grad_y * n',
// and behind a gate grad_x = tanh(gate) * row_mask * grad_residual and
//   grad_gate = (1 - tanh(gate)^2) * sum over visible rows of grad_residual * x.
// Threads    blocks of rows (rms_norm.h: norm_row_blocks), each with its own partial sum of
//            grad_weight; then columns of these, in the order of the blocks.
// Rows       kRows at a time: their means first, then column by column what all of them add to
//            grad_weight, so that the partial sum is read and written once for kRows rows; their
//            second pass hits the L2 cache, and fetches the next ones.
// Precision  float32 (float64 for float64); sums over a row as in the forward; partial sums of
//            float32, and for all types the gate's from one group of rows to the next, in float64.
//            Each result is rounded once.
// Traffic    total, grad_y, grad_total, x read, grad_residual, grad_x written, each once.
#include "../rms_norm.h"
#include "common/dtypes.h"
#include "common/rows.h"
#include "common/stores.h"
#include "ops.h"

namespace mllama::MLLAMA_ISA {
namespace {

constexpr int kRows = 4;
constexpr int64_t kColumns = 256;  // of one task of the last sum

template <typename T>
struct Row {
  const T *total, *grad_y, *grad_total, *x;
  T *grad_residual, *grad_x;
  Scalar<T> high, low;  // of r, in two parts as in normalize_row
  Scalar<T> mean;       // of g * n
  bool visible;
};

template <typename T>
MLLAMA_INLINE Row<T> locate(const RmsNormBackwardParams& p, int64_t row) {
  const int64_t outer = row / p.inner, inner = row % p.inner;
  const auto at = [&](const RowsView& rows) {
    return static_cast<const T*>(rows.data) + outer * rows.outer_stride + inner * rows.inner_stride;
  };
  Row<T> r{};
  r.total = at(p.total);
  r.grad_y = at(p.grad_y);
  r.grad_total = at(p.grad_total);
  r.x = at(p.x);
  r.grad_residual = static_cast<T*>(p.grad_residual) + row * p.dim;
  if (p.grad_x) r.grad_x = static_cast<T*>(p.grad_x) + row * p.dim;
  r.visible = !p.row_mask || p.row_mask[row];
  return r;
}

// The two sums over a row, in the order of inverse_rms().
template <typename T>
MLLAMA_INLINE void find_factors(Row<T>& row, const T* weight, int64_t dim, double eps) {
  DVec squares = {}, products = {};
  const auto take = [&](int64_t i, auto part, Vec<T>& s, Vec<T>& p) {
    const Vec<T> v = load(row.total + i, part);
    s += v * v;
    p += load(weight + i, part) * load(row.grad_y + i, part) * v;
  };
  int64_t i = 0;
  for (; i + 32 * kLanes <= dim; i += 32 * kLanes) {
    Vec<T> s[4] = {}, p[4] = {};
    for (int j = 0; j < 32; ++j) take(i + j * kLanes, Whole{}, s[j % 4], p[j % 4]);
    add(squares, (s[0] + s[1]) + (s[2] + s[3]));
    add(products, (p[0] + p[1]) + (p[2] + p[3]));
  }
  Vec<T> s = {}, p = {};
  for_vectors(dim - i, [&](int64_t offset, auto part) { take(i + offset, part, s, p); });
  add(squares, s);
  add(products, p);
  const double r = 1 / __builtin_sqrt(sum_lanes(squares) / (double)dim + eps);
  row.high = (Scalar<T>)r;
  row.low = (Scalar<T>)(r - (double)row.high);
  row.mean = (Scalar<T>)(r * sum_lanes(products) / (double)dim);
}

// The gradients of `count` rows; what they add to the weight's goes to weight_sums.
template <typename T, typename Stores>
MLLAMA_INLINE void finish_rows(const Row<T>* rows, const Row<T>* next, int count, const T* weight,
                               Scalar<T> gate, int64_t dim, Partial<T>* weight_sums, DVec& gate_sum,
                               Stores stores) {
  Vec<Partial<T>> gate_sums = {};
  for_vectors(dim, [&](int64_t i, auto part) {
    const Vec<T> w = load(weight + i, part);
    Vec<T> share = {};
    for (int k = 0; k < count; ++k) {
      const Row<T>& row = rows[k];
      __builtin_prefetch(next[k].total + i, 0, 2);
      __builtin_prefetch(next[k].grad_y + i, 0, 2);
      const Vec<T> total = load(row.total + i, part), grad_y = load(row.grad_y + i, part);
      const Vec<T> n = total * row.high + total * row.low;
      Vec<T> gradient = row.high * (w * grad_y - n * row.mean);
      if (row.grad_total) gradient += load(row.grad_total + i, part);
      stores.store(row.grad_residual + i, gradient, part);
      share += grad_y * round_to<T>(n);
      if (!row.grad_x) continue;
      stores.store(row.grad_x + i, row.visible ? gradient * gate : Vec<T>{}, part);
      if (row.x && row.visible) add(gate_sums, gradient * load(row.x + i, part));
    }
    Vec<Partial<T>> sum = load(weight_sums + i, part);
    add(sum, share);
    store(weight_sums + i, sum, part);
  });
  add(gate_sum, gate_sums);
}

template <typename T, typename Stores>
void run(const RmsNormBackwardParams& p, Stores stores) {
  using P = Partial<T>;
  const T* weight = static_cast<const T*>(p.weight);
  P* partials = static_cast<P*>(p.weight_partials);
  const Scalar<T> gate = p.gate ? tanh_gate<T>(p.gate) : Scalar<T>{1};
  const int64_t rows = p.outer * p.inner, blocks = norm_row_blocks(rows);
  const int64_t grain = blocks ? max<int64_t>(1, row_grain(p.dim) * blocks / rows) : 1;
  parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      P* weight_sums = partials + block * p.dim;
      DVec gate_sum = {};
      memset(weight_sums, 0, p.dim * sizeof(P));
      const int64_t end = rows * (block + 1) / blocks;
      for (int64_t row = rows * block / blocks; row < end; row += kRows) {
        Row<T> at[kRows], next[kRows];
        const int count = (int)min<int64_t>(kRows, end - row);
        for (int k = 0; k < count; ++k) {
          at[k] = locate<T>(p, row + k);
          next[k] = locate<T>(p, min(row + kRows + k, end - 1));
          find_factors(at[k], weight, p.dim, p.eps);
        }
        finish_rows(at, next, count, weight, gate, p.dim, weight_sums, gate_sum, stores);
      }
      if (p.gate_partials) p.gate_partials[block] = sum_lanes(gate_sum);
    }
    stores.finish();
  });
  T* grad_weight = static_cast<T*>(p.grad_weight);
  parallel_for(0, ceil_div(p.dim, kColumns), 1, [&](int64_t first, int64_t last) {
    for (int64_t column = first * kColumns; column < min(last * kColumns, p.dim);
         column += kColumns) {
      for_vectors(min(kColumns, p.dim - column), [&](int64_t i, auto part) {
        Vec<P> sum = {};
        for (int64_t block = 0; block < blocks; ++block) {
          sum += load(partials + block * p.dim + column + i, part);
        }
        store(grad_weight + column + i, __builtin_convertvector(sum, Vec<T>), part);
      });
    }
  });
  if (p.gate) store_gate_gradient<T>(p.gate_partials, blocks, p.gate, p.grad_gate);
}

}  // namespace

void rms_norm_backward(const RmsNormBackwardParams& p) {
  const int64_t rows = p.outer * p.inner, row_bytes = p.dim * element_size(p.dtype);
  with_stores(past_cache(rows, row_bytes, p.grad_residual, p.grad_x), [&](auto stores) {
    with_dtype(p.dtype, [&]<typename T>(Type<T>) { run<T>(p, stores); });
  });
}

}  // namespace mllama::MLLAMA_ISA
