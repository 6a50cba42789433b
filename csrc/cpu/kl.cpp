// kl on the CPU: the divergences between softened student and teacher rows, their gradient, and the cross-entropy that
// rides on the same read. Formulas: kdfast/reference/logits.py.
#include <cmath>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "cpu/row_runner.h"

namespace kdfast {
namespace {

using torch::stable::Tensor;

enum class Kind : int64_t { forward = 0, reverse = 1, js = 2, dkd = 3, standardized = 4 };

struct Options {
  Kind kind;
  double temperature, scale, alpha, beta, ce_weight, label_smoothing;
};

// log sigmoid(u), finite for any u
double log_sigmoid(double u) { return u < 0 ? u - std::log1p(std::exp(u)) : -std::log1p(std::exp(-u)); }
double sigmoid(double u) { return u < 0 ? std::exp(u) / (1 + std::exp(u)) : 1 / (1 + std::exp(-u)); }

class RowLoss {
 public:
  RowLoss(const Options& options, const Rows& student, const Rows& teacher, const int64_t* labels, const Output& out)
      : o_(options), student_(student), teacher_(teacher), labels_(labels), out_(out),
        kernels_(KDFAST_SELECT_LEVEL(kl_kernels)), inverse_temperature_(1 / options.temperature),
        per_row_(1 / out.divisor()) {}

  Workspace make_workspace() const {
    const bool kept = out_.wants_grad();
    return Workspace(out_.classes, out_.storage, o_.kind == Kind::js ? 3 : !kept ? 0 : hard() ? 3 : 2);
  }

  // Loss of row r, times weight and scale; writes its gradient.
  double operator()(int64_t r, Workspace& w, bool shared) const {
    const Row row{student_.row(r), teacher_.row(r), out_.classes, inverse_temperature_, inverse_temperature_, nullptr, 0};
    const double weight = out_.row_weight(r), g = weight * per_row_;
    switch (o_.kind) {
      case Kind::forward: return weight * forward(r, row, g, w, shared);
      case Kind::reverse: return weight * reverse(r, row, g, w, shared);
      case Kind::js: return weight * js(r, row, g, w, shared);
      case Kind::dkd: return weight * dkd(r, row, g, w, shared);
      default: return weight * standardized(r, row, g, w, shared);
    }
  }

 private:
  bool hard() const { return o_.kind == Kind::forward && o_.ce_weight != 0; }
  int storage() const { return static_cast<int>(out_.storage); }

  RowStats stats(Form form, const Row& row, Workspace& w, bool shared) const {
    each_block(row.classes, shared, [&](int64_t first, int64_t last) {
      kernels_.stats[static_cast<int>(form)][storage()](row, first, last, w.stats.data(), w.scratch());
    });
    return merge(w.stats, form, row.inverse_student, row.inverse_teacher);
  }

  // Sets each block's coefficients by of(block statistics) and writes the row's gradient.
  template <class Of>
  void grad(Shape shape, int64_t r, const Row& row, Workspace& w, bool shared, const Of& of) const {
    if (!out_.wants_grad()) return;
    for (size_t i = 0; i < w.stats.size(); ++i) w.coefficients[i] = of(w.stats[i]);
    each_block(row.classes, shared, [&](int64_t first, int64_t last) {
      kernels_.grad[static_cast<int>(shape)][storage()](out_.grad_row(r), row.student, row.classes, first, last,
                                                        w.coefficients.data(), w.scratch(), out_.streamed);
    });
  }

  double forward(int64_t r, const Row& row, double g, Workspace& w, bool shared) const {
    if (hard()) return forward_hard(r, row, g, w, shared);
    const RowStats s = stats(Form::forward, row, w, shared);
    const double k = o_.scale * g * inverse_temperature_;
    grad(Shape::difference, r, row, w, shared, [&](const BlockStats& b) {
      return Coefficients{k * s.student_factor(b) / s.sum_student, k * s.teacher_factor(b) / s.sum_teacher, 0, 0};
    });
    return o_.scale * (s.cross / s.sum_teacher + s.log_ratio());
  }

