// attention and feature_mse on the CPU: what kdfast/ops/features/function.py calls. Formulas: kdfast/reference/features.py.
// Memory: student and teacher are read once, the gradient is written once.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cpu/feature_rows.h"
#include "cpu/pool.h"
#include "cpu/row_runner.h"

namespace kdfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Float for float16.
Tensor feature_grad(const Tensor& student, bool needs_grad) {
  return make_grad(student, needs_grad, storage_of(student) == Storage::float16 ? ScalarType::Float : student.scalar_type());
}

Tensor scalar(const Tensor& student, double value) {
  const bool wide = storage_of(student) == Storage::float64;
  Tensor result = empty({}, wide ? ScalarType::Double : ScalarType::Float);
  store_scalar(result.data_ptr(), 0, wide ? Storage::float64 : Storage::float32, value);
  return result;
}

double sum(const std::vector<double>& values) {
  double total = 0;
  for (double value : values) total += value;
  return total;
}

struct Maps {
  Tensor tensor;  // contiguous
  const char* data;
  Storage storage;
  MapSize size;
  int64_t bytes;  // of a sample

  explicit Maps(const Tensor& maps)
      : tensor(torch::stable::contiguous(maps)), data(static_cast<const char*>(tensor.data_ptr())),
        storage(storage_of(tensor)), size{tensor.size(1), tensor.size(2), tensor.size(3)},
        bytes(size.channels * size.pixels() * static_cast<int64_t>(tensor.element_size())) {}
  const void* sample(int64_t n) const { return data + n * bytes; }
};

// One side of one sample: its attention, in units of its norm, and what is kept to differentiate it.
class Side {
 public:
  Side(const Maps& maps, int64_t height, int64_t width, double p, const FeatureKernels& kernels)
      : maps_(maps), to_{maps.size.channels, height, width}, p_(p), kernels_(kernels),
        summed_(maps.storage == Storage::float64 ? Storage::float64 : Storage::float32),
        pooled_(pooling() ? to_.channels * to_.pixels() * compute_size(maps.storage) : 0),
        sums_(to_.pixels() * compute_size(maps.storage)), unit_(to_.pixels()) {}

  bool pooling() const { return to_.height != maps_.size.height || to_.width != maps_.size.width; }
  const std::vector<double>& unit() const { return unit_; }

  void attend(int64_t n, bool normalize) {
    if (pooling()) kernels_.pool[index(maps_.storage)](maps_.sample(n), maps_.size, to_, pooled_.data());
    kernels_.power[index(source())](map(n), to_, p_, sums_.data());
    double squares = 0;
    for (int64_t i = 0; i < to_.pixels(); ++i) {
      unit_[i] = load_scalar(sums_.data(), i, summed_) / to_.channels;
      squares += unit_[i] * unit_[i];
    }
    const double norm = std::sqrt(squares);
    moves_ = normalize && norm >= kEps;
    inverse_ = !normalize ? 1 : norm == 0 ? 0 : 1 / (norm < kEps ? kEps : norm);
    for (double& a : unit_) a *= inverse_;
  }

  // The gradient of the sample's maps for that of its attention, which it overwrites.
  void differentiate(int64_t n, std::vector<double>& slope, void* grad, bool streamed) {
    double along = 0;
    for (int64_t i = 0; i < to_.pixels(); ++i) along += slope[i] * unit_[i];
    for (int64_t i = 0; i < to_.pixels(); ++i)
      store_scalar(sums_.data(), i, summed_,
                   (slope[i] - (moves_ ? along * unit_[i] : 0)) * inverse_ * p_ / to_.channels);
    if (!pooling()) {
      kernels_.power_grad[index(maps_.storage)](map(n), to_, p_, sums_.data(), grad, streamed);
      return;
    }
    kernels_.power_grad[index(summed_)](pooled_.data(), to_, p_, sums_.data(), pooled_.data(), false);
    kernels_.pool_grad[index(maps_.storage)](pooled_.data(), maps_.size, to_, grad);
  }

 private:
  static constexpr double kEps = 1e-12;
  static int index(Storage storage) { return static_cast<int>(storage); }
  Storage source() const { return pooling() ? summed_ : maps_.storage; }
  const void* map(int64_t n) const { return pooling() ? pooled_.data() : maps_.sample(n); }

