// The product of graphs on the CPU, a block at a time: tensor-core instructions by the layouts that PTX documents.
//
// Reads and copies of shared memory that meet in a bank end the process, as do copies from beyond the features.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "fibers.h"

namespace {

struct Readable {
  const char *begin, *end;
};
std::vector<Readable> readable;                       // where copies may read
std::vector<const void*> copied[8 * fibers::kLanes];  // by each thread, and not yet looked at
Readable lists[8];                                    // where each warp may store

void may_read(const void* x, int bytes) {
  const char* first = static_cast<const char*>(x);
  for (const Readable& range : readable)
    if (range.begin <= first && first + bytes <= range.end) return;
  fibers::fail("a copy from beyond the features");
}

// Of 16 bytes each, by 8 lanes at once; where(i) is lane i's.
template <class Where>
void conflict_free(Where where) {
  unsigned banks = 0;
  for (int i = 0; i < 8; ++i) banks |= 1u << reinterpret_cast<uintptr_t>(where(i)) / 16 % 8;
  if (banks != 0xff) fibers::fail("8 lanes that meet in a bank");
}

float widened(uint16_t bits, bool bfloat16) {
  if (bfloat16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}

}  // namespace

namespace kdfast::gpu {

void copy_16(bool wanted, void* shared, const void* global, int bytes) {
  if (!wanted) return;
  fibers::aligned(shared);
  fibers::aligned(global);
  if (bytes > 0) may_read(global, bytes);
  copied[fibers::current].push_back(shared);
  fibers::own().copies.copy_16(shared, global, bytes);
}

void commit() {
  fibers::own().copies.commit();
  if (fibers::current % 8 != 7) return;  // the lanes before have been here, and further
  const int first = fibers::current - 7;
  const size_t size = copied[fibers::current].size();
  for (size_t copy = 0; copy < size; ++copy) conflict_free([&](int i) { return copied[first + i].at(copy); });
  for (int i = 0; i < 8; ++i) copied[first + i].erase(copied[first + i].begin(), copied[first + i].begin() + size);
}

// The row of matrix i that lane 8 i + r points to has 8 numbers; lane 4 r + c gets numbers 2 c and 2 c + 1 of row r.
void load_matrices(uint32_t (&matrices)[4], const void* shared) {
  fibers::aligned(shared);
  const auto points_to = fibers::meet_with("load_matrices", shared);
  const int lane = fibers::own_lane();
  for (int i = 0; i < 4; ++i) {
    conflict_free([&](int row) { return points_to(8 * i + row); });
    std::memcpy(&matrices[i], static_cast<const char*>(points_to(8 * i + lane / 4)) + lane % 4 * 4, 4);
  }
}

// The layouts of mma.m16n8k16 for 16-bit numbers, with g = lane / 4 and t = lane % 4:
//   A (16 x 16), number i of 8:  row g + 8 if i is 2, 3, 6 or 7; column 2 t + i % 2, + 8 from i = 4 on
//   B (16 x 8), number i of 4:   row 2 t + i % 2, + 8 from i = 2 on; column g
//   C (16 x 8), number i of 4:   row g, + 8 from i = 2 on; column 2 t + i % 2
template <bool BFLOAT16>
void multiply_add(float (&sums)[4], const uint32_t (&rows)[4], uint32_t near, uint32_t far) {
  struct Operands {
    float a[8], b[4];
  } mine;
  for (int i = 0; i < 8; ++i) mine.a[i] = widened(static_cast<uint16_t>(rows[i / 2] >> 16 * (i % 2)), BFLOAT16);
  for (int i = 0; i < 4; ++i) mine.b[i] = widened(static_cast<uint16_t>((i < 2 ? near : far) >> 16 * (i % 2)), BFLOAT16);
  const auto brings = fibers::meet_with("multiply_add", mine);
  for (int i = 0; i < 4; ++i) {
    const int row = fibers::own_lane() / 4 + i / 2 * 8, column = fibers::own_lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k)
      sums[i] += brings(row % 8 * 4 + k % 8 / 2).a[k / 8 * 4 + row / 8 * 2 + k % 2] *
                 brings(column * 4 + k % 8 / 2).b[k / 8 * 2 + k % 2];
  }
}

int32_t next_place(int32_t* counter) { return (*counter)++; }
int anew(int x) { return x; }
void store_8(bool wanted, void* shared, float x, int32_t y) {
  if (!wanted) return;
  const Readable& list = lists[fibers::current / fibers::kLanes];
  if (shared < list.begin || list.end < static_cast<char*>(shared) + 8) fibers::fail("a list is full");
  std::memcpy(shared, &x, 4);
  std::memcpy(static_cast<char*>(shared) + 4, &y, 4);
}

}  // namespace kdfast::gpu