  double forward_hard(int64_t r, const Row& row, double g, Workspace& w, bool shared) const {
    const RowStats s = stats(Form::forward_hard, row, w, shared);
    const int64_t label = labels_ ? labels_[r] : teacher_argmax(row, s, w);
    const double k = o_.scale * g * inverse_temperature_, c = o_.ce_weight * g, classes = static_cast<double>(row.classes);
    const double logit = load_scalar(row.student, label, out_.storage);  // the gradient may be written over it
    const double kept = 1 - o_.label_smoothing, spread = o_.label_smoothing / classes;
    grad(Shape::hard, r, row, w, shared, [&](const BlockStats& b) {
      return Coefficients{k * s.student_factor(b) / s.sum_student, k * s.teacher_factor(b) / s.sum_teacher,
                          c * s.hard_factor(b) / s.sum_hard, -c * spread};
    });
    if (out_.wants_grad()) {
      // The label's element is made again from scratch with -c (1 - smoothing) inside, so that it is rounded once.
      const Coefficients& b = w.coefficients[label / kBlock];
      const Scratch kept_numbers = w.scratch();
      const double value = b.k * scratch_scalar(kept_numbers.a, label) - b.l * scratch_scalar(kept_numbers.b, label) +
                           b.m * scratch_scalar(kept_numbers.c, label) + b.n - c * kept;
      store_scalar(out_.grad_row(r), label, out_.storage, value);
    }
    const double log_sum = s.max_student + std::log(s.sum_hard);
    const double smooth = o_.label_smoothing == 0 ? 0 : o_.label_smoothing * (log_sum - s.sum_logits / classes);
    // A divergence of weight 0 is left out, which counts where it is infinite.
    const double divergence = o_.scale == 0 ? 0 : o_.scale * (s.cross / s.sum_teacher + s.log_ratio());
    return divergence + o_.ce_weight * (kept * (log_sum - logit) + smooth);
  }

  double scratch_scalar(const void* scratch, int64_t i) const {
    return load_scalar(scratch, i, out_.storage == Storage::float64 ? Storage::float64 : Storage::float32);
  }

  // First class with the largest teacher logit: only the block that holds it is searched.
  int64_t teacher_argmax(const Row& row, const RowStats& s, const Workspace& w) const {
    for (size_t block = 0; block < w.stats.size(); ++block) {
      if (w.stats[block].sum_teacher == 0 || w.stats[block].max_teacher != s.max_teacher) continue;
      const int64_t begin = block * kBlock, end = std::min<int64_t>(begin + kBlock, row.classes);
      for (int64_t i = begin; i < end; ++i)
        if (load_scalar(row.teacher, i, out_.storage) == s.max_teacher) return i;
    }
    return 0;  // a row of NaN: its loss is NaN whichever class is taken
  }

  double reverse(int64_t r, const Row& row, double g, Workspace& w, bool shared) const {
    const RowStats s = stats(Form::reverse, row, w, shared);
    const double divergence = s.cross / s.sum_student - s.log_ratio(), k = o_.scale * g * inverse_temperature_;
    // p_s (log p_s - log p_t - KL) with log p_s - log p_t = x_s - x_t + shifts - log_ratio
    grad(Shape::product, r, row, w, shared, [&](const BlockStats& b) {
      return Coefficients{k * s.student_factor(b) / s.sum_student,
                          divergence + s.log_ratio() - s.student_shift(b) + s.teacher_shift(b), 0, 0};
    });
    return o_.scale * divergence;
  }

