// Blocks of a row to the row: sums relative to block maxima are brought to the row's maxima and added in block order.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/kl_rows.h"

namespace kdfast {

// BlockStats of the whole row: x is now relative to the row's maxima.
struct RowStats : BlockStats {
  double inverse_student, inverse_teacher;

  // What a block's e must be multiplied with to be relative to the row's maximum; 0 for a block of -inf.
  double student_factor(const BlockStats& b) const {
    return b.sum_student == 0 ? 0 : factor(student_shift(b));
  }
  double teacher_factor(const BlockStats& b) const {
    return b.sum_teacher == 0 ? 0 : factor(teacher_shift(b));
  }
  double hard_factor(const BlockStats& b) const {
    return b.sum_student == 0 ? 0 : factor(b.max_student - max_student);
  }
  // A row of one block, the common short one, needs no exponential.
  static double factor(double shift) { return shift == 0 ? 1 : std::exp(shift); }
  // x_row = x_block + shift
  double student_shift(const BlockStats& b) const { return (b.max_student - max_student) * inverse_student; }
  double teacher_shift(const BlockStats& b) const { return (b.max_teacher - max_teacher) * inverse_teacher; }
  // log sum_v exp(logit * inverse), relative to the maximum
  double log_ratio() const { return std::log(sum_student / sum_teacher); }
};

// `stats`: of a row's `count` blocks; `block`: one of them.
inline RowStats merge(const Block& block, const BlockStats* stats, int64_t count, Form form) {
  if (count == 1) return {*stats, block.inverse_student, block.inverse_teacher};  // a short row has no time to lose
  RowStats row{{-INFINITY, -INFINITY, 0, 0, 0, 0, 0, 0, 0}, block.inverse_student, block.inverse_teacher};
  // A block whose logits are all -inf has sum 0 and says nothing about the maximum.
  for (int64_t i = 0; i < count; ++i) {
    const BlockStats& b = stats[i];
    if (b.sum_student != 0) row.max_student = std::max(row.max_student, b.max_student);
    if (b.sum_teacher != 0) row.max_teacher = std::max(row.max_teacher, b.max_teacher);
  }
  for (int64_t i = 0; i < count; ++i) {
    const BlockStats& b = stats[i];
    const double f_s = row.student_factor(b), f_t = row.teacher_factor(b);
    const double shift_s = row.student_shift(b), shift_t = row.teacher_shift(b);
    row.sum_student += f_s * b.sum_student;
    row.sum_teacher += f_t * b.sum_teacher;
    if (form == Form::reverse) {
      if (f_s != 0) row.cross += f_s * (b.cross + b.sum_student * (shift_s - shift_t));
    } else if (f_t != 0) {
      row.cross += f_t * (b.cross + b.sum_teacher * (shift_t - shift_s));
    }
    if (form == Form::forward_hard) row.sum_hard += row.hard_factor(b) * b.sum_hard;
    row.sum_logits += b.sum_logits;
    if (form == Form::standardized) {
      row.student_x += f_s * (b.student_x + b.sum_student * shift_s);
      if (f_t != 0) row.teacher_x += f_t * (b.teacher_x + b.sum_teacher * shift_s);
    }
  }
  return row;
}

// A class's share of a divergence, p (log p - log q); 0 where p is.
inline double kl_term(double p, double log_p, double log_q) { return p == 0 ? 0 : p * (log_p - log_q); }

inline Moments merge(const Moments* moments, int64_t count) {
  Moments row{0, 0, 0};
  for (int64_t i = 0; i < count; ++i) {
    const Moments& b = moments[i];
    const double total = row.count + b.count, delta = b.mean - row.mean;
    row.squares += b.squares + delta * delta * row.count * b.count / total;
    row.mean += delta * b.count / total;
    row.count = total;
  }
  return row;
}

}  // namespace kdfast
