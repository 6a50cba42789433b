// The N k half of the graph ops, one level's worth: what graph.cpp drives and graph_edges.cpp implements.
//
// Everything is a loop over one row and some others, which are read where they lie: no (N, k, D) gather.
#pragma once

#include "cpu/kl_rows.h"

namespace kdfast {

struct GraphEdges {
  // sum x^2
  using Square = double (*)(const void* x, int64_t width);
  // <x, y> for each of `count` rows y, or |x - y|^2, summed in double from the exact differences
  using Values = void (*)(const void* x, const void* const* ys, int64_t count, int64_t width, double* values);
  // sum of weights[e] ys[e], or of weights[e] (x - ys[e]), in the order given, as C
  using Sum = void (*)(const void* x, const void* const* ys, const double* weights, int64_t count, int64_t width, void* sum);
  // grad = scale (sum - x <x, sum> inverse_square): 1 / |x|^2 takes out what lies along x, 0 nothing
  using Finish = void (*)(const void* x, const void* sum, int64_t width, double scale, double inverse_square, void* grad);

  Square square[kStorages];
  Values dots[kStorages], squared_distances[kStorages];
  Sum sum[kStorages], sum_differences[kStorages];
  Finish finish[kStorages];
};

KDFAST_DECLARE_LEVELS(GraphEdges, graph_edges)

}  // namespace kdfast