  double js(int64_t r, const Row& row, double g, Workspace& w, bool shared) const {
    const RowStats s = stats(Form::js, row, w, shared);
    for (size_t i = 0; i < w.stats.size(); ++i)
      w.coefficients[i] = {s.student_factor(w.stats[i]) / s.sum_student, s.teacher_factor(w.stats[i]) / s.sum_teacher,
                           s.student_shift(w.stats[i]) - s.teacher_shift(w.stats[i]) - s.log_ratio(), 0};
    each_block(row.classes, shared, [&](int64_t first, int64_t last) {
      kernels_.mix[storage()](row.classes, first, last, o_.beta, w.coefficients.data(), w.mixed.data(), w.scratch());
    });
    double student = 0, teacher = 0;
    for (const MixSums& block : w.mixed) student += block.student, teacher += block.teacher;
    // d/dz_s = (1 - beta) p_s (log(p_s / m) - KL(s || m)) / T
    const double k = o_.scale * g * (1 - o_.beta) * inverse_temperature_;
    grad(Shape::product, r, row, w, shared, [&](const BlockStats&) { return Coefficients{k, student, 0, 0}; });
    return o_.scale * (o_.beta * teacher + (1 - o_.beta) * student);
  }

  // Everything but the label's class is one row with a hole; the label's share is a sigmoid of its logit against the rest.
  double dkd(int64_t r, Row row, double g, Workspace& w, bool shared) const {
    const int64_t label = labels_[r];
    row.holes = &label, row.num_holes = 1;
    const RowStats s = stats(Form::forward, row, w, shared);
    const double u_s = (load_scalar(row.student, label, out_.storage) - s.max_student) / o_.temperature - std::log(s.sum_student);
    const double u_t = (load_scalar(row.teacher, label, out_.storage) - s.max_teacher) / o_.temperature - std::log(s.sum_teacher);
    const double p_s = sigmoid(u_s), p_t = sigmoid(u_t);
    const double target = kl_term(p_t, log_sigmoid(u_t), log_sigmoid(u_s)) +
                          kl_term(sigmoid(-u_t), log_sigmoid(-u_t), log_sigmoid(-u_s));
    const bool student_has = s.sum_student != 0, teacher_has = s.sum_teacher != 0;  // mass outside the label's class
    const double others = !teacher_has ? 0 : !student_has ? INFINITY : s.cross / s.sum_teacher + s.log_ratio();
    const double k = o_.scale * g * inverse_temperature_, label_grad = k * o_.alpha * (p_s - p_t);
    const double slope = teacher_has ? k * o_.beta : 0;
    const double student_slope = student_has ? (slope - label_grad) / s.sum_student : 0;
    const double teacher_slope = teacher_has ? slope / s.sum_teacher : 0;
    grad(Shape::difference, r, row, w, shared, [&](const BlockStats& b) {
      return Coefficients{student_slope * s.student_factor(b), teacher_slope * s.teacher_factor(b), 0, 0};
    });
    if (out_.wants_grad()) store_scalar(out_.grad_row(r), label, out_.storage, label_grad);
    return o_.scale * (o_.alpha * target + o_.beta * others);
  }

  Moments moments(const void* logits, Workspace& w, bool shared) const {
    each_block(out_.classes, shared, [&](int64_t first, int64_t last) {
      kernels_.moments[storage()](logits, out_.classes, first, last, w.moments.data());
    });
    return merge(w.moments);
  }

  double standardized(int64_t r, Row row, double g, Workspace& w, bool shared) const {
    constexpr double kEps = 1e-7;
    if (row.classes == 1) {  // no deviation: nothing to compare
      if (out_.wants_grad()) store_scalar(out_.grad_row(r), 0, out_.storage, 0);
      return 0;
    }
    const double degrees = static_cast<double>(row.classes - 1);
    const Moments student = moments(row.student, w, shared), teacher = moments(row.teacher, w, shared);
    const double deviation = std::sqrt(student.squares / degrees);
    row.inverse_student = 1 / (o_.temperature * (deviation + kEps));
    row.inverse_teacher = 1 / (o_.temperature * (std::sqrt(teacher.squares / degrees) + kEps));
    const RowStats s = stats(Form::standardized, row, w, shared);
    // z = (x - mean) / (deviation + eps): the chain through the mean vanishes (the p sum to 1 each), the one through
    // the deviation adds -(x - mean) / ((V - 1) deviation (deviation + eps)) times sum_v dL/dz_v z_v.
    // Equal logits get no gradient, whatever 1 / eps would make of the difference to the teacher.
    const double k = deviation == 0 ? 0 : o_.scale * g * row.inverse_student;
    const double along = s.student_x / s.sum_student - s.teacher_x / s.sum_teacher;
    const double chain = deviation == 0 ? 0 : o_.scale * g * along / (degrees * deviation * (deviation + kEps));
    grad(Shape::standardized, r, row, w, shared, [&](const BlockStats& b) {
      return Coefficients{k * s.student_factor(b) / s.sum_student, k * s.teacher_factor(b) / s.sum_teacher, -chain,
                          chain * student.mean};
    });
    return o_.scale * (s.cross / s.sum_teacher + s.log_ratio());
  }