  const Maps& maps_;
  MapSize to_;
  double p_;
  const FeatureKernels& kernels_;
  Storage summed_;
  std::vector<char> pooled_, sums_;
  std::vector<double> unit_;
  double inverse_ = 0;
  bool moves_ = false;
};

std::tuple<Tensor, Tensor> attention(const Tensor& student_maps, const Tensor& teacher_maps, double p, bool normalize,
                                     bool needs_grad) {
  const Maps student(student_maps), teacher(teacher_maps);
  const int64_t count = student.tensor.size(0);
  const int64_t height = std::min(student.size.height, teacher.size.height);
  const int64_t width = std::min(student.size.width, teacher.size.width);
  const double divisor = static_cast<double>(std::max<int64_t>(count * height * width, 1));
  Tensor grad = feature_grad(student.tensor, needs_grad);
  char* out = static_cast<char*>(grad.data_ptr());
  const int64_t out_bytes = student.size.channels * student.size.pixels() * static_cast<int64_t>(grad.element_size());
  const bool streamed = is_streamed(grad);
  const FeatureKernels& kernels = KDFAST_SELECT_LEVEL(feature_kernels);
  std::vector<double> losses(count);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    Side s(student, height, width, p, kernels), t(teacher, height, width, p, kernels);
    std::vector<double> slope(height * width);
    for (int64_t n = begin; n < end; ++n) {
      s.attend(n, normalize), t.attend(n, normalize);
      for (int64_t i = 0; i < height * width; ++i) {
        const double difference = s.unit()[i] - t.unit()[i];
        losses[n] += difference * difference;
        slope[i] = 2 * difference / divisor;
      }
      if (needs_grad) s.differentiate(n, slope, out + n * out_bytes, streamed);
    }
  });
  return {scalar(student.tensor, sum(losses) / divisor), grad};
}

std::tuple<Tensor, Tensor> feature_mse(const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
                                       bool needs_grad) {
  const Tensor s = torch::stable::contiguous(student), t = torch::stable::contiguous(teacher);
  const Storage storage = storage_of(s);
  const int64_t size = s.numel(), item = static_cast<int64_t>(s.element_size());
  // Rows of the mask: one value an element, or one a sample; without a mask all is one row.
  const bool* keep = mask ? static_cast<const bool*>(mask->data_ptr()) : nullptr;
  const bool by_sample = keep && mask->dim() == 1 && s.dim() > 1;
  const int64_t width = by_sample ? size / std::max<int64_t>(mask->numel(), 1) : std::max<int64_t>(size, 1);
  int64_t count = size;
  if (keep) count = std::count(keep, keep + mask->numel(), true) * (by_sample ? width : 1);
  const double slope = 2.0 / static_cast<double>(std::max<int64_t>(count, 1));
  Tensor grad = feature_grad(s, needs_grad);
  char* out = needs_grad ? static_cast<char*>(grad.data_ptr()) : nullptr;
  const int64_t out_item = static_cast<int64_t>(grad.element_size());
  const bool streamed = is_streamed(grad);
  const auto kernel = KDFAST_SELECT_LEVEL(feature_kernels).mse[static_cast<int>(storage)];
  const char *student_data = static_cast<const char*>(s.data_ptr()), *teacher_data = static_cast<const char*>(t.data_ptr());
  std::vector<double> losses((size + kMseBlock - 1) / kMseBlock);
  torch::stable::parallel_for(0, static_cast<int64_t>(losses.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = std::min(size, (block + 1) * kMseBlock);
      for (int64_t i = block * kMseBlock, next; i < last; i = next) {
        next = by_sample ? std::min(last, (i / width + 1) * width) : last;
        char* to = out ? out + i * out_item : nullptr;
        if (by_sample && !keep[i / width]) {  // not read
          if (to) std::memset(to, 0, (next - i) * out_item);
          continue;
        }
        const bool* elements = keep && !by_sample ? keep + i : nullptr;
        losses[block] += kernel(student_data + i * item, teacher_data + i * item, elements, next - i, slope, to, streamed);
      }
    }
  });
  return {scalar(s, sum(losses) / static_cast<double>(std::max<int64_t>(count, 1))), grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("feature_mse", TORCH_BOX(&feature_mse));
}

}  // namespace kdfast
