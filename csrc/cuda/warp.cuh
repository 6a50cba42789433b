// The instructions by which the lanes of a warp meet, and how they read. Tests give the same names to the CPU.
#pragma once

#include <cstdint>

namespace kdfast::gpu {

constexpr unsigned kAllLanes = 0xffffffffu;  // take part in each of these

// A value of the lane whose number differs in the bits of ``mask``.
template <class T>
__device__ __forceinline__ T of_lane(T x, int mask) {
  return __shfl_xor_sync(kAllLanes, x, mask);
}
// A value of one lane for all.
template <class T>
__device__ __forceinline__ T from_lane(T x, int lane) {
  return __shfl_sync(kAllLanes, x, lane);
}
// Bit by bit, which lanes say yes.
__device__ __forceinline__ unsigned ballot(bool yes) { return __ballot_sync(kAllLanes, yes); }
__device__ __forceinline__ int count(unsigned bits) { return __popc(bits); }
// What was written to shared memory before can be read by the other lanes after.
__device__ __forceinline__ void sync_lanes() { __syncwarp(); }

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// 16 bytes to shared memory, past the registers; the thread that asked may read them after wait(). What it read there
// before, it has: cuda::pipeline of one thread relies on the same order. A predicate, as the compiler would move into a
// branch the arithmetic of addresses that is the same for a whole row.
__device__ __forceinline__ void copy_16(bool wanted, void* shared, const void* global) {
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.s32 wanted, %0, 0;\n"
      "@wanted cp.async.cg.shared.global [%1], [%2], 16;\n"
      "}" ::"r"(static_cast<int>(wanted)),
      "r"(shared_address(shared)), "l"(global)
      : "memory");
}
// What was asked for since the last commit() belongs together.
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the last LEFT groups of this thread have arrived.
template <int LEFT>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// 16 bytes that many warps read.
__device__ __forceinline__ float4 load_common(const float* x) { return __ldg(reinterpret_cast<const float4*>(x)); }

}  // namespace kdfast::gpu
