// What follows from the rows of a batch and not from their pairs, one level's worth: what relation.cpp drives.
//
// Sums are float64: with them pkt subtracts what is nearly equal where student and teacher are close.
#pragma once

#include <cstdint>

#include "cpu/levels.h"

namespace kdfast {

// Back through u = x * factor of row i: `g`, factor_i dL/du_i, becomes the gradient of the row that was given,
//     g <- g - slope * factor_i * (share_i * summed + weighted);   g <- g / divisor_i - x * <g, x> / radial_i.
struct BackRow {
  double factor, divisor, radial, share, slope;
  const double *summed, *weighted;  // (width), or null: without the first step
};

struct RelationRows {
  using Sum = void (*)(const void* x, int64_t rows, int64_t width, int64_t begin, int64_t end, const double* weight,
                       double* sum);
  using Product = double (*)(const void* x, const double* vector, int64_t width);
  using Back = void (*)(void* g, const void* x, int64_t width, const BackRow& row);
  Sum sum[2];  // float, double: columns [begin, end) of sum_i weight_i x_i
  Product product[2];
  Back back[2];
};

KDFAST_DECLARE_LEVELS(RelationRows, relation_rows)

}  // namespace kdfast
