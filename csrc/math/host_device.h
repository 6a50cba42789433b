// Scalar mathematics that CPU and CUDA kernels share. On the CPU the same templates take vectors (cpu/simd.h).
#pragma once

#if defined(__CUDACC__)
#define KDFAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Inlined always: a copy of a function compiled for AVX-512 must not be what the linker keeps for everyone.
#define KDFAST_HOST_DEVICE inline __attribute__((always_inline))
#endif
