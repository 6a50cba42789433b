// Similarities of rows, and the integer by which they are ordered: that of kdfast/ops/graph/triton_kernels.py, value, then
// index, then whether it is NaN.
#pragma once

#include <cstdint>
#include <cstring>

namespace kdfast::gpu {

constexpr int kCosine = 0, kDot = 1, kEuclidean = 2;
constexpr float kLowest = -__builtin_huge_valf();
constexpr int32_t kLargestIndex = INT32_MAX;

__device__ __forceinline__ int64_t key_of(float value, int64_t index) {
  const bool nan = value != value;
  const float ordered_value = nan ? kLowest : value + 0.f;  // + 0: one zero
  int32_t bits;
  memcpy(&bits, &ordered_value, 4);
  const int32_t ordered = bits < 0 ? bits ^ INT32_MAX : bits;
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<int64_t>(ordered)) << 32 |
                              static_cast<uint64_t>(kLargestIndex - index) << 1 | static_cast<uint64_t>(nan));
}
// By which a key is ordered: -inf of a NaN.
__device__ __forceinline__ float ordered_value(int64_t key) {
  const int32_t ordered = static_cast<int32_t>(key >> 32), bits = ordered < 0 ? ordered ^ INT32_MAX : ordered;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
__device__ __forceinline__ float value_of(int64_t key) { return (key & 1) != 0 ? __builtin_nanf("") : ordered_value(key); }
__device__ __forceinline__ int64_t index_of(int64_t key) { return kLargestIndex - ((key >> 1) & kLargestIndex); }

template <int METRIC>
__device__ __forceinline__ float similarity(float product, float a, float b) {
  if (METRIC == kCosine) return product * a * b;
  if (METRIC == kEuclidean) return 2 * product - (a + b);
  return product;
}

}  // namespace kdfast::gpu
