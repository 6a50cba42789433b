// The instructions kernels of thread-block clusters are written in. Tests give the same names to threads of the CPU.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

#include "cuda/warp.cuh"

namespace kdfast::gpu {

namespace cg = cooperative_groups;

// Written once and not read again.
__device__ __forceinline__ void store_16(void* global, uint4 x) { __stcs(static_cast<uint4*>(global), x); }

// Where a block waits for bytes that blocks of its cluster send to its shared memory, time after time. Not a barrier of
// the cluster, at which a thread waits until all it ever stored, the gradient too, is where the whole device can see it.
struct Mailbox {
  uint64_t barrier;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_rank() { return cg::this_cluster().block_rank(); }
__device__ __forceinline__ unsigned cluster_size() { return cg::this_cluster().num_blocks(); }
// After wait(), every block of the cluster runs and has done what it did before arrive().
__device__ __forceinline__ void cluster_arrive() { cg::this_cluster().barrier_arrive(); }
__device__ __forceinline__ void cluster_wait() { cg::this_cluster().barrier_wait(); }

// By one thread of the block, before cluster_arrive().
__device__ __forceinline__ void open(Mailbox* box) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(box)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// By one thread of the block, once each time: so many bytes will come, or have come.
__device__ __forceinline__ void expect(Mailbox* box, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(box)), "r"(bytes)
               : "memory");
}
// ``x`` to where ``slot`` is in the shared memory of block ``rank``, whose ``box`` counts its bytes.
__device__ __forceinline__ void send(float* slot, float x, Mailbox* box, unsigned rank) {
  asm volatile(
      "{\n"
      ".reg .b32 slot, box;\n"
      "mapa.shared::cluster.u32 slot, %0, %3;\n"
      "mapa.shared::cluster.u32 box, %2, %3;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [slot], %1, [box];\n"
      "}" ::"r"(shared_address(slot)),
      "r"(__float_as_int(x)), "r"(shared_address(box)), "r"(rank)
      : "memory");
}
// Until all bytes of a time have come; ``parity`` of the times before it.
__device__ __forceinline__ void receive(Mailbox* box, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred come;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 come, [%0], %1;\n"
      "@!come bra again;\n"
      "}" ::"r"(shared_address(box)),
      "r"(parity)
      : "memory");
}
#endif

}  // namespace kdfast::gpu
