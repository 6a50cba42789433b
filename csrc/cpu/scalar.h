// Single elements of a row in any storage type, and what that type is.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/kl_rows.h"

namespace kdfast {

inline Storage storage_of(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Storage::float32;
    case ScalarType::Double: return Storage::float64;
    case ScalarType::Half: return Storage::float16;
    case ScalarType::BFloat16: return Storage::bfloat16;
    default: STD_TORCH_CHECK(false, "kdfast kernels take float16, bfloat16, float32 or float64");
  }
}

// Results and scratch are float, double for double.
inline int64_t compute_size(Storage storage) { return storage == Storage::float64 ? 8 : 4; }

inline double load_scalar(const void* row, int64_t i, Storage storage) {
  switch (storage) {
    case Storage::float32: return static_cast<const float*>(row)[i];
    case Storage::float64: return static_cast<const double*>(row)[i];
    case Storage::float16: return static_cast<float>(static_cast<const c10::Half*>(row)[i]);
    default: return static_cast<float>(static_cast<const c10::BFloat16*>(row)[i]);
  }
}

inline void store_scalar(void* row, int64_t i, Storage storage, double value) {
  switch (storage) {
    case Storage::float32: static_cast<float*>(row)[i] = static_cast<float>(value); break;
    case Storage::float64: static_cast<double*>(row)[i] = value; break;
    case Storage::float16: static_cast<c10::Half*>(row)[i] = static_cast<float>(value); break;
    default: static_cast<c10::BFloat16*>(row)[i] = static_cast<float>(value);
  }
}

}  // namespace kdfast
