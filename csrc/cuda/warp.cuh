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
__device__ __forceinline__ bool any(bool yes) { return __any_sync(kAllLanes, yes) != 0; }
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
// The same of only the first ``bytes``; zeros follow.
__device__ __forceinline__ void copy_16(bool wanted, void* shared, const void* global, int bytes) {
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.s32 wanted, %0, 0;\n"
      "@wanted cp.async.cg.shared.global [%1], [%2], 16, %3;\n"
      "}" ::"r"(static_cast<int>(wanted)),
      "r"(shared_address(shared)), "l"(global), "r"(bytes)
      : "memory");
}
// What was asked for since the last commit() belongs together.
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the last LEFT groups of this thread have arrived.
template <int LEFT>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// All threads of the block come here before any goes on, and see what the others wrote to shared memory.
__device__ __forceinline__ void sync_block() { __syncthreads(); }

// Four matrices of 8 x 8 half-type numbers, whose rows are 16 bytes: lane 8 i + r says where row r of matrix i is, and
// gets of each matrix two neighbours of row lane / 4, from column 2 (lane % 4) on.
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(shared))
               : "memory");
}
// sums += rows columns, of 16 rows, 8 columns and 16 features: rows are four matrices, (rows 0-7, features 0-7), (8-15,
// 0-7), (0-7, 8-15), (8-15, 8-15), columns two of 8 columns each, as load_matrices() gives them. A lane has the sums of
// row lane / 4 with columns 2 (lane % 4) and the next, then those of 8 rows further. Not wgmma: every GPU from sm_80 to
// sm_100 has this one.
template <bool BFLOAT16>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&rows)[4], uint32_t near, uint32_t far) {
  if constexpr (BFLOAT16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(near), "r"(far));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(near), "r"(far));
}

// A place of one's own among those that all blocks count; in which order they come differs from run to run.
__device__ __forceinline__ int32_t next_place(int32_t* counter) { return atomicAdd(counter, 1); }

// Two numbers to shared memory, where they are wanted. A predicate: a branch that parts the warp costs more than what it
// would leave out.
__device__ __forceinline__ void store_8(bool wanted, void* shared, float x, int32_t y) {
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.s32 wanted, %0, 0;\n"
      "@wanted st.shared.b32 [%1], %2;\n"
      "@wanted st.shared.b32 [%1 + 4], %3;\n"
      "}" ::"r"(static_cast<int>(wanted)),
      "r"(shared_address(shared)), "r"(__float_as_int(x)), "r"(y)
      : "memory");
}

// The same number, of which the compiler knows nothing: what follows from it is not computed before a loop, where it
// would take the registers of the loop.
__device__ __forceinline__ int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 16 bytes that many warps read.
__device__ __forceinline__ float4 load_common(const float* x) { return __ldg(reinterpret_cast<const float4*>(x)); }

}  // namespace kdfast::gpu
