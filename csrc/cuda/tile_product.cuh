// Products of rows of half types with others, a tile of 128 or 256 rows and 128 columns a block, on tensor cores. Sums stay
// in registers.
//
// Warps of 64 x 64. 64 features at a time come to shared memory past the registers, into three stages, so that two are on
// their way while one is multiplied. 128 bytes of a row are once around the banks: its 16-byte parts are exchanged by
// row % 8, so that neither the copies of one row nor the reads of one part of 8 rows meet in a bank.
//
// Of 128 rows two blocks fit on an SM (96 KiB each), and one multiplies while the other compares. 256 rows, 144 KiB, fill
// it, and read a quarter less from L2: per multiply-add 1 / ROWS + 1 / 128 elements. Which is faster is not measured.
//
// All tiles sum along the features in the same order, and a product of two numbers is the same either way: the sum for
// (i, j) has the bits of that for (j, i), if the tensor core treats both operands alike. That is not documented;
// tests/cuda/test_cuda_select.py looks.
#pragma once

#include <cmath>
#include <cstdint>

namespace kdfast::gpu {

constexpr int kColumns = 128;  // of a tile
constexpr int kDepth = 64;     // features of a stage
constexpr int kParts = 8;      // 16 bytes each, of a row's features
constexpr int kStages = 3;
constexpr int kWarpTile = 64;

template <int ROWS>
constexpr int kTileWarps = ROWS / kWarpTile * (kColumns / kWarpTile);
template <int ROWS>
constexpr int kTileThreads = 32 * kTileWarps<ROWS>;

struct alignas(16) Part {
  uint16_t numbers[8];
};
template <int ROWS>
struct Stage {
  Part rows[ROWS][kParts], columns[kColumns][kParts];
};

// Half-type matrices (rows, width), whose rows are multiples of 16 bytes and begin at one.
struct Factors {
  const uint16_t *x, *y;
  int32_t n, m, width;
};

// Where a thread's sums are: sums[i][j][2 h + e] belongs to row(i, h) and column(j, e) of the tile.
struct Lane {
  int lane, first_row, first_column;  // the latter two of the warp
  __device__ explicit Lane(int thread)
      : lane(thread % 32), first_row(thread / 64 * kWarpTile), first_column(thread / 32 % 2 * kWarpTile) {}
  __device__ __forceinline__ int row(int i, int h) const { return first_row + lane / 4 + (16 * i + 8 * h); }
  __device__ __forceinline__ int column(int j, int e) const { return first_column + 2 * (lane % 4) + (8 * j + e); }
};
using Sums = float[4][8][4];

__device__ __forceinline__ int at_most(int x, int most) { return x < most ? x : most; }

// A thread's share of the copies of COUNT rows, or columns, from ``first`` on; past the end the last one again.
template <int COUNT, int THREADS>
class Source {
 public:
  __device__ __forceinline__ Source(const uint16_t* from, int first, int count, int width, int thread)
      : from_(reinterpret_cast<const char*>(from + static_cast<int64_t>(first) * width)), width_(width),
        part_(thread % kParts), row_(thread / kParts) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      offsets_[i] = static_cast<uint32_t>(at_most(row_ + kApart * i, count - 1 - first)) * (2u * width) + 16u * part_;
  }
  // 64 features from ``feature`` on, zeros past the end.
  __device__ __forceinline__ void ask(bool wanted, Part (&to)[COUNT][kParts], int feature) const {
    const char* from = from_ + 2 * feature;
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      copy_16(wanted, &to[row_ + kApart * i][part_ ^ row_ % 8], from + offsets_[i],
              feature + 8 * part_ < width_ ? 16 : 0);
  }

 private:
  static constexpr int kApart = THREADS / kParts, kCopies = COUNT / kApart;
  static_assert(kApart % 8 == 0, "row % 8 is the same for all of a thread");
  const char* from_;
  int width_, part_, row_;
  uint32_t offsets_[kCopies];  // bytes; a register each
};

// 16 features of what a warp multiplies.
struct Fragments {
  uint32_t rows[4][4], columns[4][4];  // of 16 rows; of twice 8 columns

