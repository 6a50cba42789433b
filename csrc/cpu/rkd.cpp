// rkd on the CPU: the distance and the angle loss of all pairs and triplets of rows, and their gradient, in one call.
// Formulas: kdfast/reference/relations.py, csrc/math/triplet.h. Memory: two N x N matrices of half squared distances and
// one of gradients a thread; two more, of doubles, where rows lie at distances so different that floats would cancel.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/array.h"
#include "cpu/pool.h"
#include "cpu/rkd_kernels.h"
#include "cpu/row_runner.h"

namespace kdfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Evaluations of a cosine a thread is worth waking for: some 3 microseconds.
constexpr int64_t kTripletGrain = 1 << 15;
constexpr int64_t kPairGrain = 1 << 12;

template <class C> const RkdKernels<C>& rkd_kernels() {
  const RkdTables& tables = KDFAST_SELECT_LEVEL(rkd_tables);
  if constexpr (sizeof(C) == 4) return tables.single;
  else return tables.twice;
}

struct Options {
  double distance_weight, angle_weight;
  bool mean;
};

// for (first..last) by all threads, in portions of about `grain` elements where one index has `size` of them.
template <class Body> void shared(int64_t count, int64_t size, int64_t grain, const Body& body) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, grain / std::max<int64_t>(size, 1)), body);
}

// The rows that count, side by side, each `width` elements; past them copies of the first, up to a multiple of 16.
template <class C> struct Packed {
  int64_t n, width;
  Array<C> x;

  template <class RowAt> Packed(int64_t n, int64_t d, Storage storage, const RowAt& row_at)
      : n(n), width(rkd_padded(d)), x(uninitialized<C>(rkd_padded(n) * stride())) {
    const auto pack = rkd_kernels<C>().pack;
    shared(rkd_padded(n), width, kPairGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack(row_at(i < n ? i : 0), storage, d, x.get() + i * stride(), stride());
    });
  }

  int64_t stride() const { return width + kRkdLanes; }

  // Half squared distances of all pairs.
  Array<C> pairs() const {
    const int64_t blocks = rkd_padded(n) / kRkdLanes, stride = rkd_stride(n);
    auto out = uninitialized<C>(rkd_padded(n) * stride);
    const auto distances = rkd_kernels<C>().distances;
    // The first block row is the longest, the last the shortest: together they are as long as any other two.
    shared((blocks + 1) / 2, 2 * kRkdLanes * n * width / 32, kPairGrain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        distances(x.get(), width, b, blocks, out.get(), stride);
        if (blocks - 1 - b != b) distances(x.get(), width, blocks - 1 - b, blocks, out.get(), stride);
      }
    });
    return out;
  }
};

