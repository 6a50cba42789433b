// The best columns of each row of similarity_graph and hardest_negatives, from tiles of the product.
//
// One warp a row. It reads the row of the tile once, 16 bytes a lane, compares each similarity with the worst that it
// would keep, and gives what is better to its queue. What may be a neighbour at all (another row, another label) is asked
// of those alone. Between tiles of one row its keys wait in global memory. Bytes: 4 of a product, and 4 of a column's
// coefficient, which L1 gives to the block's warps.
//
// Columns come in their order, so an equal value that comes later is worse: `>` of two floats is enough to leave it out.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/graph_key.cuh"
#include "cuda/warp_queue.cuh"

namespace kdfast::gpu {

constexpr int kUnit = 128;  // columns that a warp reads at once
constexpr int kPlaces = 8;  // one for the unit that is looked at; the others' products are on their way

struct SelectArguments {
  const float* products;    // of rows from first_row on with columns from first_column on
  int64_t stride;           // from row to row of the products, a multiple of 4
  const float *a, *b;       // coefficients of all rows, of all columns: triton_kernels.py's
  const int64_t* labels;    // of all rows; null: none
  int64_t* keys;            // of all rows: the running state, of others than distances at the end the indices
  int64_t keys_stride;      // from row to row
  float* values;            // (rows, k), written at the end; not of distances
  int32_t* counts;          // of distances, written at the end
  int64_t first_row, first_column;
  int32_t rows, columns;    // of this tile
  int32_t k;
  bool itself;              // a row may be its own neighbour
  bool last;                // these are the last columns
  float error;              // of a distance: triton_kernels.py's ``rounding``
};

// Shared memory of a warp. A lane reads the products that it copied itself.
struct SelectMemory {
  float4 products[kPlaces][32];
  int64_t waiting[kRoom];
};

// Whether what was not kept of a row is farther than its k nearest, although products round: the columns of the k best
// are within ``reach``, and what is nearer has a square of at most 2 |x|^2 + 2 reach, so that its product says ``limit``.
template <int Q>
__device__ __forceinline__ bool complete(const WarpQueue<Q>& best, int k, float square, float error) {
  const float kth = ordered_value(best.at(k - 1));
  const int64_t worst = best.at(WarpQueue<Q>::kKept - 1);
  const float reach = (-kth + 3 * error * square) / (1 - 2 * error);
  const float limit = -(reach * (1 + 2 * error) + 3 * error * square);
  return worst == kNothing || ordered_value(worst) < limit;  // false where the limit is NaN
}

// Registers of WarpQueue. Of distances twice as many keys are kept as are asked for, to be computed anew from the rows: as
// many again may be nearer than their products say.
constexpr int registers_for(int metric, int64_t k) {
  const int64_t keep = metric == kEuclidean ? 2 * k : k;
  return keep <= 32 ? 1 : keep <= 64 ? 2 : keep <= 128 ? 4 : 8;
}

// The body, for one row of the tile.
template <int METRIC, int Q>
__device__ void graph_select(const SelectArguments& s, SelectMemory& memory, int row, int lane) {
  const int keep = METRIC == kEuclidean ? WarpQueue<Q>::kKept : s.k;
  const int64_t own = s.first_row + row;
  int64_t* keys = s.keys + own * s.keys_stride;
  const float a = s.a[own];
  const int64_t label = s.labels == nullptr ? 0 : s.labels[own];

  WarpQueue<Q> best(memory.waiting, lane);
  if (s.first_column > 0) best.load(keys, keep);
  int64_t worst = best.at(keep - 1);
  bool open = worst == kNothing;  // there is room for whatever comes, NaN too
  float limit = ordered_value(worst);

  const float* next = s.products + row * s.stride + 4 * lane;  // to be asked for
  int left = s.columns - 4 * lane;                             // from there on
  const auto ask = [&](unsigned place) {
    copy_16(left > 0, &memory.products[place][lane], next);
    commit();
    next += kUnit;
    left -= kUnit;
  };
#pragma unroll
  for (unsigned place = 0; place < kPlaces - 1; ++place) ask(place);
  const float* b_next = s.b + s.first_column + 4 * lane;
  unsigned place = 0;
#pragma unroll 1
  for (int column = 4 * lane; column - 4 * lane < s.columns; column += kUnit) {
    float4 b = {0, 0, 0, 0};
    if (METRIC != kDot && column < s.columns) b = load_common(b_next);
    b_next += kUnit;
    wait<kPlaces - 2>();
    const float4 product = memory.products[place][lane];
    ask((place + kPlaces - 1) % kPlaces);
    place = (place + 1) % kPlaces;

    const float score[4] = {
        similarity<METRIC>(product.x, a, b.x), similarity<METRIC>(product.y, a, b.y),
        similarity<METRIC>(product.z, a, b.z), similarity<METRIC>(product.w, a, b.w)};
    const float largest = fmaxf(fmaxf(score[0], score[1]), fmaxf(score[2], score[3]));  // of NaN and a number the number
    if (ballot(open || largest > limit) == 0) continue;
    static_assert(kAdded == 4, "as many as a lane reads");
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      bool candidate = (open || score[e] > limit) && column + e < s.columns;
      const int64_t other = s.first_column + column + e;
      if (candidate) candidate = s.labels != nullptr ? s.labels[other] != label : s.itself || other != own;
      best.add(candidate, key_of(score[e], other));
    }
    if (!best.settle(false)) continue;
    worst = best.at(keep - 1);
    open = worst == kNothing;
    limit = ordered_value(worst);
  }
  best.settle(true);

  const bool decoded = s.last && METRIC != kEuclidean;
  int found = 0;
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    const int rank = best.rank(q);
    const int64_t key = best.kept(q);
    const bool present = key != kNothing;
    found += count(ballot(present));
    if (rank < keep) {
      keys[rank] = !decoded ? key : present ? index_of(key) : -1;
      if (decoded) s.values[own * s.k + rank] = present ? value_of(key) : kLowest;
    }
  }
  if (METRIC == kEuclidean && s.last) {
    const bool all = complete(best, s.k, a, s.error);
    // More than there is room for: the last step then looks at all columns.
    if (lane == 0) s.counts[own] = all ? found : static_cast<int32_t>(s.keys_stride) + 1;
  }
}

}  // namespace kdfast::gpu