  template <int ROWS>
  __device__ __forceinline__ void load(const Stage<ROWS>& stage, int k, const Lane& at) {
    const int lane = at.lane;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      load_matrices(rows[i], &stage.rows[at.first_row + 16 * i + lane % 16][(2 * k + lane / 16) ^ lane % 8]);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      load_matrices(columns[j], &stage.columns[at.first_column + 16 * j + lane / 16 * 8 + lane % 8]
                                              [(2 * k + lane / 8 % 2) ^ lane % 8]);
  }
};

// All threads of a block, which may write to ``stages`` after.
template <bool BFLOAT16, int ROWS>
__device__ __forceinline__ void multiply(const Factors& f, Stage<ROWS> (&stages)[kStages], int row, int column,
                                         int thread, Sums& sums) {
  const Lane at(thread);
  const int steps = (f.width + kDepth - 1) / kDepth;
  const Source<ROWS, kTileThreads<ROWS>> rows(f.x, row, f.n, f.width, thread);
  const Source<kColumns, kTileThreads<ROWS>> columns(f.y, column, f.m, f.width, thread);
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    rows.ask(step < steps, stages[step].rows, step * kDepth);
    columns.ask(step < steps, stages[step].columns, step * kDepth);
    commit();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][j][e] = 0;

  int current = 0, next = kStages - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait<kStages - 2>();
    sync_block();  // all copies are here, and nobody reads the stage that is asked for next
    const Stage<ROWS>& stage = stages[current];
    Stage<ROWS>& later = stages[next];
    current = current + 1 == kStages ? 0 : current + 1;
    next = next + 1 == kStages ? 0 : next + 1;
    const int asked = step + kStages - 1;
    Fragments fragments[2];  // one is read while the other is multiplied
    fragments[0].load(stage, 0, at);
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      if (k + 1 < kDepth / 16) fragments[(k + 1) % 2].load(stage, k + 1, at);
      // Among the products, which leave the time for it.
      if (k == 0) rows.ask(asked < steps, later.rows, asked * kDepth);
      if (k == 1) columns.ask(asked < steps, later.columns, asked * kDepth);
      const Fragments& now = fragments[k % 2];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j)
          multiply_add<BFLOAT16>(sums[i][j], now.rows[i], now.columns[j / 2][j % 2 * 2],
                                 now.columns[j / 2][j % 2 * 2 + 1]);
    }
    commit();
  }
  sync_block();
}

// Which tile a block takes. Blocks of one time are neighbours in both directions: what they read is in L2.
struct TilePlace {
  int row, column;
};
constexpr int kTogether = 8;  // tiles

__host__ __device__ inline constexpr int tiles_of(int count, int size) { return (count + size - 1) / size; }

// Of ``tiles`` in a line either way those with row <= column: columns in groups, whose rows follow one another. Group g
// begins at block 32 g^2 + 4 g; the last one may have fewer columns.
__device__ __forceinline__ TilePlace place_in_triangle(int64_t block, int tiles) {
  const auto begin = [](int64_t g) { return (kTogether * g + 1) * kTogether * g / 2; };
  int g = static_cast<int>((sqrtf(1.f + 8.f * static_cast<float>(block)) - 1.f) / (2 * kTogether));
  while (begin(g) > block) --g;  // where the root was rounded
  while (begin(g + 1) <= block) ++g;
  const int first = kTogether * g, width = at_most(kTogether, tiles - first);
  int left = static_cast<int>(block - begin(g));
  if (left < first * width) return {left / width, first + left % width};
  left -= first * width;
  int column = 0;
  while (left > column) left -= ++column;
  return {first + left, first + column};
}

// All: rows in groups, whose columns follow one another.
__device__ __forceinline__ TilePlace place_in_rectangle(int64_t block, int rows, int columns) {
  const int first = static_cast<int>(block / (static_cast<int64_t>(kTogether) * columns)) * kTogether;
  const int height = at_most(kTogether, rows - first);
  const int left = static_cast<int>(block - static_cast<int64_t>(first) * columns);
  return {first + left % height, left / height};
}

}  // namespace kdfast::gpu
