// Rows of a (..., V) tensor in memory, without a copy where its strides allow.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace kdfast {

// Row r starts at (r / inner) * outer_stride + (r % inner) * inner_stride elements; classes are adjacent. Two levels
// cover logits[:, :-1] of a contiguous (B, L, V), the slice every language model makes.
struct Rows {
  torch::stable::Tensor tensor;  // keeps the memory alive
  char* data;
  int64_t count, classes, inner, outer_stride, inner_stride, element_size;

  char* row(int64_t r) const {
    if (r < inner) return data + r * inner_stride * element_size;  // two divisions less, for contiguous rows all
    return data + ((r / inner) * outer_stride + (r % inner) * inner_stride) * element_size;
  }
};

inline Rows rows_of(torch::stable::Tensor tensor) {
  const int64_t last = tensor.dim() - 1;
  Rows rows{tensor, nullptr, 1, tensor.size(last), 1, 0, 0, static_cast<int64_t>(tensor.element_size())};
  if (tensor.numel() == 0) {  // strides mean nothing there
    for (int64_t d = 0; d < last; ++d) rows.count *= tensor.size(d);
    rows.data = static_cast<char*>(tensor.data_ptr());
    return rows;
  }
  bool inner_open = true, fits = tensor.stride(last) == 1 || rows.classes == 1;
  int64_t outer = 1;
  for (int64_t d = last - 1; d >= 0 && fits; --d) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (size == 1) continue;
    if (inner_open && rows.inner == 1) {
      rows.inner = size, rows.inner_stride = stride;
    } else if (inner_open && stride == rows.inner * rows.inner_stride) {
      rows.inner *= size;
    } else if (inner_open) {
      inner_open = false, outer = size, rows.outer_stride = stride;
    } else if (stride == outer * rows.outer_stride) {
      outer *= size;
    } else {
      fits = false;
    }
  }
  if (!fits) return rows_of(torch::stable::contiguous(tensor));
  rows.count = rows.inner * outer;
  rows.data = static_cast<char*>(tensor.data_ptr());
  return rows;
}

}  // namespace kdfast
