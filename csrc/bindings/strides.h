// The strides of tensors as the kernels get them, and the only code that asks torch for one. The
// stride of a dimension of one element has no meaning, nor has any of a tensor without elements:
// torch calls a tensor contiguous, and does not copy it, whatever that stride is.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace mllama {

using torch::stable::Tensor;

// Of dimension i; where it has no meaning, what a contiguous tensor would have. That of an empty
// tensor may be beyond 63 bits, and wraps.
inline int64_t stride(const Tensor& t, int64_t i) {
  if (t.size(i) > 1 && t.numel() > 0) return t.stride(i);
  if (i + 1 == t.dim()) return 1;
  return static_cast<int64_t>(static_cast<uint64_t>(stride(t, i + 1)) *
                              static_cast<uint64_t>(std::max<int64_t>(t.size(i + 1), 1)));
}

inline bool rows_contiguous(const Tensor& t) { return stride(t, t.dim() - 1) == 1; }

inline Tensor with_contiguous_rows(const Tensor& t) {
  return rows_contiguous(t) ? t : torch::stable::contiguous(t);
}

// A matrix that is one row or one column, its elements one after another and its strides those of a
// contiguous tensor: by others the library multiplies in another order.
inline Tensor with_packed_vector(const Tensor& t) {
  const bool is_vector = t.size(0) == 1 || t.size(1) == 1;
  if (!is_vector || (t.stride(0) == t.size(1) && t.stride(1) == 1)) return t;
  Tensor packed = torch::stable::new_empty(t, {t.size(0), t.size(1)});
  return torch::stable::copy_(packed, t);
}

// Of dimensions i and i + 1 taken as one, if one stride serves both.
inline std::optional<int64_t> joint_stride(const Tensor& t, int64_t i) {
  if (t.size(i) <= 1 || t.numel() == 0) return stride(t, i + 1);
  if (t.size(i + 1) <= 1) return stride(t, i);
  if (stride(t, i) != stride(t, i + 1) * t.size(i + 1)) return std::nullopt;
  return stride(t, i + 1);
}

// The kernels move 16 bytes at a time: every row of an attention operand starts on a 16-byte
// boundary.
inline Tensor aligned(const Tensor& t) {
  const int64_t unit = 16 / static_cast<int64_t>(t.element_size());
  bool good = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < t.dim(); ++i)
    good = good && (t.size(i) <= 1 || stride(t, i) % unit == 0);
  if (good) return t;
  return t.is_contiguous() ? torch::stable::clone(t) : torch::stable::contiguous(t);
}

// The leading dimensions of tensors of one shape, merged to (outer, inner); false if so many levels
// do not suffice. Tensors without elements have one row, which is never read.
struct Rows {
  int64_t outer = 1, inner = 1;
  std::vector<int64_t> outer_stride, inner_stride;
};

inline bool merge_rows(const std::vector<const Tensor*>& tensors, int64_t levels, Rows& rows) {
  struct Level {
    int64_t size;
    std::vector<int64_t> strides;
  };
  std::vector<Level> found;  // innermost first
  const Tensor& lead = *tensors.front();
  const int64_t first = lead.numel() == 0 ? -1 : lead.dim() - 2;
  for (int64_t i = first; i >= 0; --i) {
    if (lead.size(i) == 1) continue;
    Level level{lead.size(i), {}};
    for (const Tensor* t : tensors) level.strides.push_back(stride(*t, i));
    bool merge = !found.empty();
    for (size_t t = 0; merge && t < level.strides.size(); ++t) {
      merge = level.strides[t] == found.back().strides[t] * found.back().size;
    }
    if (merge) {
      found.back().size *= level.size;
    } else {
      found.push_back(level);
    }
  }
  if (static_cast<int64_t>(found.size()) > levels) return false;
  const std::vector<int64_t> none(tensors.size(), 0);
  if (found.size() == 1 && levels == 2) found.insert(found.begin(), Level{1, none});
  rows.inner = found.empty() ? 1 : found[0].size;
  rows.inner_stride = found.empty() ? none : found[0].strides;
  rows.outer = found.size() < 2 ? 1 : found[1].size;
  rows.outer_stride = found.size() < 2 ? none : found[1].strides;
  return true;
}

// Likewise of tensors whose rows are contiguous; where they are not, or need more levels, the
// tensors become contiguous copies.
inline Rows merged_rows(const std::vector<Tensor*>& tensors, int64_t levels) {
  const std::vector<const Tensor*> views(tensors.begin(), tensors.end());
  Rows rows;
  const bool contiguous =
      std::all_of(views.begin(), views.end(), [](const Tensor* t) { return rows_contiguous(*t); });
  if (!contiguous || !merge_rows(views, levels, rows)) {
    for (Tensor* t : tensors) *t = torch::stable::contiguous(*t);
    merge_rows(views, levels, rows);
  }
  return rows;
}

}  // namespace mllama
