// The cluster kernel of kl on threads of the CPU: each thread of a cluster is one, each barrier a barrier.
//
// Copies arrive when they are waited for and not before, and shared memory begins as NaN, so that whoever reads what
// another thread copied, or too early, reads NaN.
#include <barrier>
#include <cstdint>
#include <cstring>
#include <functional>
#include <optional>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline
struct uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  unsigned x = 0;
};
thread_local Index blockIdx, threadIdx;

#include "math/softmax_pair.h"
#include "torch/headeronly/util/BFloat16.h"
#include "torch/headeronly/util/Half.h"

namespace {

constexpr int kThreads = 64;

struct Block {
  std::barrier<> all{kThreads}, warps[kThreads / 32]{std::barrier<>{32}, std::barrier<>{32}};
  float lanes[kThreads];
  kdfast::PairSums of_warps[kThreads / 32], of_block;
  std::vector<uint4> slice;
};

struct Cluster {
  explicit Cluster(int size) : blocks(size), all(size * kThreads) {}
  std::vector<Block> blocks;
  std::barrier<> all;
};

thread_local Cluster* cluster;
thread_local unsigned rank;
thread_local std::optional<std::barrier<>::arrival_token> token;
thread_local std::vector<std::vector<std::function<void()>>> groups;  // of copies that have not arrived

Block& block() { return cluster->blocks[rank]; }
void __syncthreads() { block().all.arrive_and_wait(); }

}  // namespace

namespace kdfast::gpu {

void copy_16(uint4* shared, const void* global) {
  groups.back().push_back([=] { std::memcpy(shared, global, 16); });
}
void commit() { groups.emplace_back(); }
template <int LEFT>
void wait() {
  for (size_t group = 0; group + 1 + LEFT < groups.size(); ++group) {
    for (auto& copy : groups[group]) copy();
    groups[group].clear();
  }
}
float of_lane(float x, int mask) {
  Block& b = block();
  b.lanes[threadIdx.x] = x;
  b.warps[threadIdx.x / 32].arrive_and_wait();
  const float y = b.lanes[threadIdx.x ^ mask];
  b.warps[threadIdx.x / 32].arrive_and_wait();
  return y;
}
void store_16(void* global, uint4 x) { std::memcpy(global, &x, 16); }
unsigned cluster_rank() { return rank; }
unsigned cluster_size() { return static_cast<unsigned>(cluster->blocks.size()); }
void cluster_arrive() { token = cluster->all.arrive(); }
void cluster_wait() {
  cluster->all.wait(std::move(*token));
  token.reset();
}
template <class T>
const T* of_rank(T* shared, unsigned other) {
  const auto offset = reinterpret_cast<char*>(shared) - reinterpret_cast<char*>(&block());
  return reinterpret_cast<T*>(reinterpret_cast<char*>(&cluster->blocks[other]) + offset);
}

}  // namespace kdfast::gpu

#include "cuda/kl_cluster.cuh"

namespace {

template <class T, bool REVERSE>
void run(const kdfast::gpu::KlArguments& a, int64_t rows, int size) {
  const int chunks = a.classes / kdfast::gpu::Chunk<T>::kSize, per_block = (chunks + size - 1) / size;
  for (int64_t row = 0; row < rows; ++row) {
    Cluster shared(size);
    for (Block& b : shared.blocks) b.slice.assign(2 * per_block, uint4{~0u, ~0u, ~0u, ~0u});
    std::vector<std::thread> threads;
    for (int r = 0; r < size; ++r)
      for (int t = 0; t < kThreads; ++t)
        threads.emplace_back([&, r, t] {
          cluster = &shared;
          rank = r;
          blockIdx.x = static_cast<unsigned>(row * size + r);
          threadIdx.x = t;
          groups.assign(1, {});
          Block& b = block();
          kdfast::gpu::kl_cluster<T, REVERSE, kThreads>(a, b.slice.data(), b.of_warps, &b.of_block);
        });
    for (auto& thread : threads) thread.join();
  }
}

template <class T>
void run(bool reverse, const kdfast::gpu::KlArguments& a, int64_t rows, int size) {
  reverse ? run<T, true>(a, rows, size) : run<T, false>(a, rows, size);
}

}  // namespace

extern "C" void kl_cluster_on_cpu(const void* student, const void* teacher, void* grad, float* loss, const uint8_t* mask,
                                  const double* row_weight, const float* count_factor, int64_t student_stride,
                                  int64_t teacher_stride, int32_t classes, float factor, float scale, float slope,
                                  float weight, int64_t rows, int size, int type, int reverse) {
  const kdfast::gpu::KlArguments a{student,        teacher,        grad,    loss,   mask,  row_weight, count_factor,
                                   student_stride, teacher_stride, classes, factor, scale, slope,      weight};
  if (type == 0) run<float>(reverse != 0, a, rows, size);
  if (type == 1) run<c10::BFloat16>(reverse != 0, a, rows, size);
  if (type == 2) run<c10::Half>(reverse != 0, a, rows, size);
}