template <class C> class Problem {
 public:
  Problem(const Rows& student, const Rows& teacher, std::vector<int64_t> kept, const double* row_weight)
      : kept_(std::move(kept)), n_(kept_.size()), stride_(rkd_stride(n_)), k_(rkd_kernels<C>()),
        storage_(storage_of(student.tensor)),
        x_student_(n_, student.classes, storage_, [&](int64_t i) { return student.row(kept_[i]); }),
        x_teacher_(n_, teacher.classes, storage_, [&](int64_t i) { return teacher.row(kept_[i]); }),
        student_(x_student_.pairs()), teacher_(x_teacher_.pairs()) {
    if (row_weight == nullptr) return;
    weight_.assign(rkd_padded(n_), C(0));
    for (int64_t i = 0; i < n_; ++i) weight_[i] = C(row_weight[kept_[i]]);
  }

  // The loss; leaves dL/da of all pairs where a gradient is wanted.
  double run(const std::vector<int64_t>& apexes, const Options& options, bool needs_grad) {
    const double n = static_cast<double>(n_), count = static_cast<double>(apexes.size());
    const double distance = options.distance_weight / (options.mean ? n * n : 1);
    const double angle = options.angle_weight / (options.mean ? count * n * n : count / n);
    double loss = 0;
    if (options.angle_weight != 0) loss += angle * triplets(apexes, needs_grad, 2 * angle);
    else if (needs_grad) zero_parts();
    if (options.distance_weight != 0) loss += distance * distances(needs_grad, 2 * distance);
    return loss;
  }

  // dL/dx of the rows that count, to `out` with `d` elements a row; the others get 0.
  void pull(C* out, int64_t d, int64_t rows, double loss) const {
    if (n_ < rows) std::fill(out, out + rows * d, C(0));
    const int64_t width = x_student_.width;
    shared((n_ + 3) / 4, 4 * n_ * width / 32, kPairGrain, [&](int64_t begin, int64_t end) {
      auto buffer = uninitialized<C>(4 * width);
      for (int64_t quad = begin; quad < end; ++quad) {
        k_.pull(parts_.get(), stride_, x_student_.x.get(), n_, width, 4 * quad, buffer.get());
        for (int64_t i = 4 * quad; i < std::min(4 * quad + 4, n_); ++i) {
          const C* from = buffer.get() + (i - 4 * quad) * width;
          // Every triplet sees every row: a NaN anywhere is one everywhere, also where a slope was cut to 1.
          if (std::isnan(loss)) std::fill(out + kept_[i] * d, out + (kept_[i] + 1) * d, C(loss));
          else std::copy(from, from + d, out + kept_[i] * d);
        }
      }
    });
  }

 private:
  const C* weight() const { return weight_.empty() ? nullptr : weight_.data(); }

  void zero_parts() {
    const int64_t size = rkd_padded(n_) * stride_;
    parts_ = uninitialized<C>(size);
    std::fill(parts_.get(), parts_.get() + size, C(0));
  }

  double triplets(const std::vector<int64_t>& apexes, bool needs_grad, double factor) {
    std::vector<int64_t> plain = apexes, wide;
    Array<double> wide_student, wide_teacher;
    if constexpr (sizeof(C) == 4) {
      auto needs_wide = uninitialized<bool>(n_);
      shared(n_, n_, kPairGrain, [&](int64_t begin, int64_t end) {
        k_.needs_wide(student_.get(), teacher_.get(), n_, stride_, begin, end, needs_wide.get());
      });
      const auto middle = std::stable_partition(plain.begin(), plain.end(), [&](int64_t j) { return !needs_wide[j]; });
      wide.assign(middle, plain.end());
      plain.erase(middle, plain.end());
      if (!wide.empty()) wide_student = widened(x_student_), wide_teacher = widened(x_teacher_);
    }
    const int64_t count = apexes.size(), threads = torch::stable::get_num_threads(), size = rkd_padded(n_) * stride_;
    const int64_t parts = std::max<int64_t>(1, std::min({threads, count, count * n_ * n_ / kTripletGrain}));
    if (needs_grad) parts_ = uninitialized<C>(parts * size);
    std::vector<double> sums(parts, 0.0);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      auto scratch = uninitialized<C>(k_.scratch(n_));
      for (int64_t part = begin; part < end; ++part) {
        C* grad = needs_grad ? parts_.get() + part * size : nullptr;
        if (needs_grad) std::fill(grad, grad + size, C(0));
        const auto share = [&](const std::vector<int64_t>& list) {
          const int64_t length = list.size(), first = part * length / parts;
          return std::pair<const int64_t*, int64_t>(list.data() + first, (part + 1) * length / parts - first);
        };
        const auto [plain_apexes, plain_count] = share(plain);
        sums[part] += k_.triplets({student_.get(), teacher_.get(), n_, stride_, weight(), needs_grad}, plain_apexes,
                                  plain_count, grad, scratch.get());
        const auto [wide_apexes, wide_count] = share(wide);
        sums[part] += k_.triplets_wide({wide_student.get(), wide_teacher.get(), n_, stride_, weight(), needs_grad},
                                       wide_apexes, wide_count, grad, scratch.get());
      }
    });
    if (needs_grad) fold(parts, size, factor);
    double total = 0;
    for (double sum : sums) total += sum;
    return total;
  }

  // The same distances in double.
  Array<double> widened(const Packed<float>& x) const {
    return Packed<double>(n_, x.width, Storage::float32, [&](int64_t i) { return x.x.get() + i * x.stride(); }).pairs();
  }

  void fold(int64_t parts, int64_t size, double factor) {
    const int64_t blocks = rkd_padded(n_) / kRkdLanes;
    shared((blocks + 1) / 2, 2 * kRkdLanes * n_ * parts, kPairGrain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        k_.fold(parts_.get(), parts, size, b, blocks, stride_, factor);
        if (blocks - 1 - b != b) k_.fold(parts_.get(), parts, size, blocks - 1 - b, blocks, stride_, factor);
      }
    });
  }

  double distances(bool needs_grad, double factor) {
    std::vector<double> sum_student(n_), sum_teacher(n_);
    shared(n_, n_, kPairGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        sum_student[i] = k_.distance_sum(student_.get(), n_, stride_, i, i + 1);
        sum_teacher[i] = k_.distance_sum(teacher_.get(), n_, stride_, i, i + 1);
      }
    });
    const double pairs = std::max(1.0, static_cast<double>(n_) * static_cast<double>(n_ - 1));
    const auto inverse_mean = [&](const std::vector<double>& sums) {
      double total = 0;
      for (double sum : sums) total += sum;
      return total == 0 ? 1 : pairs / total;
    };
    const DistanceScale scale{inverse_mean(sum_student), inverse_mean(sum_teacher)};
    std::vector<DistanceSums> sums(n_);
    shared(n_, n_, kPairGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        sums[i] = k_.distance_terms(student_.get(), teacher_.get(), n_, stride_, weight(), scale, i, i + 1);
    });
    DistanceSums total{0, 0};
    for (const DistanceSums& row : sums) total.loss += row.loss, total.slope += row.slope;
    if (needs_grad) {
      const double slope = factor * scale.inverse_student;
      shared(n_, n_, kPairGrain, [&](int64_t begin, int64_t end) {
        k_.distance_grad(student_.get(), teacher_.get(), n_, stride_, weight(), scale, slope, slope * total.slope / pairs,
                         parts_.get(), begin, end);
      });
    }
    return total.loss;
  }

  std::vector<int64_t> kept_;
  int64_t n_, stride_;
  const RkdKernels<C>& k_;
  Storage storage_;
  Packed<C> x_student_, x_teacher_;
  Array<C> student_, teacher_, parts_;
  std::vector<C> weight_;
};

