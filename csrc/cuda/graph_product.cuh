// Both looks of kdfast/ops/graph/triton_kernels.py at the similarities, in the registers of a tile's product: limits for
// the rows from every few tiles, then what reaches them. Without keys of another set one half of the tiles is multiplied
// and serves its rows and its columns.
//
// Work of an element that is no hit, of 128 a thread: its similarity (2 instructions for cosines, none for products), two
// comparisons, and half a vote and a branch. What a hit costs is paid by a warp in which there is one.
#pragma once

#include <cstdint>

#include "cuda/graph_key.cuh"
#include "cuda/tile_product.cuh"

namespace kdfast::gpu {

struct ProductArguments {
  Factors factors;
  const float *a, *b;     // coefficients of rows and columns: triton_kernels.py's
  const int64_t* labels;  // null: none
  bool itself;            // a row may be its own neighbour

  // ``own`` and ``other`` exist.
  __device__ __forceinline__ bool admits(int own, int other) const {
    return labels != nullptr ? labels[own] != labels[other] : itself || own != other;
  }
};

// similarity(), for cosines with the same bits for (a, b) and (b, a): a tile says it to both of its sides, and of equal
// rows one may have been a row of its tile and the other a column.
template <int METRIC>
__device__ __forceinline__ float mutual_similarity(float product, float a, float b) {
  return METRIC == kCosine ? product * (a * b) : similarity<METRIC>(product, a, b);
}

template <int METRIC>
__device__ __forceinline__ float coefficient(const float* of, int i) {
  return METRIC == kDot ? 0.f : of[i];
}

struct BoundsArguments {
  ProductArguments product;
  float* bins;             // (rows, kBins * splits)
  int32_t stride, splits;  // every how many tiles are looked at; blocks that share a row's
};

constexpr int kBinned = 2;                                 // bins of a row that one thread has
constexpr int kBins = kColumns / kWarpTile * 4 * kBinned;  // of a row that one block has, 8 columns of a tile each

// bins[row, kBins * split + i]: the largest similarity in bin i of every stride-th tile of a split. A NaN is not larger.
template <bool BFLOAT16, int METRIC, int ROWS>
__device__ __forceinline__ void graph_bounds(const BoundsArguments& s, Stage<ROWS> (&stages)[kStages], int block,
                                             int thread) {
  const ProductArguments& p = s.product;
  const int n = p.factors.n, m = p.factors.m;
  const Lane at(thread);
  const int first = block / s.splits * ROWS, split = block % s.splits;
  // What the tiles have so far waits where it is written: the registers are the product's.
  float* const bins = s.bins + kBins * split + (at.first_column / kWarpTile * 4 + at.lane % 4) * kBinned;
  const auto bins_of = [&](int row) { return bins + static_cast<int64_t>(row) * s.splits * kBins; };
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int bin = 0; bin < kBinned; ++bin)
        if (first + at.row(i, h) < n) bins_of(first + at.row(i, h))[bin] = kLowest;

  const int64_t step = static_cast<int64_t>(s.splits) * s.stride * kColumns;
#pragma unroll 1
  for (int64_t start = static_cast<int64_t>(split) * s.stride * kColumns; start < m; start += step) {
    const int column = static_cast<int>(start);
    Sums sums;
    multiply<BFLOAT16, ROWS>(p.factors, stages, first, column, thread, sums);
    const int row = anew(first);
    // All reads come before the first write, which could be to the same place for all that the compiler knows.
    float a[4][2], b[8][2], largest[4][2][kBinned];
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) b[j][e] = coefficient<METRIC>(p.b, at_most(column + at.column(j, e), m - 1));
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int own = at_most(row + at.row(i, h), n - 1);
        a[i][h] = coefficient<METRIC>(p.a, own);
#pragma unroll
        for (int bin = 0; bin < kBinned; ++bin) largest[i][h][bin] = bins_of(own)[bin];
      }
    // Elsewhere every element is admitted.
    const bool diagonal = row < column + kColumns && column < row + ROWS;
    const bool asks = p.labels != nullptr || (!p.itself && diagonal) || column + kColumns > m;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int own = row + at.row(i, h);
        float scores[8][2];
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            scores[j][e] = mutual_similarity<METRIC>(sums[i][j][2 * h + e], a[i][h], b[j][e]);
        if (asks) {
          const int again = anew(column);
#pragma unroll
          for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int other = again + at.column(j, e);
              if (own >= n || other >= m || !p.admits(own, other)) scores[j][e] = kLowest;
            }
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float& bin = largest[i][h][j % kBinned];
          bin = fmaxf(bin, fmaxf(scores[j][0], scores[j][1]));
        }
        if (own >= n) continue;
#pragma unroll
        for (int bin = 0; bin < kBinned; ++bin) bins_of(own)[bin] = largest[i][h][bin];
      }
  }
}

struct HitsArguments {
  ProductArguments product;
  const float* limits;  // of all rows
  int32_t* counts;      // of all rows, 0; they go on counting past the capacity
  int64_t* found;       // (rows, capacity)
  int32_t capacity;
  bool symmetric;       // x and y are one: what is right of the diagonal serves both sides
};

