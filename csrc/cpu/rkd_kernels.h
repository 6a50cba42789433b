// Vector kernels of rkd, one set per instruction set; rkd.cpp drives them. Formulas: csrc/math/triplet.h, huber.h.
//
// Matrices of pairs hold half squared distances, are symmetric and have rows of `stride` elements, a multiple of
// kRkdLanes of which those past n belong to no row. Between them lie kRkdLanes more: rows a multiple of 4 KiB apart would
// share their places in the first cache. Features x likewise have rows of `width` elements and kRkdLanes that are not read.
#pragma once

#include <cstdint>

#include "cpu/kl_rows.h"
#include "cpu/levels.h"

namespace kdfast {

constexpr int64_t kRkdLanes = 16;  // rows, columns and widths are padded to it: whole vectors at every level

inline int64_t rkd_padded(int64_t n) { return (n + kRkdLanes - 1) / kRkdLanes * kRkdLanes; }
inline int64_t rkd_stride(int64_t n) { return rkd_padded(n) + kRkdLanes; }

// What the distance loss needs of all pairs.
struct DistanceScale {
  double inverse_student, inverse_teacher;  // 1 / mean distance
};
struct DistanceSums {
  double loss, slope;  // sums over ordered pairs of w_i w_k h(e) and of w_i w_k h'(e) psi_s
};

template <class C, class M> struct Triplets {
  const M* student;  // (n, n); M is C, or double for a float C whose differences would cancel
  const M* teacher;
  int64_t n, stride;
  const C* weight;  // of rows, zero past n; or null
  bool needs_grad;
};

template <class C> struct RkdKernels {
  // One row of d elements of type `storage` to C, zeros up to `padded` > d.
  void (*pack)(const void* row, Storage storage, int64_t d, C* out, int64_t padded);
  // Half squared distances from the differences of rows x (padded(n), width): rows [16 block, 16 block + 16) against all
  // from there on, written to both sides of the diagonal. n width / 2 subtractions and FMAs a row, half of a matrix
  // product's, and no digit is lost where rows are near to each other and far from the origin.
  void (*distances)(const C* x, int64_t width, int64_t block, int64_t blocks, C* out, int64_t stride);
  // Sum of the distances in rows [first, last).
  double (*distance_sum)(const C* pairs, int64_t n, int64_t stride, int64_t first, int64_t last);
  DistanceSums (*distance_terms)(const C* student, const C* teacher, int64_t n, int64_t stride, const C* weight,
                                 DistanceScale scale, int64_t first, int64_t last);
  // grad[i][k] += dL/d pairs[i][k] for rows [first, last): `factor` times the slope, less `share` times the distance.
  void (*distance_grad)(const C* student, const C* teacher, int64_t n, int64_t stride, const C* weight,
                        DistanceScale scale, double factor, double share, C* grad, int64_t first, int64_t last);
  // Apexes whose cosines need differences more exact than C's: writes whether each of [first, last) does.
  void (*needs_wide)(const C* student, const C* teacher, int64_t n, int64_t stride, int64_t first, int64_t last, bool* wide);
  // Elements of scratch that triplets needs.
  int64_t (*scratch)(int64_t n);
  // The sum over `count` apexes j and i, k of w_i w_j w_k h(cos_s - cos_t); half its gradient is added to grad (n, stride),
  // dL/da_ik at [i][k] or [k][i]. N^3 / 2 evaluations, 10 multiplications or FMAs and 7 other instructions a vector.
  double (*triplets)(const Triplets<C, C>& in, const int64_t* apexes, int64_t count, C* grad, C* scratch);
  double (*triplets_wide)(const Triplets<C, double>& in, const int64_t* apexes, int64_t count, C* grad, C* scratch);
  // out[i][k] = factor * sum over parts of (part[i][k] + part[k][i]) for the tiles of 16 x 16 in block row `block` from the
  // diagonal on, written to both sides of it. Parts are `part_stride` elements apart; out is the first.
  void (*fold)(C* parts, int64_t count, int64_t part_stride, int64_t block, int64_t blocks, int64_t stride, double factor);
  // out_i = sum_k grad[i][k] (x_i - x_k) for rows [first, first + 4), out of `width` elements a row.
  void (*pull)(const C* grad, int64_t stride, const C* x, int64_t n, int64_t width, int64_t first, C* out);
};

struct RkdTables {
  RkdKernels<float> single;
  RkdKernels<double> twice;
};
KDFAST_DECLARE_LEVELS(RkdTables, rkd_tables)

}  // namespace kdfast
