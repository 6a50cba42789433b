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
  std::vector<double> values = out.loss;
  std::vector<int64_t> shape = leading_shape(student);
  if (out.reduction != Reduction::none) {
    double total = 0;
    for (double row : out.loss) total += row;
    values = {total / out.divisor()};
    shape.clear();
  }
  const bool wide = out.storage == Storage::float64;
  Tensor result = empty(shape, wide ? ScalarType::Double : ScalarType::Float);
  const Storage storage = wide ? Storage::float64 : Storage::float32;
  for (size_t i = 0; i < values.size(); ++i) store_scalar(result.data_ptr(), i, storage, values[i]);
  return result;
}

}  // namespace kdfast
