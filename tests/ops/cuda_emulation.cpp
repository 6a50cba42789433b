// The cluster kernel of kl on threads of the CPU: each thread of a cluster is one, each barrier a barrier.
//
// A copy makes its 16 bytes NaN when it is asked for, and arrives when it is waited for and not before, so that whoever
// reads what another thread copied, too early, or after it asked for what comes next, reads NaN. The last block is late
// to read its mail, so that others that do not wait for it overwrite what it has yet to read. Copies from anywhere but a
// row that counts are themselves counted.
#include <atomic>
#include <barrier>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <optional>
#include <thread>
#include <vector>

#include "cuda_emulation.h"

struct uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  unsigned x = 0;
};
thread_local Index gridDim, blockIdx, threadIdx;

#include "math/softmax_pair.h"
#include "torch/headeronly/util/BFloat16.h"
#include "torch/headeronly/util/Half.h"

namespace {

// Of a block: few, but of the most blocks more, so that they have more than 32 warps, as those of a GPU.
constexpr int kThreads = 64, kManyThreads = 160;

struct Block {
  struct Warp {
    std::barrier<> all{32};
  };
  Warp warps[kManyThreads / 32];
  float lanes[kManyThreads];
  alignas(64) unsigned char inboxes[8192];  // whose type comes with the kernel
  std::vector<uint4> slice;
};

struct Cluster {
  Cluster(int size, int threads) : blocks(size), all(size * threads) {}
  std::vector<Block> blocks;
  std::barrier<> all;
};

thread_local Cluster* cluster;
thread_local unsigned rank;
thread_local std::optional<std::barrier<>::arrival_token> token;
thread_local Copies copies;

Block& block() { return cluster->blocks[rank]; }

// Rows that may be read.
struct Readable {
  const char* begin;
  int64_t stride, row_bytes;
};
Readable readable[2];
const uint8_t* counts;
int64_t row_count;
std::atomic<int64_t> misread;

bool may_read(const void* bytes) {
  for (const Readable& rows : readable) {
    const int64_t offset = static_cast<const char*>(bytes) - rows.begin;
    const int64_t row = rows.stride == 0 ? 0 : offset / rows.stride;
    if (offset < 0 || row >= row_count || offset - row * rows.stride + 16 > rows.row_bytes) continue;
    return counts == nullptr || rows.stride == 0 || counts[row] != 0;
  }
  return false;
}

}  // namespace

