// KL of long rows by clusters of thread blocks: a row stays in their shared memory between sums and gradient.
//
// Reads student and teacher once, writes the gradient once: 3 * V * itemsize bytes a row, from DRAM and through L2. The
// Triton kernel reads both twice, 5 * V * itemsize through L2 and as much more from DRAM as L2 has lost. What that can
// win, and where: docs/gpu.md. Special-function operations an element: 4, as there.
//
// As many clusters as run at once take row after row, so that nothing is set up for each. A thread copies 16 bytes here
// and there of either row, and works on what it copied itself: it waits for no neighbour, and asks for the next row's 16
// bytes as soon as it has last used this row's, while the gradient is written. A slice is asked for in kGroups parts that
// are summed as they arrive. Blocks send each other five numbers a warp. Two or more blocks on an SM: one loads and stores
// while another sums or waits.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

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
  int64_t rows;
  int32_t classes;                         // a multiple of the elements in 16 bytes
  float factor;                            // log2(e) / T
  float scale, slope;                      // of the divergence; of its gradient: scale / T
  float weight;                            // of every row
};

constexpr int kMostBlocks = 8;  // a row, as many as every device that has clusters allows
constexpr int kGroups = 4;      // of copies in flight, so that summing begins when a quarter has arrived

template <class T>
struct Chunk {  // what 16 bytes hold
  static constexpr int kSize = 16 / sizeof(T);
  T element[kSize];
};

// Elements 16 bytes hold, widened before any arithmetic.
template <class T>
__device__ __forceinline__ void widen(const uint4& bytes, float (&x)[Chunk<T>::kSize]) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {  // one instruction an element, where to take 16 bits and shift is two
    const uint32_t words[] = {bytes.x, bytes.y, bytes.z, bytes.w};
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair[] = {words[i] << 16, words[i] & 0xffff0000u};
      memcpy(x + 2 * i, pair, 8);
    }
  } else {
    Chunk<T> chunk;
    memcpy(&chunk, &bytes, 16);
    for (int i = 0; i < Chunk<T>::kSize; ++i) x[i] = static_cast<float>(chunk.element[i]);
  }
}
template <class T>
__device__ __forceinline__ uint4 narrowed(const float (&x)[Chunk<T>::kSize]) {
  Chunk<T> chunk;
  for (int i = 0; i < Chunk<T>::kSize; ++i) chunk.element[i] = static_cast<T>(x[i]);
  uint4 bytes;
  memcpy(&bytes, &chunk, 16);
  return bytes;
}

// Over the 32 lanes of a warp, in one order: the same bits in every lane and on every run.
__device__ __forceinline__ float largest_of_warp(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, of_lane(x, mask));
  return x;
}
// Sums that are relative to the same maxima.
__device__ __forceinline__ PairSums sum_of_warp(PairSums sums) {
  for (int mask = 16; mask > 0; mask /= 2) {
    sums.sum_s += of_lane(sums.sum_s, mask);
    sums.sum_t += of_lane(sums.sum_t, mask);
    sums.cross += of_lane(sums.cross, mask);
  }
  return sums;
}

// What all warps of a cluster send to each of its blocks.
template <int THREADS>
struct Inbox {
  PairSums of_warps[kMostBlocks * THREADS / 32];
  Mailbox box;
};

// Sums of a whole row, from those of all warps of the cluster: the same in every thread.
template <bool REVERSE>
__device__ __forceinline__ PairSums sum_of_row(const PairSums* of_warps, int warps, int lane, float factor) {
  PairSums total;
  for (int warp = lane; warp < warps; warp += 32) {
    total.max_s = fmaxf(total.max_s, of_warps[warp].max_s);
    total.max_t = fmaxf(total.max_t, of_warps[warp].max_t);
  }
  total.max_s = largest_of_warp(total.max_s);
  total.max_t = largest_of_warp(total.max_t);
  for (int warp = lane; warp < warps; warp += 32) {
    const PairSums part = moved<REVERSE>(of_warps[warp], total.max_s, total.max_t, factor);
    total.sum_s += part.sum_s;
    total.sum_t += part.sum_t;
    total.cross += part.cross;
  }
  return sum_of_warp(total);
}

