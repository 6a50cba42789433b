// The threads of a block on the CPU: each is a fiber, which runs until its warp or the block meets.
//
// Threads run one after the other, and a warp runs until it waits for the others, so that whoever reads what another has
// not written yet reads the poison that shared memory begins with, and whoever writes too early destroys what others have
// yet to read. Lanes of a warp that do not meet in the same instruction end the process, as do warps that leave others
// waiting.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "cuda_emulation.h"

namespace fibers {

constexpr int kLanes = 32, kStack = 1 << 16, kBytes = 64;
inline const char* const kBlock = "sync_block";
inline const char* const kGoesOn = "goes on";

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  const char* meets = nullptr;  // in which instruction; null: it has ended
  int times = 0;
  Copies copies;
  alignas(16) unsigned char brings[2][kBytes];  // two, as a lane may be one meeting ahead of those that still read
};

inline ucontext_t scheduler;
inline std::vector<Fiber> all;
inline int current;
inline std::function<void(int)> body;

inline Fiber& own() { return all[current]; }
inline int own_lane() { return current % kLanes; }

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}
inline void aligned(const void* x) {
  if (reinterpret_cast<uintptr_t>(x) % 16 != 0) fail("16 bytes that do not begin at 16");
}

// Every lane, or every thread for kBlock, comes here before any goes on.
inline void meet(const char* instruction) {
  own().meets = instruction, ++own().times;
  swapcontext(&own().context, &scheduler);
}

// Meets; what(lane) is then what that lane of the warp brings.
template <class T>
auto meet_with(const char* instruction, const T& x) {
  static_assert(sizeof(T) <= kBytes);
  const int side = own().times % 2;
  std::memcpy(own().brings[side], &x, sizeof(T));
  meet(instruction);
  return [side, first = current - own_lane()](int lane) -> const T& {
    return *reinterpret_cast<const T*>(all[first + lane].brings[side]);
  };
}

inline void begin() {
  body(current);
  own().meets = nullptr;
}

// ``thread`` for each of so many warps. ``backwards``: the last one first.
inline void run_block(int warps, bool backwards, std::function<void(int)> thread) {
  body = std::move(thread);
  all.resize(warps * kLanes);
  for (Fiber& fiber : all) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    fiber.meets = kGoesOn;
    fiber.times = 0;
    fiber.copies = {};
    makecontext(&fiber.context, begin, 0);
  }
  for (int waiting = warps; waiting > 0;) {
    waiting = 0;
    for (int i = 0; i < warps; ++i) {
      const int first = (backwards ? warps - 1 - i : i) * kLanes;
      if (all[first].meets == kBlock)
        for (int lane = 0; lane < kLanes; ++lane) all[first + lane].meets = kGoesOn;
      while (all[first].meets != nullptr && all[first].meets != kBlock) {
        for (current = first; current < first + kLanes; ++current) swapcontext(&scheduler, &all[current].context);
        for (int lane = 0; lane < kLanes; ++lane)
          if (all[first + lane].meets != all[first].meets) fail("lanes of a warp have parted");
      }
      waiting += all[first].meets == kBlock;
    }
    if (waiting != 0 && waiting != warps) fail("warps wait for others that have ended");
  }
}

}  // namespace fibers

namespace kdfast::gpu {

template <class T>
T of_lane(T x, int mask) {
  return fibers::meet_with("of_lane", x)(fibers::own_lane() ^ mask);
}
template <class T>
T from_lane(T x, int lane) {
  return fibers::meet_with("from_lane", x)(lane);
}
inline unsigned ballot(bool yes) {
  const auto says = fibers::meet_with("ballot", yes);
  unsigned bits = 0;
  for (int lane = 0; lane < fibers::kLanes; ++lane) bits |= static_cast<unsigned>(says(lane)) << lane;
  return bits;
}
inline bool any(bool yes) { return ballot(yes) != 0; }
inline int count(unsigned bits) { return __builtin_popcount(bits); }
inline void sync_lanes() { fibers::meet("sync_lanes"); }
inline void sync_block() { fibers::meet(fibers::kBlock); }
template <int LEFT>
void wait() {
  fibers::own().copies.wait(LEFT);
}

}  // namespace kdfast::gpu
