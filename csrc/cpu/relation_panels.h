// The work on a panel of similarities, one level's worth: what relation.cpp drives and relation_panels.cpp implements.
//
// A panel holds the inner products of rows [first, first + rows) of a batch with rows [0, columns) of it, columns being
// first + rows: the lower triangle of the symmetric matrix of all, cut into bands. Pairs left of column `first` stand for
// their mirror images too; the square right of it is whole. The student's panel is overwritten with the gradient's
// symmetric matrix G, for which dL/dX = G X.
//
// A task is a range of columns of all rows of the panel, on one side of `first`. Its sums are its own, so the result does
// not depend on how many threads share the tasks.
#pragma once

#include <cstdint>

#include "cpu/levels.h"

namespace kdfast {

constexpr int64_t kTask = 128;  // columns: enough for a row's constants to cost little, few enough to share a small panel

struct Panel {
  void* student;          // products of raw rows, (rows, columns) with `stride`; G afterwards
  const void* teacher;    // the same of the teacher, or null
  int64_t stride;
  int64_t rows, columns, first;
  const void* student_factor;  // (columns): what a row is multiplied with before its inner products, 1 / norm or 1
  const void* teacher_factor;

  int64_t tasks_left() const { return (first + kTask - 1) / kTask; }
  int64_t tasks() const { return tasks_left() + (rows + kTask - 1) / kTask; }
  bool mirrored(int64_t task) const { return task < tasks_left(); }
  int64_t begin(int64_t task) const { return mirrored(task) ? task * kTask : first + (task - tasks_left()) * kTask; }
  int64_t end(int64_t task) const {
    const int64_t last = mirrored(task) ? first : columns;
    return begin(task) + kTask < last ? begin(task) + kTask : last;
  }
};

// s = <x_i, x_j> / temperature of rows times their factors, t of the teacher. For each pair softplus(-s) or, where labels
// differ, softplus(s), plus weight * (s - t)^2; G_ij = scale * f_i f_j * d/ds.
struct CrdOptions {
  const int64_t* labels;  // (columns)
  double inverse_temperature, weight, scale;
};

// c_ij = max(0, (1 + cos_ij) / 2) * inverse_sum_i. For each pair c_t log((c_t + eps) / (c_s + eps)). With
// w_ij = (c_s - c_t + eps) / (c_s + eps), one more than d/dc_s, G_ij = scale * f_i f_j (w_ij inverse_sum_i + w_ji
// inverse_sum_j); the sums over j of w_ij c_s,ij are kept.
struct PktOptions {
  const void *student_inverse_sum, *teacher_inverse_sum;  // (columns)
  double eps, scale;
  double* row_sums;  // (tasks, rows)
  double* column_sums;  // (first): those of the mirror images
};

// A whole row of either side's similarities, over its norm (at least eps; a row of 0 stays 0): returns the squared distance
// of the two. Where asked, half its gradient with respect to the student's row takes the teacher's place.
constexpr double kSimilarityEps = 1e-12;  // kdfast/ops/relation/rows.py: EPS

struct RelationKernels {
  using Crd = double (*)(const Panel&, const CrdOptions&, int64_t task);
  using Pkt = double (*)(const Panel&, const PktOptions&, int64_t task);
  using SimilarityRow = double (*)(const void* student, void* teacher, int64_t columns, bool needs_grad);
  Crd crd[2];  // float, double
  Pkt pkt[2];
  SimilarityRow similarity_row[2];
};

KDFAST_DECLARE_LEVELS(RelationKernels, relation_kernels)

}  // namespace kdfast
