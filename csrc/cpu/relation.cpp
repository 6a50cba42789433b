// The kernels of relations on the CPU: what the drivers in kdfast/ops/relation call between matrix products.
#include "cpu/pool.h"
#include "cpu/relation_panels.h"
#include "cpu/relation_rows.h"
#include "cpu/row_runner.h"

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace kdfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool is_double(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

Panel panel_of(const Tensor& student, const std::optional<Tensor>& teacher, const Tensor& student_factor,
               const Tensor& teacher_factor, int64_t first) {
  STD_TORCH_CHECK(student.dim() == 2 && student.is_contiguous() && student.size(1) == first + student.size(0),
                  "kdfast: a panel of relations must be a contiguous (rows, first + rows)");
  return {student.data_ptr(), teacher ? teacher->data_ptr() : nullptr, student.size(1), student.size(0), student.size(1),
          first, student_factor.data_ptr(), teacher_factor.data_ptr()};
}

// one(task) for all tasks by all threads, and the sum of what they return, in their order.
template <class One> Tensor sum_of_tasks(const Panel& panel, const One& one) {
  std::vector<double> losses(panel.tasks());
  torch::stable::parallel_for(0, panel.tasks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) losses[task] = one(task);
  });
  Tensor total = empty({}, ScalarType::Double);
  double* value = static_cast<double*>(total.data_ptr());
  *value = 0;
  for (double loss : losses) *value += loss;
  return total;
}

Tensor crd_panel(Tensor student, std::optional<Tensor> teacher, const Tensor& student_factor,
                 const Tensor& teacher_factor, const Tensor& labels, int64_t first, double temperature, double weight,
                 double scale) {
  const Panel panel = panel_of(student, teacher, student_factor, teacher_factor, first);
  const CrdOptions options{static_cast<const int64_t*>(labels.data_ptr()), 1 / temperature, weight, scale};
  const auto kernel = KDFAST_SELECT_LEVEL(relation_kernels).crd[is_double(student)];
  return sum_of_tasks(panel, [&](int64_t task) { return kernel(panel, options, task); });
}

Tensor pkt_panel(Tensor student, const Tensor& teacher, const Tensor& student_factor, const Tensor& teacher_factor,
                 const Tensor& student_inverse_sum, const Tensor& teacher_inverse_sum, Tensor along, int64_t first,
                 double eps, double scale) {
  const Panel panel = panel_of(student, teacher, student_factor, teacher_factor, first);
  std::vector<double> row_sums(panel.tasks() * panel.rows), column_sums(first);
  const PktOptions options{student_inverse_sum.data_ptr(), teacher_inverse_sum.data_ptr(), eps, scale, row_sums.data(),
                           column_sums.data()};
  const auto kernel = KDFAST_SELECT_LEVEL(relation_kernels).pkt[is_double(student)];
  const Tensor total = sum_of_tasks(panel, [&](int64_t task) { return kernel(panel, options, task); });
  double* sums = static_cast<double*>(along.data_ptr());
  for (int64_t j = 0; j < first; ++j) sums[j] += column_sums[j];
  for (int64_t task = 0; task < panel.tasks(); ++task)
    for (int64_t r = 0; r < panel.rows; ++r) sums[first + r] += row_sums[task * panel.rows + r];
  return total;
}

Tensor similarity_rows(const Tensor& student, Tensor teacher, bool needs_grad) {
  STD_TORCH_CHECK(student.is_contiguous() && teacher.is_contiguous(), "kdfast: rows of similarities must be contiguous");
  const Rows s = rows_of(student), t = rows_of(teacher);
  const auto kernel = KDFAST_SELECT_LEVEL(relation_kernels).similarity_row[is_double(student)];
  Tensor distances = empty({s.count}, ScalarType::Double);
  double* distance = static_cast<double*>(distances.data_ptr());
  torch::stable::parallel_for(0, s.count, grain(s.classes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) distance[r] = kernel(s.row(r), t.row(r), s.classes, needs_grad);
  });
  return distances;
}

// G + G^T of tiles (i, j) and (j, i), through a copy: where rows are a power of two apart, what a column of a tile reads
// falls on one set of the cache.
constexpr int64_t kTile = 16;
using Whole = std::integral_constant<int64_t, kTile>;

template <class C, class Height, class Width>
void symmetrize_tiles(C* g, int64_t n, int64_t i, int64_t j, Height rows, Width columns) {
  C mirrored[kTile][kTile], sums[kTile][kTile];
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r) mirrored[c][r] = g[(j + c) * n + i + r];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) sums[r][c] = g[(i + r) * n + j + c] + mirrored[c][r];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) g[(i + r) * n + j + c] = sums[r][c];
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r) g[(j + c) * n + i + r] = sums[r][c];
}