namespace kdfast::gpu {

void copy_16(bool wanted, void* shared, const void* global) {
  if (!wanted) return;
  if (may_read(global))
    copies.copy_16(shared, global);
  else
    ++misread;
}
void commit() { copies.commit(); }
template <int LEFT>
void wait() {
  copies.wait(LEFT);
}
float of_lane(float x, int mask) {
  Block& b = block();
  b.lanes[threadIdx.x] = x;
  b.warps[threadIdx.x / 32].all.arrive_and_wait();
  const float y = b.lanes[threadIdx.x ^ mask];
  b.warps[threadIdx.x / 32].all.arrive_and_wait();
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

struct Mailbox {
  std::mutex mutex;
  std::condition_variable changed;
  int64_t bytes = 0;  // to come; below 0 where they came before they were expected
  bool expected = false;
  unsigned times = 0;

  void come(int64_t now, bool expects) {
    const std::lock_guard lock(mutex);
    bytes += now;
    expected |= expects;
    if (!expected || bytes != 0) return;
    expected = false;
    ++times;
    changed.notify_all();
  }
};
void open(Mailbox* box) { new (box) Mailbox; }
void expect(Mailbox* box, int bytes) { box->come(bytes, true); }
template <class T>
T* of_rank(T* shared, unsigned other) {
  const auto offset = reinterpret_cast<char*>(shared) - reinterpret_cast<char*>(&block());
  return reinterpret_cast<T*>(reinterpret_cast<char*>(&cluster->blocks[other]) + offset);
}
void send(float* slot, float x, Mailbox* box, unsigned other) {
  *of_rank(slot, other) = x;
  of_rank(box, other)->come(-4, false);
}
void receive(Mailbox* box, unsigned parity) {
  {
    std::unique_lock lock(box->mutex);
    box->changed.wait(lock, [&] { return box->times % 2 != parity; });
  }
  if (rank + 1 == cluster->blocks.size()) std::this_thread::sleep_for(std::chrono::milliseconds(2));
}

}  // namespace kdfast::gpu

#include "cuda/kl_cluster.cuh"

namespace {

template <class T, bool REVERSE, int THREADS>
void run(const kdfast::gpu::KlArguments& a, int size, int clusters) {
  using Inbox = kdfast::gpu::Inbox<THREADS>;
  static_assert(2 * sizeof(Inbox) <= sizeof(Block::inboxes) && alignof(Inbox) <= 64);
  const int chunks = a.classes / kdfast::gpu::Chunk<T>::kSize, per_block = (chunks + size - 1) / size;
  const auto rows_of = [&](const void* x, int64_t stride) {
    const int64_t element = sizeof(T);
    return Readable{static_cast<const char*>(x), stride * element, a.classes * element};
  };
  readable[0] = rows_of(a.student, a.student_stride);
  readable[1] = rows_of(a.teacher, a.teacher_stride);
  counts = a.mask;
  row_count = a.rows;
  for (int c = 0; c < clusters; ++c) {
    Cluster shared(size, THREADS);
    for (Block& b : shared.blocks) {
      b.slice.assign(2 * per_block, uint4{~0u, ~0u, ~0u, ~0u});
      std::memset(b.inboxes, 0xff, sizeof b.inboxes);
    }
    std::vector<std::thread> threads;
    for (int r = 0; r < size; ++r)
      for (int t = 0; t < THREADS; ++t)
        threads.emplace_back([&, r, t] {
          cluster = &shared;
          rank = r;
          gridDim.x = static_cast<unsigned>(clusters * size);
          blockIdx.x = static_cast<unsigned>(c * size + r);
          threadIdx.x = t;
          copies = {};
          Block& b = block();
          kdfast::gpu::kl_cluster<T, REVERSE, THREADS>(a, b.slice.data(), reinterpret_cast<Inbox*>(b.inboxes));
        });
    for (auto& thread : threads) thread.join();
  }
}

template <class T, bool REVERSE>
void run(const kdfast::gpu::KlArguments& a, int size, int clusters) {
  size == kdfast::gpu::kMostBlocks ? run<T, REVERSE, kManyThreads>(a, size, clusters)
                                   : run<T, REVERSE, kThreads>(a, size, clusters);
}

template <class T>
void run(bool reverse, const kdfast::gpu::KlArguments& a, int size, int clusters) {
  reverse ? run<T, true>(a, size, clusters) : run<T, false>(a, size, clusters);
}

}  // namespace

// Returns how many copies read what they must not.
extern "C" int64_t kl_cluster_on_cpu(const void* student, const void* teacher, void* grad, float* loss,
                                     const uint8_t* mask, const double* row_weight, const float* count_factor,
                                     int64_t student_stride, int64_t teacher_stride, int32_t classes, float factor,
                                     float scale, float slope, float weight, int64_t rows, int size, int clusters,
                                     int type, int reverse) {
  const kdfast::gpu::KlArguments a{student, teacher, grad,    loss,   mask,  row_weight, count_factor, student_stride,
                                   teacher_stride, rows, classes, factor, scale, slope,      weight};
  misread = 0;
  if (type == 0) run<float>(reverse != 0, a, size, clusters);
  if (type == 1) run<c10::BFloat16>(reverse != 0, a, size, clusters);
  if (type == 2) run<c10::Half>(reverse != 0, a, size, clusters);
  return misread;
}