  const Options& o_;
  const Rows& student_;
  const Rows& teacher_;
  const int64_t* labels_;
  const Output& out_;
  const KlKernels& kernels_;
  double inverse_temperature_, per_row_;
};

Tensor run(const Rows& student, const Tensor& teacher, const Tensor& grad, const std::optional<Tensor>& labels,
           const std::optional<Tensor>& mask, const std::optional<Tensor>& row_weight, const Options& options,
           int64_t ignore_index, int64_t reduction) {
  const Rows teacher_rows = rows_of(teacher);
  Output out = make_output(student, grad, mask, row_weight, reduction);
  const int64_t* label = labels ? static_cast<const int64_t*>(labels->data_ptr()) : nullptr;
  std::unique_ptr<bool[]> keep;
  if (label) {
    keep.reset(new bool[out.count]);
    for (int64_t r = 0; r < out.count; ++r) {
      keep[r] = label[r] != ignore_index && (out.mask == nullptr || out.mask[r]);
      STD_TORCH_CHECK(!keep[r] || (label[r] >= 0 && label[r] < out.classes), "kdfast::kl: label ", label[r],
                      " is not in [0, ", out.classes, ")");
    }
    out.mask = keep.get();
    out.kept = std::count(out.mask, out.mask + out.count, true);
  }
  const RowLoss loss(options, student, teacher_rows, label, out);
  each_row(out, [&] { return loss.make_workspace(); }, loss);
  return reduced(out, student.tensor);
}

std::tuple<Tensor, Tensor> kl(const Tensor& student, const Tensor& teacher, std::optional<Tensor> labels,
                              std::optional<Tensor> mask, std::optional<Tensor> row_weight, double temperature,
                              int64_t kind, double scale, double alpha, double beta, double ce_weight,
                              double label_smoothing, int64_t ignore_index, int64_t reduction, bool needs_grad) {
  Tensor grad = make_grad(student, needs_grad);
  const Options options{static_cast<Kind>(kind), temperature, scale, alpha, beta, ce_weight, label_smoothing};
  return {run(rows_of(student), teacher, grad, labels, mask, row_weight, options, ignore_index, reduction), grad};
}

// The gradient overwrites the student: each element is read before it is written, and the sums are made before both.
Tensor kl_inplace(Tensor student, const Tensor& teacher, std::optional<Tensor> labels, std::optional<Tensor> mask,
                  std::optional<Tensor> row_weight, double temperature, int64_t kind, double scale, double alpha,
                  double beta, double ce_weight, double label_smoothing, int64_t ignore_index, int64_t reduction) {
  const Rows rows = rows_of(student);
  STD_TORCH_CHECK(rows.data == student.data_ptr(), "kdfast::kl_: rows of student must be addressable in place");
  const Options options{static_cast<Kind>(kind), temperature, scale, alpha, beta, ce_weight, label_smoothing};
  return run(rows, teacher, student, labels, mask, row_weight, options, ignore_index, reduction);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("kl", TORCH_BOX(&kl));
  m.impl("kl_", TORCH_BOX(&kl_inplace));
}

}  // namespace kdfast
