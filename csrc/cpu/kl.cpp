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
  RowLoss(const Options& options, const Rows& student, const Rows& teacher, const int64_t* labels, Output& out)
      : o_(options), student_(student), teacher_(teacher), labels_(labels), out_(out),
        kernels_(KDFAST_SELECT_LEVEL(kl_kernels)), inverse_temperature_(1 / options.temperature),
        per_row_(1 / out.divisor()) {}

  Workspace make_workspace() const {
    const bool kept = out_.wants_grad();
    return Workspace(out_, inverse_temperature_, o_.kind == Kind::js ? 3 : !kept ? 0 : hard() ? 3 : 2);
  }

  // Losses of w.rows, times weight and scale; writes their gradients.
  void operator()(Workspace& w, bool shared) const {
    w.place(student_, &teacher_, out_);
    switch (o_.kind) {
      case Kind::forward: return hard() ? forward_hard(w, shared) : forward(w, shared);
      case Kind::reverse: return reverse(w, shared);
      case Kind::js: return js(w, shared);
      case Kind::dkd: return dkd(w, shared);
      default: return standardized(w, shared);
    }
  }

 private:
  bool hard() const { return o_.kind == Kind::forward && o_.ce_weight != 0; }
  int storage() const { return static_cast<int>(out_.storage); }

  void stats(Form form, Workspace& w, bool shared) const {
    each_block(w, shared, [&](int64_t first, int64_t last) {
      kernels_.stats[static_cast<int>(form)][storage()](w.blocks.data(), first, last, w.stats.data());
    });
  }

  // of(i, g) is the loss of row i of w, and sets its coefficients; its gradient is multiplied by g.
  template <class Of> void each_loss(Workspace& w, const Of& of) const {
    for (size_t i = 0; i < w.rows.size(); ++i) {
      const double weight = out_.row_weight(w.rows[i]);
      out_.loss[w.rows[i]] = weight * of(i, weight * per_row_);
    }
  }

  // Sets the coefficients of each of a row's blocks to of(its statistics).
  template <class Of> void set_coefficients(Workspace& w, int64_t i, const Of& of) const {
    if (!out_.wants_grad()) return;
    for (int64_t b = w.first_block(i); b < w.first_block(i + 1); ++b) w.coefficients[b] = of(w.stats[b]);
  }

  // Writes the rows' gradients.
  void grad(Shape shape, Workspace& w, bool shared) const {
    if (!out_.wants_grad()) return;
    each_block(w, shared, [&](int64_t first, int64_t last) {
      kernels_.grad[static_cast<int>(shape)][storage()](w.blocks.data(), first, last, w.coefficients.data(), out_.streamed);
    });
    patch(w);
  }

  void patch(const Workspace& w) const {
    if (!out_.wants_grad()) return;
    for (size_t i = 0; i < w.patches.size(); ++i)
      store_scalar(out_.grad_row(w.rows[i]), w.patches[i].at, out_.storage, w.patches[i].value);
  }

  void forward(Workspace& w, bool shared) const {
    stats(Form::forward, w, shared);
    each_loss(w, [&](int64_t i, double g) {
      const RowStats s = w.merged(i, Form::forward);
      const double k = o_.scale * g * inverse_temperature_;
      set_coefficients(w, i, [&](const BlockStats& b) {
        return Coefficients{k * s.student_factor(b) / s.sum_student, k * s.teacher_factor(b) / s.sum_teacher, 0, 0};
      });
      return o_.scale * (s.cross / s.sum_teacher + s.log_ratio());
    });
    grad(Shape::difference, w, shared);
  }

  void forward_hard(Workspace& w, bool shared) const {
    const double classes = static_cast<double>(out_.classes);
    const double kept = 1 - o_.label_smoothing, spread = o_.label_smoothing / classes;
    stats(Form::forward_hard, w, shared);
    w.patches.clear();
    each_loss(w, [&](int64_t i, double g) {
      const RowStats s = w.merged(i, Form::forward_hard);
      const double k = o_.scale * g * inverse_temperature_, c = o_.ce_weight * g;
      const int64_t label = labels_ ? labels_[w.rows[i]] : teacher_argmax(w, i, s);
      set_coefficients(w, i, [&](const BlockStats& b) {
        return Coefficients{k * s.student_factor(b) / s.sum_student, k * s.teacher_factor(b) / s.sum_teacher,
                            c * s.hard_factor(b) / s.sum_hard, -c * spread};
      });
      // The label's element is made from scratch with -c (1 - smoothing) inside, so that it is rounded once.
      if (out_.wants_grad()) w.patches.push_back({label, hard_grad(w, i, label) - c * kept});
      const double logit = load_scalar(student_.row(w.rows[i]), label, out_.storage);
      const double log_sum = s.max_student + std::log(s.sum_hard);
      const double smooth = o_.label_smoothing == 0 ? 0 : o_.label_smoothing * (log_sum - s.sum_logits / classes);
      // A divergence of weight 0 is left out, which counts where it is infinite.
      const double divergence = o_.scale == 0 ? 0 : o_.scale * (s.cross / s.sum_teacher + s.log_ratio());
      return divergence + o_.ce_weight * (kept * (log_sum - logit) + smooth);
    });
    grad(Shape::hard, w, shared);
  }

  // One element of Shape::hard.
  double hard_grad(const Workspace& w, int64_t i, int64_t at) const {
    const int64_t block = w.first_block(i) + at / kBlock;
    const Block& b = w.blocks[block];
    const Coefficients& c = w.coefficients[block];
    const Storage wide = out_.storage == Storage::float64 ? Storage::float64 : Storage::float32;
    const auto kept = [&](const void* scratch) { return load_scalar(scratch, at - b.begin, wide); };
    return c.k * kept(b.a) - c.l * kept(b.b) + c.m * kept(b.c) + c.n;
  }

  // First class with the largest teacher logit: only the block that holds it is searched.
  int64_t teacher_argmax(const Workspace& w, int64_t i, const RowStats& s) const {
    for (int64_t b = w.first_block(i); b < w.first_block(i + 1); ++b) {
      const Block& block = w.blocks[b];
      if (w.stats[b].sum_teacher == 0 || w.stats[b].max_teacher != s.max_teacher) continue;
      for (int64_t j = 0; j < block.length; ++j)
        if (load_scalar(block.teacher, j, out_.storage) == s.max_teacher) return block.begin + j;
    }
    return 0;  // a row of NaN: its loss is NaN whichever class is taken
  }

  void reverse(Workspace& w, bool shared) const {
    stats(Form::reverse, w, shared);
    each_loss(w, [&](int64_t i, double g) {
      const RowStats s = w.merged(i, Form::reverse);
      const double divergence = s.cross / s.sum_student - s.log_ratio(), k = o_.scale * g * inverse_temperature_;
      // p_s (log p_s - log p_t - KL) with log p_s - log p_t = x_s - x_t + shifts - log_ratio
      set_coefficients(w, i, [&](const BlockStats& b) {
        return Coefficients{k * s.student_factor(b) / s.sum_student,
                            divergence + s.log_ratio() - s.student_shift(b) + s.teacher_shift(b), 0, 0};
      });
      return o_.scale * divergence;
    });
    grad(Shape::product, w, shared);
  }

  void js(Workspace& w, bool shared) const {
    stats(Form::js, w, shared);
    for (size_t i = 0; i < w.rows.size(); ++i) {
      const RowStats s = w.merged(i, Form::js);
      for (int64_t b = w.first_block(i); b < w.first_block(i + 1); ++b)
        w.coefficients[b] = {s.student_factor(w.stats[b]) / s.sum_student, s.teacher_factor(w.stats[b]) / s.sum_teacher,
                             s.student_shift(w.stats[b]) - s.teacher_shift(w.stats[b]) - s.log_ratio(), 0};
    }
    w.mixed.resize(w.num_laid_out());
    each_block(w, shared, [&](int64_t first, int64_t last) {
      kernels_.mix[storage()](w.blocks.data(), first, last, o_.beta, w.coefficients.data(), w.mixed.data());
    });
    each_loss(w, [&](int64_t i, double g) {
      double student = 0, teacher = 0;
      for (int64_t b = w.first_block(i); b < w.first_block(i + 1); ++b)
        student += w.mixed[b].student, teacher += w.mixed[b].teacher;
      // d/dz_s = (1 - beta) p_s (log(p_s / m) - KL(s || m)) / T
      const double k = o_.scale * g * (1 - o_.beta) * inverse_temperature_;
      set_coefficients(w, i, [&](const BlockStats&) { return Coefficients{k, student, 0, 0}; });
      return o_.scale * (o_.beta * teacher + (1 - o_.beta) * student);
    });
    grad(Shape::product, w, shared);
  }

  // Everything but the label's class is one row with a hole; the label's share is a sigmoid of its logit against the rest.
  void dkd(Workspace& w, bool shared) const {
    for (size_t i = 0; i < w.rows.size(); ++i) {
      const int64_t* label = labels_ + w.rows[i];
      Block& block = w.blocks[w.first_block(i) + *label / kBlock];
      block.holes = label, block.num_holes = 1;
    }
    stats(Form::forward, w, shared);
    w.patches.clear();
    each_loss(w, [&](int64_t i, double g) {
      const RowStats s = w.merged(i, Form::forward);
      const int64_t r = w.rows[i], label = labels_[r];
      const double logit_s = load_scalar(student_.row(r), label, out_.storage);
      const double logit_t = load_scalar(teacher_.row(r), label, out_.storage);
      const double u_s = (logit_s - s.max_student) / o_.temperature - std::log(s.sum_student);
      const double u_t = (logit_t - s.max_teacher) / o_.temperature - std::log(s.sum_teacher);
      const double p_s = sigmoid(u_s), p_t = sigmoid(u_t);
      const double target = kl_term(p_t, log_sigmoid(u_t), log_sigmoid(u_s)) +
                            kl_term(sigmoid(-u_t), log_sigmoid(-u_t), log_sigmoid(-u_s));
      const bool student_has = s.sum_student != 0, teacher_has = s.sum_teacher != 0;  // mass outside the label's class
      const double others = !teacher_has ? 0 : !student_has ? INFINITY : s.cross / s.sum_teacher + s.log_ratio();
      const double k = o_.scale * g * inverse_temperature_, label_grad = k * o_.alpha * (p_s - p_t);
      const double slope = teacher_has ? k * o_.beta : 0;
      const double student_slope = student_has ? (slope - label_grad) / s.sum_student : 0;
      const double teacher_slope = teacher_has ? slope / s.sum_teacher : 0;
      set_coefficients(w, i, [&](const BlockStats& b) {
        return Coefficients{student_slope * s.student_factor(b), teacher_slope * s.teacher_factor(b), 0, 0};
      });
      w.patches.push_back({label, label_grad});
      return o_.scale * (o_.alpha * target + o_.beta * others);
    });
    grad(Shape::difference, w, shared);
  }

  void standardized(Workspace& w, bool shared) const {
    constexpr double kEps = 1e-7;
    if (out_.classes == 1) {  // no deviation: nothing to compare
      w.patches.assign(w.rows.size(), {0, 0});
      each_loss(w, [](int64_t, double) { return 0.0; });
      return patch(w);
    }
    const double degrees = static_cast<double>(out_.classes - 1);
    w.student_moments.resize(w.num_laid_out()), w.teacher_moments.resize(w.num_laid_out());
    each_block(w, shared, [&](int64_t first, int64_t last) {
      kernels_.moments[storage()](w.blocks.data(), first, last, w.student_moments.data(), w.teacher_moments.data());
    });
    const auto of_row = [&](const std::vector<Moments>& moments, int64_t i) {
      return merge(&moments[w.first_block(i)], w.blocks_per_row);
    };
    const auto deviation_of = [&](const Moments& moments) { return std::sqrt(moments.squares / degrees); };
    for (size_t i = 0; i < w.rows.size(); ++i) {
      const double student = deviation_of(of_row(w.student_moments, i));
      const double teacher = deviation_of(of_row(w.teacher_moments, i));
      for (int64_t b = w.first_block(i); b < w.first_block(i + 1); ++b) {
        w.blocks[b].inverse_student = 1 / (o_.temperature * (student + kEps));
        w.blocks[b].inverse_teacher = 1 / (o_.temperature * (teacher + kEps));
      }
    }
    stats(Form::standardized, w, shared);
    each_loss(w, [&](int64_t i, double g) {
      const RowStats s = w.merged(i, Form::standardized);
      const Moments student = of_row(w.student_moments, i);
      const double deviation = deviation_of(student);
      // z = (x - mean) / (deviation + eps): the chain through the mean vanishes (the p sum to 1 each), the one through
      // the deviation adds -(x - mean) / ((V - 1) deviation (deviation + eps)) times sum_v dL/dz_v z_v.
      // Equal logits get no gradient, whatever 1 / eps would make of the difference to the teacher.
      const double k = deviation == 0 ? 0 : o_.scale * g * s.inverse_student;
      const double along = s.student_x / s.sum_student - s.teacher_x / s.sum_teacher;
      const double chain = deviation == 0 ? 0 : o_.scale * g * along / (degrees * deviation * (deviation + kEps));
      set_coefficients(w, i, [&](const BlockStats& b) {
        return Coefficients{k * s.student_factor(b) / s.sum_student, k * s.teacher_factor(b) / s.sum_teacher, -chain,
                            chain * student.mean};
      });
      return o_.scale * (s.cross / s.sum_teacher + s.log_ratio());
    });
    grad(Shape::standardized, w, shared);
  }

  const Options& o_;
  const Rows& student_;
  const Rows& teacher_;
  const int64_t* labels_;
  Output& out_;
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