#include "cuda/graph_product.cuh"

namespace {

using namespace kdfast::gpu;

template <int ROWS, class Thread>
void run(const ProductArguments& p, int64_t blocks, Thread thread) {
  const Factors& f = p.factors;
  const auto range = [](const auto* begin, const auto* end) {
    return Readable{reinterpret_cast<const char*>(begin), reinterpret_cast<const char*>(end)};
  };
  readable = {range(f.x, f.x + static_cast<int64_t>(f.n) * f.width), range(f.y, f.y + static_cast<int64_t>(f.m) * f.width)};
  struct alignas(128) Memory {
    unsigned char bytes[sizeof(HitsMemory<ROWS>)];
  };
  const auto memory = std::make_unique<Memory>();
  auto& shared = *reinterpret_cast<HitsMemory<ROWS>*>(memory->bytes);
  for (int warp = 0; warp < kTileWarps<ROWS>; ++warp) lists[warp] = range(shared.listed[warp], shared.listed[warp + 1]);
  for (int64_t block = 0; block < blocks; ++block) {
    std::memset(memory->bytes, 0xff, sizeof(memory->bytes));  // NaN
    fibers::run_block(kTileWarps<ROWS>, block % 2 == 1, [&](int t) { thread(shared, block, t); });
  }
}

template <bool BFLOAT16, int METRIC, int ROWS>
void run(const BoundsArguments& s) {
  run<ROWS>(s.product, static_cast<int64_t>(tiles_of(s.product.factors.n, ROWS)) * s.splits,
            [&](HitsMemory<ROWS>& memory, int64_t block, int thread) {
              graph_bounds<BFLOAT16, METRIC, ROWS>(s, memory.stages, static_cast<int>(block), thread);
            });
}
template <bool BFLOAT16, int METRIC, int ROWS>
void run(const HitsArguments& s) {
  run<ROWS>(s.product, hits_blocks<ROWS>(s), [&](HitsMemory<ROWS>& memory, int64_t block, int thread) {
    graph_hits<BFLOAT16, METRIC, ROWS>(s, memory, block, thread);
  });
}

template <bool BFLOAT16, int METRIC, class Arguments>
void run(int rows, const Arguments& s) {
  rows == 128 ? run<BFLOAT16, METRIC, 128>(s) : run<BFLOAT16, METRIC, 256>(s);
}
template <bool BFLOAT16, class Arguments>
void run(int metric, int rows, const Arguments& s) {
  if (metric == kCosine) run<BFLOAT16, kCosine>(rows, s);
  if (metric == kDot) run<BFLOAT16, kDot>(rows, s);
  if (metric == kEuclidean) run<BFLOAT16, kEuclidean>(rows, s);
}
template <class Arguments>
void run(bool bfloat16, int metric, int rows, const Arguments& s) {
  bfloat16 ? run<true>(metric, rows, s) : run<false>(metric, rows, s);
}

}  // namespace

extern "C" void graph_bounds_on_cpu(const uint16_t* x, const uint16_t* y, const float* a, const float* b,
                                    const int64_t* labels, float* bins, int32_t n, int32_t m, int32_t width,
                                    int32_t stride, int32_t splits, bool itself, bool bfloat16, int metric, int rows) {
  run(bfloat16, metric, rows, BoundsArguments{{{x, y, n, m, width}, a, b, labels, itself}, bins, stride, splits});
}

extern "C" void graph_hits_on_cpu(const uint16_t* x, const uint16_t* y, const float* a, const float* b,
                                  const int64_t* labels, const float* limits, int32_t* counts, int64_t* found, int32_t n,
                                  int32_t m, int32_t width, int32_t capacity, bool itself, bool symmetric, bool bfloat16,
                                  int metric, int rows) {
  run(bfloat16, metric, rows,
      HitsArguments{{{x, y, n, m, width}, a, b, labels, itself}, limits, counts, found, capacity, symmetric});
}

// Rows and columns of all tiles in their order.
extern "C" void places_on_cpu(int32_t rows, int32_t columns, bool symmetric, int64_t blocks, int32_t* places) {
  for (int64_t block = 0; block < blocks; ++block) {
    const TilePlace place = symmetric ? place_in_triangle(block, rows) : place_in_rectangle(block, rows, columns);
    places[2 * block] = place.row, places[2 * block + 1] = place.column;
  }
}
extern "C" void place_in_triangle_on_cpu(int64_t block, int32_t tiles, int32_t* place) {
  const TilePlace at = place_in_triangle(block, tiles);
  place[0] = at.row, place[1] = at.column;
}
extern "C" int32_t bins_of_a_block_on_cpu() { return kBins; }
