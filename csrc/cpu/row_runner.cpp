#include "cpu/row_runner.h"

#include "cpu/pool.h"

namespace kdfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::vector<int64_t> leading_shape(const Tensor& student) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < student.dim(); ++d) shape.push_back(student.size(d));
  return shape;
}

}  // namespace

Tensor make_grad(const Tensor& student, bool needs_grad, std::optional<ScalarType> dtype) {
  std::vector<int64_t> shape{0};
  if (needs_grad) {
    shape = leading_shape(student);
    shape.push_back(student.size(student.dim() - 1));
  }
  return empty_gradient(shape, dtype.value_or(student.scalar_type()));
}

Output make_output(const Rows& student, const Tensor& grad, const std::optional<Tensor>& mask,
                   const std::optional<Tensor>& row_weight, int64_t reduction) {
  Output out{storage_of(student.tensor), student.count, student.classes, student.count, static_cast<Reduction>(reduction),
             rows_of(grad), is_streamed(grad), nullptr, nullptr, std::vector<double>(student.count)};
  if (out.grad.data == student.data) out.streamed = false;  // over the student's own rows, which are in cache
  if (grad.numel() == 0) out.grad.data = nullptr;
  if (mask) {
    out.mask = static_cast<const bool*>(mask->data_ptr());
    out.kept = std::count(out.mask, out.mask + out.count, true);
  }
  if (row_weight) out.weight = static_cast<const double*>(row_weight->data_ptr());
  return out;
}

Tensor reduced(const Output& out, const Tensor& student) {
  const bool wide = out.storage == Storage::float64;
  const Storage storage = wide ? Storage::float64 : Storage::float32;
  const bool each = out.reduction == Reduction::none;
  Tensor result = empty(each ? leading_shape(student) : std::vector<int64_t>{}, wide ? ScalarType::Double : ScalarType::Float);
  if (each) {
    for (int64_t r = 0; r < out.count; ++r) store_scalar(result.data_ptr(), r, storage, out.loss[r]);
    return result;
  }
  double totals[4] = {};  // one alone would wait for each sum before the next
  for (int64_t r = 0; r < out.count; ++r) totals[r % 4] += out.loss[r];
  store_scalar(result.data_ptr(), 0, storage, ((totals[0] + totals[1]) + (totals[2] + totals[3])) / out.divisor());
  return result;
}

}  // namespace kdfast
