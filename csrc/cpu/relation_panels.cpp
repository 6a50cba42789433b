// Compiled once per instruction set (setup.py: PER_LEVEL). See relation_panels.h for what is computed.
// Memory: reads one or two panels once and writes one, in cache. An element of crd takes an exponential, a log1p and two
// divisions, one of pkt two logarithms and four divisions for the pair and its mirror image; the matrix products that
// make the panels take 6 or 8 D operations beside that. A row of similarity_row is read two or three times, from L1 up to
// 4000 columns of float32.
#include "cpu/relation_panels.h"

#include <cmath>

#include "cpu/simd.h"

namespace kdfast {
namespace {

constexpr double kLog2E = 1.4426950408889634074;

template <class C> KDFAST_INLINE const C* row_of(const void* data, int64_t row, int64_t stride) {
  return static_cast<const C*>(data) + row * stride;
}

// d/da softplus(a), and softplus(a) = log(1 + exp(a)) itself, which keeps its digits for a far below 0.
template <class C> struct Softplus {
  Vec<C> value, slope;
};
template <class C> KDFAST_INLINE Softplus<C> softplus(Vec<C> a) {
  const Vec<C> e = exp2_nonpositive<C>((a > C(0) ? -a : a) * C(kLog2E));
  const Vec<C> far = C(1) / (e + C(1));  // the slope at |a|
  return {(a > C(0) ? a : Vec<C>{}) + log1p_unit<C>(e), a > C(0) ? far : e * far};
}

template <class C, bool has_teacher>
KDFAST_INLINE double crd_task(const Panel& p, const CrdOptions& o, int64_t task) {
  const int64_t begin = p.begin(task), n = p.end(task) - begin;
  const C* factor_s = static_cast<const C*>(p.student_factor);
  const C* factor_t = static_cast<const C*>(p.teacher_factor);
  const C weight = C(o.weight), slope_weight = C(2 * o.weight);
  double total = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t i = p.first + r, label = o.labels[i];
    C sign[kTask];
    for (int64_t j = 0; j < n; ++j) sign[j] = o.labels[begin + j] == label ? C(-1) : C(1);
    C* s = static_cast<C*>(p.student) + r * p.stride + begin;
    const C* t = has_teacher ? row_of<C>(p.teacher, r, p.stride) + begin : nullptr;
    const C row_s = C(factor_s[i] * o.inverse_temperature), out = C(o.scale * factor_s[i]);
    const C row_t = has_teacher ? C(factor_t[i] * o.inverse_temperature) : C(0);
    Vec<C> sum{};
    each_vector<C>(n, [&](int64_t j, auto extent) __attribute__((always_inline)) {
      const Vec<C> f = read(extent, factor_s + begin, j, n, C(0)), y = read(extent, sign, j, n, C(0));
      const Vec<C> x = read(extent, s, j, n, C(0)) * (f * row_s);
      const Softplus<C> contrast = softplus<C>(y * x);
      Vec<C> value = contrast.value, slope = y * contrast.slope;
      if constexpr (has_teacher) {
        const Vec<C> d = x - read(extent, t, j, n, C(0)) * (read(extent, factor_t + begin, j, n, C(0)) * row_t);
        value += weight * (d * d);
        slope += slope_weight * d;
      }
      if constexpr (!decltype(extent)::value) {
        C lanes[Simd<C>::width];
        store(lanes, value);
        for (int64_t l = n - j; l < Simd<C>::width; ++l) lanes[l] = 0;  // softplus(0) is not 0
        value = load(lanes);
      }
      sum += value;
      write(extent, s, j, n, slope * (f * out));
    });
    total += sum_lanes<C>(sum);
  }
  return p.mirrored(task) ? 2 * total : total;
}

template <class C> double crd(const Panel& p, const CrdOptions& o, int64_t task) {
  return p.teacher ? crd_task<C, true>(p, o, task) : crd_task<C, false>(p, o, task);
}

// One direction of a pair: its share of the loss, 1 + d/dc_s, and that times c_s.
template <class C> struct Direction {
  Vec<C> loss, w, along;
};
template <class C> KDFAST_INLINE Direction<C> direction(Vec<C> c_s, Vec<C> c_t, C eps) {
  const Vec<C> inverse = C(1) / (c_s + eps);
  const Vec<C> w = (c_s - c_t + eps) * inverse;
  return {c_t * log_positive<C>((c_t + eps) * inverse), w, w * c_s};
}

template <class C, bool mirrored> KDFAST_INLINE double pkt_task(const Panel& p, const PktOptions& o, int64_t task) {
  const int64_t begin = p.begin(task), n = p.end(task) - begin;
  const C* factor_s = static_cast<const C*>(p.student_factor);
  const C* factor_t = static_cast<const C*>(p.teacher_factor);
  const C* sum_s = static_cast<const C*>(o.student_inverse_sum);
  const C* sum_t = static_cast<const C*>(o.teacher_inverse_sum);
  const C eps = C(o.eps), half = C(0.5);
  C columns[kTask + Simd<C>::width] = {};  // sums down the columns, whole vectors
  double total = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t i = p.first + r;
    C* s = static_cast<C*>(p.student) + r * p.stride + begin;
    const C* t = row_of<C>(p.teacher, r, p.stride) + begin;
    const C row_s = factor_s[i] * half, row_t = factor_t[i] * half, out = C(o.scale * factor_s[i]);
    const C own_s = sum_s[i], own_t = sum_t[i];
    Vec<C> loss{}, along{};
    each_vector<C>(n, [&](int64_t j, auto extent) __attribute__((always_inline)) {
      const Vec<C> f = read(extent, factor_s + begin, j, n, C(0));
      Vec<C> k_s = read(extent, s, j, n, C(0)) * (f * row_s) + half;
      Vec<C> k_t = read(extent, t, j, n, C(0)) * (read(extent, factor_t + begin, j, n, C(0)) * row_t) + half;
      k_s = k_s < C(0) ? Vec<C>{} : k_s;  // rounding can leave opposite rows just below -1
      k_t = k_t < C(0) ? Vec<C>{} : k_t;
      if constexpr (!decltype(extent)::value) {  // what lies beyond the end weighs nothing
        C lanes_s[Simd<C>::width], lanes_t[Simd<C>::width];
        store(lanes_s, k_s), store(lanes_t, k_t);
        for (int64_t l = n - j; l < Simd<C>::width; ++l) lanes_s[l] = lanes_t[l] = 0;
        k_s = load(lanes_s), k_t = load(lanes_t);
      }
      const Vec<C> other_s = read(extent, sum_s + begin, j, n, C(0)), other_t = read(extent, sum_t + begin, j, n, C(0));
      const Direction<C> from_row = direction<C>(k_s * own_s, k_t * own_t, eps);
      const Direction<C> from_column = direction<C>(k_s * other_s, k_t * other_t, eps);
      loss += from_row.loss;
      along += from_row.along;
      if constexpr (mirrored) {
        loss += from_column.loss;
        store(columns + j, load(columns + j) + from_column.along);
      }
      write(extent, s, j, n, (from_row.w * own_s + from_column.w * other_s) * (f * out));
    });
    total += sum_lanes<C>(loss);
    o.row_sums[task * p.rows + r] = sum_lanes<C>(along);
  }
  if constexpr (mirrored)
    for (int64_t j = 0; j < n; ++j) o.column_sums[begin + j] = columns[j];
  return total;
}

