// KL of one long row by a cluster of thread blocks: the row stays in their shared memory between sums and gradient.
//
// Reads student and teacher once, writes the gradient once: 3 * V * itemsize bytes a row, from DRAM and through L2. The
// Triton kernel reads both twice, 5 * V * itemsize through L2 and as much more from DRAM as L2 has lost. What that can
// win, and where: docs/gpu.md. Special-function operations an element: 4, as there.
//
// A thread copies 16 bytes here and there of either row, and works on what it copied itself, so that nobody waits for a
// neighbour: all of a slice is asked for at once, in GROUPS parts that are summed as they arrive. Blocks exchange five
// numbers each. Two or more blocks on an SM: one loads while another writes.
#pragma once

#include <cstdint>

#include "math/softmax_pair.h"

namespace kdfast::gpu {

struct KlArguments {
  const void* student;
  const void* teacher;
  void* grad;  // contiguous rows; null: no gradient
  float* loss;
  const uint8_t* mask;        // null: every row counts
  const double* row_weight;   // null: 1
  const float* count_factor;  // null: 1
  int64_t student_stride, teacher_stride;  // elements from row to row
  int32_t classes;                         // a multiple of the elements in 16 bytes
  float factor;                            // log2(e) / T
  float scale, slope;                      // of the divergence; of its gradient: scale / T
  float weight;                            // of every row
};

constexpr int kGroups = 4;  // of copies in flight, so that summing begins when a quarter has arrived

template <class T>
struct Chunk {  // what 16 bytes hold
  static constexpr int kSize = 16 / sizeof(T);
  T element[kSize];
};

// Elements 16 bytes hold, widened before any arithmetic.
template <class T>
__device__ __forceinline__ void widen(const uint4& bytes, float (&x)[Chunk<T>::kSize]) {
  Chunk<T> chunk;
  memcpy(&chunk, &bytes, 16);
  for (int i = 0; i < Chunk<T>::kSize; ++i) x[i] = static_cast<float>(chunk.element[i]);
}

__device__ __forceinline__ void wait_for_group(int group) {
  static_assert(kGroups == 4, "one case for each group");
  if (group == 0) wait<3>();
  if (group == 1) wait<2>();
  if (group == 2) wait<1>();
  if (group == 3) wait<0>();
}

template <bool REVERSE>
__device__ __forceinline__ PairSums of_warp(PairSums sums, float factor) {
  for (int mask = 16; mask > 0; mask /= 2) {
    PairSums other;
    other.max_s = of_lane(sums.max_s, mask);
    other.max_t = of_lane(sums.max_t, mask);
    other.sum_s = of_lane(sums.sum_s, mask);
    other.sum_t = of_lane(sums.sum_t, mask);
    other.cross = of_lane(sums.cross, mask);
    sums = joined<REVERSE>(sums, other, factor);
  }
  return sums;
}

// The body; ``slice`` is the block's shared memory: (chunks a block) of the student, as many of the teacher.
template <class T, bool REVERSE, int THREADS>
__device__ void kl_cluster(const KlArguments& a, uint4* slice, PairSums* of_warps, PairSums* of_block) {
  constexpr int N = Chunk<T>::kSize;
  const unsigned size = cluster_size(), rank = cluster_rank();
  const int64_t row = blockIdx.x / size;
  const int thread = static_cast<int>(threadIdx.x);
  const int chunks = a.classes / N, per_block = (chunks + static_cast<int>(size) - 1) / static_cast<int>(size);
  const int first = static_cast<int>(rank) * per_block;
  const int mine = chunks - first < per_block ? (chunks - first > 0 ? chunks - first : 0) : per_block;
  const int rounds = (mine + THREADS - 1) / THREADS, per_group = (rounds + kGroups - 1) / kGroups;
  uint4 *student = slice, *teacher = slice + per_block;
  uint4* grad = a.grad == nullptr ? nullptr : static_cast<uint4*>(a.grad) + row * chunks + first;

  if (a.mask != nullptr && a.mask[row] == 0) {  // not read; the whole cluster leaves
    for (int i = thread; grad != nullptr && i < mine; i += THREADS) store_16(grad + i, uint4{0, 0, 0, 0});
    if (rank == 0 && thread == 0) a.loss[row] = 0;
    return;
  }

  const uint4* from_s = reinterpret_cast<const uint4*>(static_cast<const T*>(a.student) + row * a.student_stride) + first;
  const uint4* from_t = reinterpret_cast<const uint4*>(static_cast<const T*>(a.teacher) + row * a.teacher_stride) + first;
  for (int group = 0; group < kGroups; ++group) {
    for (int round = group * per_group; round < (group + 1) * per_group; ++round) {
      const int i = round * THREADS + thread;
      if (i < mine) {
        copy_16(student + i, from_s + i);
        copy_16(teacher + i, from_t + i);
      }
    }
    commit();
  }

  PairSums sums;
  float s[N], t[N];
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    wait_for_group(group);
    for (int round = group * per_group; round < (group + 1) * per_group; ++round) {
      const int i = round * THREADS + thread;
      if (i < mine) {
        widen<T>(student[i], s);
        widen<T>(teacher[i], t);
        sums = extended<REVERSE, N>(sums, s, t, a.factor);
      }
    }
  }

  // Threads, warps, blocks: each in one order, so that the same row has the same bits on every run.
  sums = of_warp<REVERSE>(sums, a.factor);
  if (thread % 32 == 0) of_warps[thread / 32] = sums;
  __syncthreads();
  if (thread == 0) {
    for (int warp = 1; warp < THREADS / 32; ++warp) sums = joined<REVERSE>(sums, of_warps[warp], a.factor);
    *of_block = sums;
  }
  cluster_arrive();
  cluster_wait();
  PairSums total = *of_rank(of_block, 0);
  for (unsigned other = 1; other < size; ++other) total = joined<REVERSE>(total, *of_rank(of_block, other), a.factor);
  cluster_arrive();  // this block has read; it stays until the others have

  float weight = a.weight;
  if (a.row_weight != nullptr) weight *= static_cast<float>(a.row_weight[row]);
  if (a.count_factor != nullptr) weight *= *a.count_factor;
  const PairDivergence<REVERSE> row_is(total, a.factor, a.slope * weight);
  // A weight of 0 leaves the divergence out, also where it is infinite.
  if (rank == 0 && thread == 0) a.loss[row] = (a.scale == 0 ? 0.f : a.scale * row_is.value) * weight;
  for (int i = thread; grad != nullptr && i < mine; i += THREADS) {
    widen<T>(student[i], s);
    widen<T>(teacher[i], t);
    Chunk<T> g;
    for (int j = 0; j < N; ++j) g.element[j] = static_cast<T>(row_is.gradient(s[j], t[j]));
    uint4 bytes;
    memcpy(&bytes, &g, 16);
    store_16(grad + i, bytes);
  }
  cluster_wait();
}

}  // namespace kdfast::gpu