// An element that may be a hit of its row or its column.
struct Candidate {
  float similarity;
  int32_t place;  // kColumns * row + column of the tile
};
constexpr int kPassed = 16 * kWarpTile;  // candidates between two looks at how full the list is, at most
constexpr int kListed = 2 * kPassed;

template <int ROWS>
union HitsMemory {
  Stage<ROWS> stages[kStages];
  Candidate listed[kTileWarps<ROWS>][kListed];  // after the product
};
static_assert(sizeof(HitsMemory<128>) == sizeof(Stage<128>) * kStages, "the list needs no memory of its own");

// Blocks of a symmetric matrix come in squares, of the upper triangle.
template <int ROWS>
constexpr int kParted = ROWS / kColumns;

template <int ROWS>
constexpr int64_t hits_blocks(const HitsArguments& s) {
  const int64_t rows = tiles_of(s.product.factors.n, ROWS), columns = tiles_of(s.product.factors.m, kColumns);
  return s.symmetric ? rows * (rows + 1) / 2 * kParted<ROWS> : rows * columns;
}

// Gives what a warp has listed to the buffers. Each lane asks for places on its own, so that 32 atomics are on their way
// at a time, and only here is asked what may be a neighbour at all.
__device__ __forceinline__ void append(const HitsArguments& s, const Candidate* listed, int size, int row, int column,
                                       bool mirrored, int lane) {
  const ProductArguments& p = s.product;
  sync_lanes();
#pragma unroll 1
  for (int i = lane; i < size; i += 32) {
    const float similarity = listed[i].similarity;
    const int own = row + listed[i].place / kColumns, other = column + listed[i].place % kColumns;
    if (own >= p.factors.n || other >= p.factors.m || !p.admits(own, other)) continue;
    const bool of_row = !(similarity < s.limits[own]);  // a NaN is not below
    const bool of_column = mirrored && !(similarity < s.limits[other]);
    const int first = of_row ? next_place(s.counts + own) : s.capacity;
    const int second = of_column ? next_place(s.counts + other) : s.capacity;
    if (first < s.capacity) s.found[static_cast<int64_t>(own) * s.capacity + first] = key_of(similarity, other);
    if (second < s.capacity) s.found[static_cast<int64_t>(other) * s.capacity + second] = key_of(similarity, own);
  }
  sync_lanes();  // before others come to be listed there
}

// Appends the keys of what is not below the row's limit to its buffer, in any order.
template <bool BFLOAT16, int METRIC, int ROWS>
__device__ __forceinline__ void graph_hits(const HitsArguments& s, HitsMemory<ROWS>& memory, int64_t block, int thread) {
  const ProductArguments& p = s.product;
  const int n = p.factors.n, m = p.factors.m;
  int row, column;
  bool mirrored = false;  // around the diagonal both (i, j) and (j, i) are there
  if (s.symmetric) {
    const TilePlace square = place_in_triangle(block / kParted<ROWS>, tiles_of(n, ROWS));
    row = square.row * ROWS;
    column = square.column * ROWS + static_cast<int>(block % kParted<ROWS>) * kColumns;
    mirrored = square.row != square.column;
    if (column >= n) return;  // of a square at the end
  } else {
    const TilePlace tile = place_in_rectangle(block, tiles_of(n, ROWS), tiles_of(m, kColumns));
    row = tile.row * ROWS;
    column = tile.column * kColumns;
  }
  Sums sums;
  multiply<BFLOAT16, ROWS>(p.factors, memory.stages, row, column, thread, sums);

  const Lane at(thread);
  Candidate* listed = memory.listed[thread / 32];
  int size = 0;
  const int32_t place = kColumns * at.row(0, 0) + at.column(0, 0);
  const unsigned below = (1u << at.lane) - 1;
  float a[4][2], b[8][2], row_limit[4][2], column_limit[8][2];
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int other = at_most(column + at.column(j, e), m - 1);
      b[j][e] = coefficient<METRIC>(p.b, other);
      column_limit[j][e] = mirrored ? s.limits[other] : -kLowest;
    }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int own = at_most(row + at.row(i, h), n - 1);
      a[i][h] = coefficient<METRIC>(p.a, own);
      row_limit[i][h] = s.limits[own];
    }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sums[i][j][e] = mutual_similarity<METRIC>(sums[i][j][e], a[i][e / 2], b[j][e % 2]);
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        bool candidate[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float similarity = sums[i][j][2 * h + e];
          candidate[e] = !(similarity < row_limit[i][h]) || !(similarity < column_limit[j][e]);
        }
        if (!any(candidate[0] || candidate[1])) continue;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const unsigned lanes = ballot(candidate[e]);
          store_8(candidate[e], &listed[size + count(lanes & below)], sums[i][j][2 * h + e],
                  place + (kColumns * (16 * i + 8 * h) + 8 * j + e));
          size += count(lanes);
        }
      }
    if (i < 3 && size <= kListed - kPassed) continue;
    append(s, listed, size, row, column, mirrored, at.lane);
    size = 0;
  }
}

}  // namespace kdfast::gpu
