// rkd_sequence on the CPU: the angles that sequences turn through, their squared differences and the gradient, in one
// pass. Formulas: kdfast/reference/relations.py, csrc/math/turn.h. Memory: student and teacher are read once, the gradient
// is written once; a chunk of positions stays in cache between the norms, the angles and the gradient.
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
#include "cpu/rkd_sequence_kernels.h"
#include "cpu/row_runner.h"
#include "math/triplet.h"
#include "math/turn.h"

namespace kdfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 32;  // positions; an angle needs the two that follow, so a chunk repeats two of its neighbour's

template <class C> const RkdSequenceKernels<C>& kernels() {
  const RkdSequenceTables& tables = KDFAST_SELECT_LEVEL(rkd_sequence_tables);
  if constexpr (sizeof(C) == 4) return tables.single;
  else return tables.twice;
}
template <class C> auto packer() {
  const RkdTables& tables = KDFAST_SELECT_LEVEL(rkd_tables);
  if constexpr (sizeof(C) == 4) return tables.single.pack;
  else return tables.twice.pack;
}

template <class C> struct Angle {
  bool moved;
  C norm_u, norm_v;
  math::Turn turn{std::acos(0.0), 0, 0, 0};
  double stretch_u = 0, stretch_v = 0;  // what the norms take off: where both lengths are 1 not even its rounding

  Angle(const RkdSequenceKernels<C>& k, const C* x, int64_t width) {
    const TwoSums squares = k.steps(x, x + width, x + 2 * width, width);
    // In C, as a definition in C has them: what underflows there has not moved.
    const C u = std::sqrt(C(squares.first)), v = std::sqrt(C(squares.second)), smallest = C(math::kSmallestNorm);
    norm_u = std::max(u, smallest), norm_v = std::max(v, smallest);
    moved = !(u == 0 || v == 0);
    if (!moved) return;
    const TwoSums both = k.turns(x, x + width, x + 2 * width, width, norm_u, norm_v);
    turn = math::turn(both.first, both.second);
    const bool short_u = u < smallest, short_v = v < smallest;
    stretch_u = short_v && !short_u ? turn.stretch : 0, stretch_v = short_u && !short_v ? turn.stretch : 0;
  }
};

// Positions [first, last) of one sequence and the rows around them, packed; what is padding is 0 and not read.
template <class C> class Window {
 public:
  Window(int64_t d) : d_(d), width_(rkd_padded(d)), x_(uninitialized<C>((kChunk + 4) * (width_ + kRkdLanes))) {}

  void fill(const Rows& rows, Storage storage, int64_t begin, int64_t end, const bool* mask) {
    for (int64_t r = begin; r < end; ++r) {
      C* out = x_.get() + (r - begin) * width_;
      if (mask && !mask[r]) std::fill(out, out + width_, C(0));
      else packer<C>()(rows.row(r), storage, d_, out, width_);
    }
  }
  const C* row(int64_t r) const { return x_.get() + r * width_; }
  int64_t width() const { return width_; }

 private:
  int64_t d_, width_;
  Array<C> x_;
};

template <class C>
std::tuple<Tensor, Tensor> run(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                               bool needs_grad) {
  const int64_t n = student.size(0), length = student.size(1), d = student.size(2);
  const ScalarType type = sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float;
  Tensor loss = empty({}, type);
  Tensor grad = make_grad(student, needs_grad, type);
  C* out = static_cast<C*>(grad.data_ptr());
  const bool* keep = mask ? static_cast<const bool*>(mask->data_ptr()) : nullptr;
  const auto counts = [&](int64_t r) { return keep == nullptr || (keep[r] && keep[r + 1] && keep[r + 2]); };

  int64_t count = 0;
  for (int64_t s = 0; s < n; ++s)
    for (int64_t t = 0; t + 2 < length; ++t) count += counts(s * length + t);
  const double scale = 1 / std::max(1.0, static_cast<double>(count));

  const Rows student_rows = rows_of(student), teacher_rows = rows_of(teacher);
  const Storage storage = storage_of(student);
  const int64_t chunks = (length + kChunk - 1) / kChunk;
  std::vector<double> squares(n * chunks, 0.0);
  const RkdSequenceKernels<C>& k = kernels<C>();
  torch::stable::parallel_for(0, n * chunks, 1, [&](int64_t first_chunk, int64_t last_chunk) {
    Window<C> of_student(d), of_teacher(teacher.size(2));
    const int64_t width = of_student.width();
    auto gradient = uninitialized<C>((kChunk + 4) * (width + 1));
    for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
      const int64_t sequence = chunk / chunks, base = sequence * length;
      const int64_t begin = chunk % chunks * kChunk, end = std::min(begin + kChunk, length);
      // The angles that touch these positions begin up to two positions before, and reach up to two beyond.
      const int64_t t_begin = std::max<int64_t>(begin - 2, 0), t_end = std::min(end, length - 2);
      const int64_t first = base + t_begin, last = base + std::min(end + 2, length);
      of_student.fill(student_rows, storage, first, last, keep);
      of_teacher.fill(teacher_rows, storage, first, last, keep);
      if (needs_grad) std::fill(gradient.get(), gradient.get() + (last - first) * width, C(0));
      for (int64_t t = t_begin; t < t_end; ++t) {
        if (!counts(base + t)) continue;
        const int64_t at = t - t_begin;
        const Angle<C> angle(k, of_student.row(at), width), target(k, of_teacher.row(at), of_teacher.width());
        const double off = angle.turn.theta - target.turn.theta;
        if (t >= begin) squares[chunk] += off * off;
        const double slope = 2 * scale * off;
        if (needs_grad && angle.moved) {
          C* g = gradient.get() + at * width;
          const C* x = of_student.row(at);
          k.pull(x, x + width, x + 2 * width, width, angle.norm_u, angle.norm_v, C(slope * angle.turn.apart),
                 C(slope * angle.turn.along), C(slope * angle.stretch_u), C(slope * angle.stretch_v), g, g + width,
                 g + 2 * width);
        }
      }
      for (int64_t p = begin; needs_grad && p < end; ++p) {
        const C* g = gradient.get() + (p - t_begin) * width;
        std::copy(g, g + d, out + (base + p) * d);
      }
    }
  });
  double total = 0;
  for (double square : squares) total += square;
  *static_cast<C*>(loss.data_ptr()) = static_cast<C>(total * scale);
  return {loss, grad};
}

std::tuple<Tensor, Tensor> rkd_sequence(const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
                                        bool needs_grad) {
  return storage_of(student) == Storage::float64 ? run<double>(student, teacher, mask, needs_grad)
                                                 : run<float>(student, teacher, mask, needs_grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { m.impl("rkd_sequence", TORCH_BOX(&rkd_sequence)); }

}  // namespace kdfast