template <class C> void symmetrize_all(C* g, int64_t n) {
  const int64_t tiles = (n + kTile - 1) / kTile;
  // Row r of tiles of the triangle together with row tiles - 1 - r is as long as any other two.
  torch::stable::parallel_for(0, (tiles + 1) / 2, grain(kTile * n), [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair)
      for (const int64_t row : {pair, tiles - 1 - pair}) {
        for (int64_t column = 0; column <= row; ++column) {
          const int64_t i = row * kTile, j = column * kTile;
          if (i + kTile <= n)
            symmetrize_tiles(g, n, i, j, Whole{}, Whole{});
          else
            symmetrize_tiles(g, n, i, j, n - i, std::min(kTile, n - j));
        }
        if (row == tiles - 1 - row) break;  // both are this one
      }
  });
}

void symmetrize(Tensor matrix) {
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.is_contiguous() && matrix.size(0) == matrix.size(1),
                  "kdfast: what is made symmetric must be a contiguous (N, N)");
  if (is_double(matrix))
    symmetrize_all(static_cast<double*>(matrix.data_ptr()), matrix.size(0));
  else
    symmetrize_all(static_cast<float*>(matrix.data_ptr()), matrix.size(0));
}

// sum_i weight_i x_i, (width). Threads share the columns, so that rows are added in their order.
Tensor sum_of_rows(const Tensor& x, const Tensor& weight) {
  constexpr int64_t kColumns = 64;
  const int64_t rows = x.size(0), width = x.size(1);
  const auto kernel = KDFAST_SELECT_LEVEL(relation_rows).sum[is_double(x)];
  Tensor sum = empty({width}, ScalarType::Double);
  torch::stable::parallel_for(0, (width + kColumns - 1) / kColumns, grain(rows * kColumns), [&](int64_t begin, int64_t end) {
    kernel(x.data_ptr(), rows, width, begin * kColumns, std::min(end * kColumns, width),
           static_cast<const double*>(weight.data_ptr()), static_cast<double*>(sum.data_ptr()));
  });
  return sum;
}

// <x_i, vector>, (rows).
Tensor products_of_rows(const Tensor& x, const Tensor& vector) {
  const Rows rows = rows_of(x);
  const auto kernel = KDFAST_SELECT_LEVEL(relation_rows).product[is_double(x)];
  Tensor products = empty({rows.count}, ScalarType::Double);
  const double* v = static_cast<const double*>(vector.data_ptr());
  double* product = static_cast<double*>(products.data_ptr());
  torch::stable::parallel_for(0, rows.count, grain(rows.classes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) product[i] = kernel(rows.row(i), v, rows.classes);
  });
  return products;
}

void back_through_norms(Tensor grad, const Tensor& x, std::optional<Tensor> factor, std::optional<Tensor> divisor,
                        const Tensor& radial, std::optional<Tensor> share, std::optional<Tensor> summed,
                        std::optional<Tensor> weighted, double slope) {
  STD_TORCH_CHECK(grad.is_contiguous(), "kdfast: the gradient is written in place");
  const Rows rows = rows_of(x), gradients = rows_of(grad);
  const Storage storage = storage_of(x);
  const auto kernel = KDFAST_SELECT_LEVEL(relation_rows).back[is_double(x)];
  const auto vector = [](const std::optional<Tensor>& v) { return v ? static_cast<const double*>(v->data_ptr()) : nullptr; };
  const auto number = [&](const std::optional<Tensor>& of_rows, int64_t i) {
    return of_rows ? load_scalar(of_rows->data_ptr(), i, storage) : 1.0;
  };
  torch::stable::parallel_for(0, rows.count, grain(rows.classes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernel(gradients.row(i), rows.row(i), rows.classes,
             {number(factor, i), number(divisor, i), number(radial, i), share ? vector(share)[i] : 0.0, slope,
              vector(summed), vector(weighted)});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("sum_of_rows", TORCH_BOX(&sum_of_rows));
  m.impl("products_of_rows", TORCH_BOX(&products_of_rows));
  m.impl("back_through_norms_", TORCH_BOX(&back_through_norms));
  m.impl("symmetrize_", TORCH_BOX(&symmetrize));
  m.impl("similarity_rows", TORCH_BOX(&similarity_rows));
  m.impl("crd_panel", TORCH_BOX(&crd_panel));
  m.impl("pkt_panel", TORCH_BOX(&pkt_panel));
}

}  // namespace kdfast