template <class C> double pkt(const Panel& p, const PktOptions& o, int64_t task) {
  return p.mirrored(task) ? pkt_task<C, true>(p, o, task) : pkt_task<C, false>(p, o, task);
}

// Two sums over a row, to which term(s, t, first, second) adds a vector of either side: by lanes for a stretch, then in
// double.
struct TwoSums {
  double first, second;
};
template <class C, class Term> KDFAST_INLINE TwoSums sums_of_row(const C* s, const C* t, int64_t columns, const Term& term) {
  constexpr int64_t kStretch = 1024;
  TwoSums sums{0, 0};
  for (; columns > 0; columns -= kStretch, s += kStretch, t += kStretch) {
    const int64_t n = columns < kStretch ? columns : kStretch;
    Vec<C> first{}, second{};
    each_vector<C>(n, [&](int64_t j, auto extent) __attribute__((always_inline)) {
      term(read(extent, s, j, n, C(0)), read(extent, t, j, n, C(0)), first, second);
    });
    sums.first += sum_lanes<C>(first), sums.second += sum_lanes<C>(second);
  }
  return sums;
}

double inverse_norm(double norm) { return norm == 0 ? 0 : 1 / (norm < kSimilarityEps ? kSimilarityEps : norm); }

template <class C> double similarity_row(const void* student, void* teacher, int64_t columns, bool needs_grad) {
  const C* s = static_cast<const C*>(student);
  C* t = static_cast<C*>(teacher);
  const TwoSums squares = sums_of_row<C>(s, t, columns, [](Vec<C> x, Vec<C> y, Vec<C>& xx, Vec<C>& yy)
                                                         __attribute__((always_inline)) { xx += x * x, yy += y * y; });
  const double norm = std::sqrt(squares.first);
  const C inverse_s = C(inverse_norm(norm)), inverse_t = C(inverse_norm(std::sqrt(squares.second)));
  const TwoSums sums = sums_of_row<C>(s, t, columns, [&](Vec<C> x, Vec<C> y, Vec<C>& dd, Vec<C>& da)
                                                      __attribute__((always_inline)) {
    const Vec<C> a = x * inverse_s, d = a - y * inverse_t;
    dd += d * d, da += d * a;
  });
  if (!needs_grad) return sums.first;
  const C along = norm < kSimilarityEps ? C(0) : C(sums.second);  // a norm that does not move has no share
  each_vector<C>(columns, [&](int64_t j, auto extent) __attribute__((always_inline)) {
    const Vec<C> a = read(extent, s, j, columns, C(0)) * inverse_s;
    const Vec<C> d = a - read(extent, t, j, columns, C(0)) * inverse_t;
    write(extent, t, j, columns, (d - a * along) * inverse_s);
  });
  return sums.first;
}

}  // namespace

namespace KDFAST_LEVEL {
extern const RelationKernels relation_kernels = {
    {crd<float>, crd<double>}, {pkt<float>, pkt<double>}, {similarity_row<float>, similarity_row<double>}};
}  // namespace KDFAST_LEVEL

}  // namespace kdfast