// The body; ``slice`` is the block's shared memory: (chunks a block) of the student, as many of the teacher.
// ``inboxes``: for rows of even and odd turn.
template <class T, bool REVERSE, int THREADS>
__device__ void kl_cluster(const KlArguments& a, uint4* slice, Inbox<THREADS>* inboxes) {
  constexpr int N = Chunk<T>::kSize, kWarps = THREADS / 32;
  const int size = static_cast<int>(cluster_size()), rank = static_cast<int>(cluster_rank());
  const int64_t clusters = gridDim.x / size;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int chunks = a.classes / N, per_block = (chunks + size - 1) / size, first = rank * per_block;
  const int mine = chunks - first < per_block ? (chunks - first > 0 ? chunks - first : 0) : per_block;
  const int per_group = (mine + THREADS * kGroups - 1) / (THREADS * kGroups) * THREADS;
  uint4 *student = slice, *teacher = slice + per_block;

  const auto each_of_group = [&](int group, auto&& work) {
    const int end = (group + 1) * per_group < mine ? (group + 1) * per_group : mine;
    for (int i = group * per_group + thread; i < end; i += THREADS) work(i);
  };
  const auto slice_of = [&](const void* rows, int64_t row, int64_t stride) {
    return reinterpret_cast<const uint4*>(static_cast<const T*>(rows) + row * stride) + first;
  };
  const auto grad_of = [&](int64_t row) { return static_cast<uint4*>(a.grad) + row * chunks + first; };
  // The cluster's first row from ``row`` on that counts. Those before it are not read: all blocks pass over them alike.
  const auto counting = [&](int64_t row) {
    for (; row < a.rows && a.mask != nullptr && a.mask[row] == 0; row += clusters) {
      for (int i = thread; a.grad != nullptr && i < mine; i += THREADS) store_16(grad_of(row) + i, uint4{0, 0, 0, 0});
      if (rank == 0 && thread == 0) a.loss[row] = 0;
    }
    return row;
  };

  if (thread == 0) {
    open(&inboxes[0].box);
    open(&inboxes[1].box);
  }
  cluster_arrive();
  int64_t row = counting(blockIdx.x / size);
  const uint4* from_s = slice_of(a.student, row, a.student_stride);
  const uint4* from_t = slice_of(a.teacher, row, a.teacher_stride);
  const auto ask = [&](bool wanted, int i) {
    copy_16(wanted, student + i, from_s + i);
    copy_16(wanted, teacher + i, from_t + i);
  };
  for (int group = 0; group < kGroups; ++group) {
    each_of_group(group, [&](int i) { ask(row < a.rows, i); });
    commit();
  }
  int64_t next = counting(row + clusters);
  cluster_wait();

  for (unsigned turn = 0; row < a.rows; ++turn) {
    const bool more = next < a.rows;
    from_s = slice_of(a.student, next, a.student_stride);
    from_t = slice_of(a.teacher, next, a.teacher_stride);
    GrowingPairSums<REVERSE> growing;
    for (int group = 0; group < kGroups; ++group) {
      wait<kGroups - 1>();  // the last kGroups are this row's, and for each waited for one is committed, if an empty one
      each_of_group(group, [&](int i) {
        float s[N], t[N];
        widen<T>(student[i], s);
        widen<T>(teacher[i], t);
        growing.add(s, t, a.factor);
        if (a.grad == nullptr) ask(more, i);
      });
      commit();
    }

    // Every warp sends to every block, and adds up what its own block was sent. What it sends of the next row it sends
    // after it has read of this one; who has heard of the next row from all may fill this row's inbox again: two
    // suffice. No warp leaves before all has come that its block is sent.
    const float max_s = largest_of_warp(growing.top_s), max_t = largest_of_warp(growing.top_t);
    const PairSums sums = sum_of_warp(moved<REVERSE>(growing.sums, max_s, max_t, a.factor));
    Inbox<THREADS>& inbox = inboxes[turn % 2];
    if (thread == 0) expect(&inbox.box, size * kWarps * static_cast<int>(sizeof(PairSums)));
    if (lane < size) {
      PairSums& slot = inbox.of_warps[rank * kWarps + warp];
      send(&slot.max_s, sums.max_s, &inbox.box, lane);
      send(&slot.max_t, sums.max_t, &inbox.box, lane);
      send(&slot.sum_s, sums.sum_s, &inbox.box, lane);
      send(&slot.sum_t, sums.sum_t, &inbox.box, lane);
      send(&slot.cross, sums.cross, &inbox.box, lane);
    }
    const int64_t after = counting(next + clusters);  // this and the weights take time, while the others' sums come
    float weight = a.weight;
    if (a.row_weight != nullptr) weight *= static_cast<float>(a.row_weight[row]);
    if (a.count_factor != nullptr) weight *= *a.count_factor;
    receive(&inbox.box, turn / 2 % 2);
    const PairSums total = sum_of_row<REVERSE>(inbox.of_warps, size * kWarps, lane, a.factor);

    const PairDivergence<REVERSE> row_is(total, a.factor, a.slope * weight);
    // A weight of 0 leaves the divergence out, also where it is infinite.
    if (rank == 0 && thread == 0) a.loss[row] = (a.scale == 0 ? 0.f : a.scale * row_is.value) * weight;
    if (a.grad != nullptr) {
      uint4* const grad = grad_of(row);
      for (int group = 0; group < kGroups; ++group) {
        each_of_group(group, [&](int i) {
          float s[N], t[N];
          widen<T>(student[i], s);
          widen<T>(teacher[i], t);
          for (int j = 0; j < N; ++j) s[j] = row_is.gradient(s[j], t[j]);
          store_16(grad + i, narrowed<T>(s));
          ask(more, i);
        });
        commit();
      }
    }
    row = next;
    next = after;
  }
}

}  // namespace kdfast::gpu
