// topk_kl on the CPU: a stored teacher of k classes a row against the student's whole row. Formulas and the meaning of
// `tail`: kdfast/reference/logits.py.
// Memory: reads the student once and writes its gradient once; tail 'renormalize' reads only the k listed logits.
// The listed classes are holes in the row, so that the rest's mass is a sum of its own and never a difference.
#include <cmath>
#include <limits>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "cpu/row_runner.h"

namespace kdfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Tail : int64_t { drop = 0, bucket = 1, renormalize = 2 };
constexpr int64_t kPadding = -100;

struct StoredTeacher {
  Tensor values, indices;  // contiguous (rows, k)
  const void *value_data, *index_data;
  int64_t k;
  Storage storage;
  bool wide;  // int64 indices

  StoredTeacher(const Tensor& teacher_values, const Tensor& teacher_indices)
      : values(torch::stable::contiguous(teacher_values)), indices(torch::stable::contiguous(teacher_indices)),
        value_data(values.data_ptr()), index_data(indices.data_ptr()), k(values.size(values.dim() - 1)),
        storage(storage_of(values)), wide(indices.scalar_type() == ScalarType::Long) {}

  double value(int64_t r, int64_t i) const { return load_scalar(value_data, r * k + i, storage); }
  int64_t index(int64_t r, int64_t i) const {
    return wide ? static_cast<const int64_t*>(index_data)[r * k + i] : static_cast<const int32_t*>(index_data)[r * k + i];
  }
  // What k rounded probabilities may leave of 1 - sum.
  double rounding() const {
    switch (storage) {
      case Storage::float64: return k * std::numeric_limits<double>::epsilon();
      case Storage::float32: return k * std::numeric_limits<float>::epsilon();
      case Storage::float16: return k * 0x1p-10;
      default: return k * 0x1p-7;
    }
  }
};

struct Options {
  double temperature;
  Tail tail;
  bool logprobs;
};

// log of the sum of exp(x), with `also` among the x. Into `shares`, where they are asked for: exp(x) over that sum, all 0
// where it is 0.
double log_sum_exp(const std::vector<double>& x, double also = -INFINITY, std::vector<double>* shares = nullptr) {
  double top = also;
  for (double v : x) top = std::max(top, v);
  if (shares) shares->assign(x.size(), 0);
  if (top == -INFINITY) return -INFINITY;
  double sum = std::exp(also - top);
  for (size_t i = 0; i < x.size(); ++i) {
    const double e = std::exp(x[i] - top);
    sum += e;
    if (shares) (*shares)[i] = e;
  }
  if (shares)
    for (double& share : *shares) share /= sum;
  return top + std::log(sum);
}

// log(1 - exp(x)) for x <= 0, by the formula that does not cancel on its side of log(1/2).
double log1m_exp(double x) { return x > -M_LN2 ? std::log(-std::expm1(x)) : std::log1p(-std::exp(x)); }

// One row's listed classes.
struct Listed {
  std::vector<int64_t> classes;
  std::vector<double> teacher, student;  // log p_t, and logits / T
  std::vector<double> p_teacher, p_student;
  std::vector<int64_t> by_block;

  void clear() { classes.clear(), teacher.clear(), student.clear(); }
};

struct ListedWorkspace : Workspace {
  using Workspace::Workspace;
  Listed listed;
};

class RowLoss {
 public:
  RowLoss(const Options& options, const Rows& student, const StoredTeacher& teacher, Output& out)
      : o_(options), student_(student), teacher_(teacher), out_(out), kernels_(KDFAST_SELECT_LEVEL(kl_kernels)) {}

  ListedWorkspace make_workspace() const {
    const int kept = out_.wants_grad() && o_.tail != Tail::renormalize ? 1 : 0;
    return ListedWorkspace(out_, 1 / o_.temperature, kept, /*together=*/false);
  }

