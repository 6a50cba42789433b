// The panel kernels of crd and pkt on the CPU: what kdfast/ops/relation/tiles.py calls between matrix products.
#include "cpu/relation_panels.h"
#include "cpu/pool.h"

#include <optional>
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("crd_panel", TORCH_BOX(&crd_panel));
  m.impl("pkt_panel", TORCH_BOX(&pkt_panel));
}

}  // namespace kdfast
