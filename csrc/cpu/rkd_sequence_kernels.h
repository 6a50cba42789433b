// Vector kernels of rkd_sequence, one set per instruction set: what one angle reads of its three positions x0, x1, x2,
// rows of `width` elements, a multiple of kRkdLanes. u = (x1 - x0) / norm_u, v = (x2 - x0) / norm_v: divided,
// so that on a line u and v are exactly equal or opposite and p or q of math/turn.h is exactly 0.
#pragma once

#include <cstdint>

#include "cpu/levels.h"

namespace kdfast {

struct TwoSums {
  double first, second;
};

template <class C> struct RkdSequenceKernels {
  // |x1 - x0|^2 and |x2 - x0|^2.
  TwoSums (*steps)(const C* x0, const C* x1, const C* x2, int64_t width);
  // |u - v|^2 and |u + v|^2.
  TwoSums (*turns)(const C* x0, const C* x1, const C* x2, int64_t width, C norm_u, C norm_v);
  // Adds `apart` (u - v) - `along` (u + v) - `stretch_u` u, over norm_u, to g1, the like for v to g2 and takes both from
  // g0.
  void (*pull)(const C* x0, const C* x1, const C* x2, int64_t width, C norm_u, C norm_v, C apart, C along, C stretch_u,
               C stretch_v, C* g0, C* g1, C* g2);
};

struct RkdSequenceTables {
  RkdSequenceKernels<float> single;
  RkdSequenceKernels<double> twice;
};
KDFAST_DECLARE_LEVELS(RkdSequenceTables, rkd_sequence_tables)

}  // namespace kdfast