  // Loss of the row in w.rows, times weight and scale; writes its gradient.
  void operator()(ListedWorkspace& w, bool shared) const {
    const int64_t r = w.rows.front();
    Listed& listed = w.listed;
    read(r, listed);
    const double weight = out_.row_weight(r), square = o_.temperature * o_.temperature;
    // d/dz = T^2 / T, times what the reduction divides by
    const double g = o_.temperature * weight / out_.divisor();
    const double loss = o_.tail == Tail::renormalize ? among_listed(r, listed, g) : against_row(r, listed, g, w, shared);
    out_.loss[r] = square * weight * loss;
  }

 private:
  void read(int64_t r, Listed& listed) const {
    listed.clear();
    const bool soften = !o_.logprobs || o_.tail == Tail::renormalize;
    for (int64_t i = 0; i < teacher_.k; ++i) {
      const int64_t index = teacher_.index(r, i);
      const double value = teacher_.value(r, i);
      if (index == kPadding || value == -INFINITY) continue;
      STD_TORCH_CHECK(index >= 0 && index < out_.classes, "kdfast::topk_kl: index ", index, " is not in [0, ", out_.classes, ")");
      __builtin_prefetch(student_.row(r) + index * student_.element_size);  // all before the first one is waited for
      listed.classes.push_back(index);
      listed.teacher.push_back(soften ? value / o_.temperature : value);
    }
    for (int64_t index : listed.classes)
      listed.student.push_back(load_scalar(student_.row(r), index, out_.storage) / o_.temperature);
    if (soften) {
      const double total = log_sum_exp(listed.teacher, -INFINITY, &listed.p_teacher);
      for (double& v : listed.teacher) v -= total;
    } else {
      listed.p_teacher.resize(listed.teacher.size());
      for (size_t i = 0; i < listed.teacher.size(); ++i) listed.p_teacher[i] = std::exp(listed.teacher[i]);
    }
  }

  // Tells each block which of its classes are listed.
  void punch(Workspace& w, Listed& listed) const {
    for (int64_t c : listed.classes) ++w.blocks[c / kBlock].num_holes;
    listed.by_block.resize(listed.classes.size());
    int64_t* end = listed.by_block.data();
    for (Block& block : w.blocks) block.holes = end, end += block.num_holes, block.num_holes = 0;
    for (int64_t c : listed.classes) {
      Block& block = w.blocks[c / kBlock];
      listed.by_block[block.holes - listed.by_block.data() + block.num_holes++] = c;
    }
  }

  // Divergence of the listed classes, and their gradient `mass * p_s - p_t`.
  double listed_terms(int64_t r, const Listed& listed, double log_sum, double mass, double g) const {
    double divergence = 0;
    for (size_t i = 0; i < listed.classes.size(); ++i) {
      const double p = listed.p_teacher[i];
      divergence += kl_term(p, listed.teacher[i], listed.student[i] - log_sum);
      if (out_.wants_grad())
        store_scalar(out_.grad_row(r), listed.classes[i], out_.storage, g * (mass * listed.p_student[i] - p));
    }
    return divergence;
  }

  double among_listed(int64_t r, Listed& listed, double g) const {
    if (out_.wants_grad()) std::memset(out_.grad_row(r), 0, out_.classes * out_.grad.element_size);
    if (listed.classes.empty()) return 0;
    const double log_sum = log_sum_exp(listed.student, -INFINITY, &listed.p_student);
    // A student without mass among them is infinitely far, and has no slope.
    return log_sum == -INFINITY ? listed_terms(r, listed, 0, 1, 0) : listed_terms(r, listed, log_sum, 1, g);
  }

