// What the graph ops share: the metric, and what a row is scaled with.
#pragma once

#include <cmath>
#include <vector>

#include "cpu/graph_edges.h"
#include "cpu/row_runner.h"

namespace kdfast {

enum class Metric : int64_t { cosine = 0, dot = 1, euclidean = 2 };

constexpr double kNormEps = 1e-12;  // the smallest norm a cosine divides by

// The norm of each row; only cosine needs it.
inline std::vector<double> norms_of(const Rows& rows, Storage storage, Metric metric) {
  std::vector<double> norms(rows.count, 1.0);
  if (metric != Metric::cosine) return norms;
  const auto square = KDFAST_SELECT_LEVEL(graph_edges).square[static_cast<int>(storage)];
  torch::stable::parallel_for(0, rows.count, grain(rows.classes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) norms[r] = std::sqrt(square(rows.row(r), rows.classes));
  });
  return norms;
}

// 1 / norm, at most 1 / eps; 0 for a zero row, which has similarity 0 and gradient 0.
inline double inverse_norm(double norm) { return norm == 0 ? 0 : 1 / (norm < kNormEps ? kNormEps : norm); }
// The same to divide by, which is rounded once: rows of one number have cosines of exactly 1 and -1, and tie.
inline double divisor(double norm) { return norm == 0 ? INFINITY : norm < kNormEps ? kNormEps : norm; }

}  // namespace kdfast