template <class C>
std::tuple<Tensor, Tensor> run(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                               const std::optional<Tensor>& row_weight, const std::optional<Tensor>& apexes,
                               const Options& options, bool needs_grad) {
  const int64_t rows = student.size(0), d = student.size(1);
  const ScalarType type = sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float;
  Tensor loss = empty({}, type);
  Tensor grad = make_grad(student, needs_grad, type);
  C* value = static_cast<C*>(loss.data_ptr());
  C* out = static_cast<C*>(grad.data_ptr());

  const bool* keep = mask ? static_cast<const bool*>(mask->data_ptr()) : nullptr;
  std::vector<int64_t> kept, place(rows, -1), at;
  for (int64_t i = 0; i < rows; ++i)
    if (keep == nullptr || keep[i]) place[i] = kept.size(), kept.push_back(i);
  const int64_t* chosen = apexes ? static_cast<const int64_t*>(apexes->data_ptr()) : nullptr;
  for (int64_t i = 0; i < (chosen ? apexes->numel() : rows); ++i) {
    const int64_t j = chosen ? chosen[i] : i;
    STD_TORCH_CHECK(j >= 0 && j < rows, "kdfast::rkd: apex ", j, " is not in [0, ", rows, ")");
    if (place[j] >= 0) at.push_back(place[j]);
  }
  if (at.empty()) {  // no row counts
    *value = 0;
    if (needs_grad) std::fill(out, out + rows * d, C(0));
    return {loss, grad};
  }
  Problem<C> problem(rows_of(student), rows_of(teacher), std::move(kept),
                     row_weight ? static_cast<const double*>(row_weight->data_ptr()) : nullptr);
  const double result = problem.run(at, options, needs_grad);
  *value = static_cast<C>(result);
  if (needs_grad) problem.pull(out, d, rows, result);
  return {loss, grad};
}

std::tuple<Tensor, Tensor> rkd(const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
                               std::optional<Tensor> row_weight, std::optional<Tensor> apexes, double distance_weight,
                               double angle_weight, bool mean, bool needs_grad) {
  const Options options{distance_weight, angle_weight, mean};
  const bool wide = storage_of(student) == Storage::float64;
  return wide ? run<double>(student, teacher, mask, row_weight, apexes, options, needs_grad)
              : run<float>(student, teacher, mask, row_weight, apexes, options, needs_grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { m.impl("rkd", TORCH_BOX(&rkd)); }

}  // namespace kdfast