  double against_row(int64_t r, Listed& listed, double g, Workspace& w, bool shared) const {
    w.place(student_, nullptr, out_);
    punch(w, listed);
    const int storage = static_cast<int>(out_.storage);
    each_block(w, shared, [&](int64_t first, int64_t last) {
      kernels_.stats[static_cast<int>(Form::student)][storage](w.blocks.data(), first, last, w.stats.data());
    });
    const RowStats rest = w.merged(0, Form::student);
    const double log_rest = rest.sum_student == 0 ? -INFINITY : rest.max_student / o_.temperature + std::log(rest.sum_student);
    const double log_sum = log_sum_exp(listed.student, log_rest, &listed.p_student);
    double mass = 0, rest_teacher = 0, divergence = 0;
    for (double p : listed.p_teacher) mass += p;
    if (o_.tail == Tail::bucket && static_cast<int64_t>(listed.classes.size()) < out_.classes) {
      const double log_mass = std::min(log_sum_exp(listed.teacher), 0.0), log_rest_teacher = log1m_exp(log_mass);
      // What rounding leaves of 1 - mass is no mass: it would be infinitely far from a student that has none.
      if (log_rest != -INFINITY || log_mass <= -teacher_.rounding()) {
        rest_teacher = std::exp(log_rest_teacher);
        divergence += kl_term(rest_teacher, log_rest_teacher, log_rest - log_sum);
      }
    }
    mass += rest_teacher;
    if (out_.wants_grad()) {
      // An unlisted class: mass * p_s - rest_teacher * (its share of the rest), both multiples of the same e.
      const double share = mass * std::exp(log_rest - log_sum) - rest_teacher;
      for (int64_t b = 0; b < w.num_laid_out(); ++b)
        w.coefficients[b] = {rest.sum_student == 0 ? 0 : g * share * rest.student_factor(w.stats[b]) / rest.sum_student, 0, 0, 0};
      each_block(w, shared, [&](int64_t first, int64_t last) {
        kernels_.grad[static_cast<int>(Shape::one)][storage](w.blocks.data(), first, last, w.coefficients.data(), out_.streamed);
      });
    }
    return divergence + listed_terms(r, listed, log_sum, mass, g);
  }

  const Options& o_;
  const Rows& student_;
  const StoredTeacher& teacher_;
  Output& out_;
  const KlKernels& kernels_;
};

std::tuple<Tensor, Tensor> topk_kl(const Tensor& student, const Tensor& teacher_values, const Tensor& teacher_indices,
                                   std::optional<Tensor> mask, std::optional<Tensor> row_weight, double temperature,
                                   int64_t tail, bool logprobs, int64_t reduction, bool needs_grad) {
  const Rows rows = rows_of(student);
  Tensor grad = make_grad(student, needs_grad);
  Output out = make_output(rows, grad, mask, row_weight, reduction);
  const Options options{temperature, static_cast<Tail>(tail), logprobs};
  const StoredTeacher teacher(teacher_values, teacher_indices);
  const RowLoss loss(options, rows, teacher, out);
  each_row(out, [&] { return loss.make_workspace(); }, loss);
  return {reduced(out, student), grad};
}

template <class Index>
int64_t repeated(const Index* indices, const bool* listed, int64_t rows, int64_t k, int64_t classes) {
  constexpr int64_t kBits = 64;
  std::vector<uint64_t> seen((classes + kBits - 1) / kBits);  // a bit a class, of one row
  for (int64_t begin = 0; begin < rows * k; begin += k) {
    for (int64_t i = begin; i < begin + k; ++i) {
      if (!listed[i]) continue;
      const uint64_t bit = uint64_t{1} << indices[i] % kBits;
      if (seen[indices[i] / kBits] & bit) return i;
      seen[indices[i] / kBits] |= bit;
    }
    for (int64_t i = begin; i < begin + k; ++i)
      if (listed[i]) seen[indices[i] / kBits] = 0;
  }
  return -1;
}

// The first of (rows, k) indices, all in [0, classes) where `listed` counts them, that its row has listed before; -1: none.
int64_t repeated_index(const Tensor& indices, const Tensor& listed, int64_t classes) {
  const Tensor flat = torch::stable::contiguous(indices), counted = torch::stable::contiguous(listed);
  const int64_t k = flat.size(flat.dim() - 1), rows = k == 0 ? 0 : flat.numel() / k;
  const bool* counts = static_cast<const bool*>(counted.data_ptr());
  if (flat.scalar_type() == ScalarType::Long)
    return repeated(static_cast<const int64_t*>(flat.data_ptr()), counts, rows, k, classes);
  return repeated(static_cast<const int32_t*>(flat.data_ptr()), counts, rows, k, classes);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kdfast, m) { m.def("repeated_index(Tensor indices, Tensor listed, int classes) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("topk_kl", TORCH_BOX(&topk_kl));
  m.impl("repeated_index", TORCH_BOX(&repeated_index));
}

}  // namespace kdfast
