// The instructions kernels of thread-block clusters are written in. Tests give the same names to threads of the CPU.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

namespace kdfast::gpu {

namespace cg = cooperative_groups;

// 16 bytes to shared memory, past the registers; the thread that asked may read them after wait(). What it read there
// before, it has: cuda::pipeline of one thread relies on the same order. A predicate, as the compiler would move into a
// branch the arithmetic of addresses that is the same for a whole row.
__device__ __forceinline__ void copy_16(bool wanted, uint4* shared, const void* global) {
  asm volatile(
      "{ .reg .pred wanted; setp.ne.s32 wanted, %0, 0; @wanted cp.async.cg.shared.global [%1], [%2], 16; }" ::"r"(
          static_cast<int>(wanted)),
      "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global)
      : "memory");
}
// What was asked for since the last commit() belongs together.
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the last LEFT groups of this thread have arrived.
template <int LEFT>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// A value of the lane whose number differs in bit ``mask``; all 32 lanes take part.
__device__ __forceinline__ float of_lane(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// Written once and not read again.
__device__ __forceinline__ void store_16(void* global, uint4 x) { __stcs(static_cast<uint4*>(global), x); }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_rank() { return cg::this_cluster().block_rank(); }
__device__ __forceinline__ unsigned cluster_size() { return cg::this_cluster().num_blocks(); }
// What is written before arrive() can be read by the cluster's other blocks after their wait.
__device__ __forceinline__ void cluster_arrive() { cg::this_cluster().barrier_arrive(); }
__device__ __forceinline__ void cluster_wait() { cg::this_cluster().barrier_wait(); }
// The same variable in another block's shared memory.
template <class T>
__device__ __forceinline__ T* of_rank(T* shared, unsigned rank) {
  return cg::this_cluster().map_shared_rank(shared, rank);
}
#endif

}  // namespace kdfast::gpu
