// The selection kernel on the CPU: each lane of a warp is a fiber, which runs until the warp meets.
//
// Lanes run one after the other, so that whoever reads what another lane has not written yet reads the poison that
// shared memory begins with. Lanes that do not meet in the same instruction end the process.
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>

#include "cuda_emulation.h"

struct float4 {
  float x, y, z, w;
};

namespace {

constexpr int kLanes = 32, kStack = 1 << 16;

struct Lane {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  const char* meets = nullptr;  // in which instruction; null: it has ended
  int times = 0;
  Copies copies;
};

ucontext_t warp;
Lane lanes[kLanes];
int current;
std::function<void(int)> body;
int64_t exchanged[2][kLanes];  // two, as a lane may be one meeting ahead of those that still read

// Every lane comes here before any goes on.
void meet(const char* instruction) {
  Lane& lane = lanes[current];
  lane.meets = instruction, ++lane.times;
  swapcontext(&lane.context, &warp);
}

void begin() {
  body(current);
  lanes[current].meets = nullptr;
}

void run_warp() {
  for (Lane& lane : lanes) {
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.get();
    lane.context.uc_stack.ss_size = kStack;
    lane.context.uc_link = &warp;
    lane.times = 0;
    lane.copies = {};
    makecontext(&lane.context, begin, 0);
  }
  do {
    for (current = 0; current < kLanes; ++current) swapcontext(&warp, &lanes[current].context);
    for (Lane& lane : lanes)
      if (lane.meets != lanes[0].meets) std::fputs("lanes of a warp have parted\n", stderr), std::abort();
  } while (lanes[0].meets != nullptr);
}

void aligned(const void* x) {
  if (reinterpret_cast<uintptr_t>(x) % 16 != 0) std::fputs("16 bytes that do not begin at 16\n", stderr), std::abort();
}

// What lane ``from`` brings.
template <class T>
T exchange(const char* instruction, T x, int from) {
  int64_t(&values)[kLanes] = exchanged[lanes[current].times % 2];
  std::memcpy(&values[current], &x, sizeof(T));
  meet(instruction);
  std::memcpy(&x, &values[from], sizeof(T));
  return x;
}

}  // namespace

namespace kdfast::gpu {

template <class T>
T of_lane(T x, int mask) {
  return exchange("of_lane", x, current ^ mask);
}
template <class T>
T from_lane(T x, int lane) {
  return exchange("from_lane", x, lane);
}
unsigned ballot(bool yes) {
  const int64_t(&values)[kLanes] = exchanged[lanes[current].times % 2];
  exchange("ballot", static_cast<int64_t>(yes), 0);
  unsigned bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<unsigned>(values[lane]) << lane;
  return bits;
}
int count(unsigned bits) { return __builtin_popcount(bits); }
void sync_lanes() { meet("sync_lanes"); }

void copy_16(bool wanted, void* shared, const void* global) {
  if (!wanted) return;
  aligned(global);
  lanes[current].copies.copy_16(shared, global);
}
void commit() { lanes[current].copies.commit(); }
template <int LEFT>
void wait() {
  lanes[current].copies.wait(LEFT);
}
float4 load_common(const float* x) {
  aligned(x);
  float4 y;
  std::memcpy(&y, x, 16);
  return y;
}

}  // namespace kdfast::gpu

#include "cuda/graph_select.cuh"

namespace {

template <int METRIC, int Q>
void run(const kdfast::gpu::SelectArguments& s) {
  for (int row = 0; row < s.rows; ++row) {
    auto memory = std::make_unique<kdfast::gpu::SelectMemory>();
    const float infinity = __builtin_huge_valf();
    for (auto& place : memory->products) std::fill_n(place, kLanes, float4{infinity, infinity, infinity, infinity});
    std::fill_n(memory->waiting, kdfast::gpu::kRoom, int64_t{0x7fffffff} << 32);  // the best of all keys
    body = [&](int lane) { kdfast::gpu::graph_select<METRIC, Q>(s, *memory, row, lane); };
    run_warp();
  }
}

template <int METRIC>
void run(const kdfast::gpu::SelectArguments& s) {
  const int registers = kdfast::gpu::registers_for(METRIC, s.k);
  if (registers == 1) run<METRIC, 1>(s);
  if (registers == 2) run<METRIC, 2>(s);
  if (registers == 4) run<METRIC, 4>(s);
  if (registers == 8) run<METRIC, 8>(s);
}

}  // namespace

extern "C" void graph_select_on_cpu(const float* products, int64_t stride, const float* a, const float* b,
                                    const int64_t* labels, int64_t* keys, int64_t keys_stride, float* values,
                                    int32_t* counts, int64_t row, int64_t column, int32_t rows, int32_t columns,
                                    int32_t k, bool itself, bool last, float error, int metric) {
  const kdfast::gpu::SelectArguments s{products, stride, a,    b,       labels, keys,   keys_stride, values, counts,
                                       row,      column, rows, columns, k,      itself, last,        error};
  if (metric == 0) run<0>(s);
  if (metric == 1) run<1>(s);
  if (metric == 2) run<2>(s);
}
