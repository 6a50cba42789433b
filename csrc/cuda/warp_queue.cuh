// The largest of many different int64 keys, kept by the 32 lanes of one warp.
//
// Kept keys are sorted, largest first: the one of rank 32 q + lane is in register q of that lane. A key that may belong
// to them waits in shared memory until there are 32. Those are sorted by a bitonic network and merged by another: what
// is sorted in one order and what is sorted in the other are together bitonic, so their place-by-place maximum is too.
#pragma once

#include <cstdint>

namespace kdfast::gpu {

constexpr int64_t kNothing = INT64_MIN;  // below every key
constexpr int kAdded = 4;                 // keys that a lane may add before settle()
constexpr int kRoom = 31 + 32 * kAdded;   // for what waits then

template <int Q>
class WarpQueue {
 public:
  static constexpr int kKept = 32 * Q;

  // ``waiting``: kRoom keys of shared memory.
  __device__ WarpQueue(int64_t* waiting, int lane) : waiting_(waiting), lane_(lane) {
#pragma unroll
    for (int q = 0; q < Q; ++q) kept_[q] = kNothing;
  }

  // Continues with the first ``size`` keys of another queue.
  __device__ void load(const int64_t* keys, int size) {
#pragma unroll
    for (int q = 0; q < Q; ++q)
      if (rank(q) < size) kept_[q] = keys[rank(q)];
  }
  __device__ int rank(int q) const { return 32 * q + lane_; }
  __device__ int64_t kept(int q) const { return kept_[q]; }

  // The key of a rank, for all lanes. Every register is asked: one chosen by its number would be in local memory.
  __device__ int64_t at(int rank) const {
    int64_t found = kNothing;
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      const int64_t key = from_lane(kept_[q], rank % 32);
      if (rank / 32 == q) found = key;
    }
    return found;
  }

  // Every lane calls it, those with ``candidate`` add ``key``.
  __device__ __forceinline__ void add(bool candidate, int64_t key) {
    const unsigned lanes = ballot(candidate);
    if (candidate) waiting_[size_ + count(lanes & ((1u << lane_) - 1))] = key;
    size_ += count(lanes);
  }

  // Takes in what waits, 32 at a time; with ``all`` the rest too. Says whether there was something.
  __device__ __forceinline__ bool settle(bool all) {
    bool changed = false;
#pragma unroll 1
    while (size_ >= 32 || (all && size_ > 0)) {
      const int taken = size_ < 32 ? size_ : 32;
      size_ -= taken;
      sync_lanes();
      const int64_t key = lane_ < taken ? waiting_[size_ + lane_] : kNothing;
      sync_lanes();  // before other keys come to wait there
      merge(ascending(key));
      changed = true;
    }
    return changed;
  }

 private:
  __device__ __forceinline__ int64_t ascending(int64_t key) const {
#pragma unroll
    for (int size = 2; size <= 32; size *= 2)
#pragma unroll
      for (int stride = size / 2; stride > 0; stride /= 2) {
        const bool upwards = (lane_ & size) == 0, lower = (lane_ & stride) == 0;
        key = chosen(key, of_lane(key, stride), upwards != lower);
      }
    return key;
  }

  __device__ __forceinline__ void merge(int64_t ascending) {
    kept_[Q - 1] = chosen(kept_[Q - 1], ascending, true);
#pragma unroll
    for (int apart = Q / 2; apart > 0; apart /= 2)
#pragma unroll
      for (int q = 0; q < Q; ++q)
        if ((q & apart) == 0) {
          const int64_t a = kept_[q], b = kept_[q + apart];
          kept_[q] = chosen(a, b, true);
          kept_[q + apart] = chosen(a, b, false);
        }
#pragma unroll
    for (int stride = 16; stride > 0; stride /= 2)
#pragma unroll
      for (int q = 0; q < Q; ++q) kept_[q] = chosen(kept_[q], of_lane(kept_[q], stride), (lane_ & stride) == 0);
  }

  static __device__ __forceinline__ int64_t chosen(int64_t a, int64_t b, bool larger) { return (a > b) == larger ? a : b; }

  int64_t* waiting_;
  int64_t kept_[Q];
  int lane_, size_ = 0;
};

}  // namespace kdfast::gpu
