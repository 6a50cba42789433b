// The work of attention and feature_mse on one sample or block, one level's worth: what features.cpp drives and
// feature_rows.cpp implements. Maps are contiguous (channels, height, width); sums and scratch are float, double for
// double. Gradients have the student's type, but float for float16, which must not round before the loss is scaled.
#pragma once

#include <cstdint>

#include "cpu/kl_rows.h"

namespace kdfast {

struct MapSize {
  int64_t channels, height, width;

  int64_t pixels() const { return height * width; }
};

constexpr int64_t kMseBlock = 8192;  // elements: what a thread takes at a time

struct FeatureKernels {
  // a[pixel] = sum over channels of |f|^p.
  using Power = void (*)(const void* map, const MapSize&, double p, void* a);
  // out = k[pixel] sign(f) |f|^(p - 1), 0 where f is 0; `streamed`: past the caches where it is aligned.
  using PowerGrad = void (*)(const void* map, const MapSize&, double p, const void* k, void* out, bool streamed);
  // Means over the bins of adaptive average pooling, (channels, height, width) of `to`, in the type of sums.
  using Pool = void (*)(const void* map, const MapSize& from, const MapSize& to, void* pooled);
  // The gradient of the same: `pooled` to the map's size, in the gradient's type.
  using PoolGrad = void (*)(const void* pooled, const MapSize& from, const MapSize& to, void* out);
  // The sum of (s - t)^2 over n <= kMseBlock elements that `keep` (or null: all) keeps; out = slope (s - t), or null.
  using Mse = double (*)(const void* student, const void* teacher, const bool* keep, int64_t n, double slope, void* out,
                         bool streamed);
  Power power[kStorages];
  PowerGrad power_grad[kStorages];
  Pool pool[kStorages];
  PoolGrad pool_grad[kStorages];  // by the storage of the map
  Mse mse[kStorages];
};

KDFAST_DECLARE_LEVELS(FeatureKernels, feature_kernels)

}  // namespace kdfast
