// The selection kernel on the CPU, a warp at a time.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "fibers.h"

struct float4 {
  float x, y, z, w;
};

namespace kdfast::gpu {

void copy_16(bool wanted, void* shared, const void* global) {
  if (!wanted) return;
  fibers::aligned(global);
  fibers::own().copies.copy_16(shared, global);
}
void commit() { fibers::own().copies.commit(); }
float4 load_common(const float* x) {
  fibers::aligned(x);
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
    for (auto& place : memory->products) std::fill_n(place, fibers::kLanes, float4{infinity, infinity, infinity, infinity});
    std::fill_n(memory->waiting, kdfast::gpu::kRoom, int64_t{0x7fffffff} << 32);  // the best of all keys
    fibers::run_block(1, false, [&](int lane) { kdfast::gpu::graph_select<METRIC, Q>(s, *memory, row, lane); });
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
