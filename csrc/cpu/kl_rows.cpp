// Compiled once per instruction set (setup.py: PER_LEVEL). See kl_rows.h for what is computed.
// Memory: reads student and teacher once, writes the gradient once; scratch stays in cache.
// Exponentials an element: 2; forward_hard 2 where T is 1, 2 or 4 (a power of one of them), else 3; js 2 and a logarithm.
#include "cpu/kl_rows.h"

#include "cpu/simd.h"

namespace kdfast {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// Logits of a block.
template <class S> struct Logits {
  using C = ComputeOf<S>;
  const S* p;

  template <class Extent> KDFAST_INLINE Vec<C> at(Extent extent, int64_t i, int64_t n, C fill) const {
    return read(extent, p, i, n, fill);
  }
};

// Logits of a block whose holes are at -inf: the few vectors with a hole are read from a copy.
template <class S> class Punched {
 public:
  using C = ComputeOf<S>;

  Punched(const S* p, const Block& block) : sources_{p, copy_}, copied_{} {
    S absent[kWidth];
    store(absent, broadcast<C>(-kInfinity));
    for (int64_t h = 0; h < block.num_holes; ++h) {
      const int64_t hole = block.holes[h] - block.begin, vector = hole / kWidth, i = vector * kWidth;
      const int64_t left = block.length - i;
      if (!copied_[vector]) std::memcpy(copy_ + i, p + i, (left < kWidth ? left : kWidth) * sizeof(S));
      copied_[vector] = 1;
      copy_[hole] = absent[0];
    }
  }

  template <class Extent> KDFAST_INLINE Vec<C> at(Extent extent, int64_t i, int64_t n, C fill) const {
    return read(extent, sources_[copied_[i / kWidth]], i, n, fill);  // a branch would be mispredicted
  }

 private:
  static constexpr int64_t kWidth = Simd<C>::width;

  const S* sources_[2];
  uint8_t copied_[kBlock / kWidth];
  S copy_[kBlock];
};

// Largest of n values; 0 where all are -inf, so that differences with it are defined. A NaN is left to exp.
template <class Side> KDFAST_INLINE auto largest(const Side& side, int64_t n) {
  using C = typename Side::C;
  constexpr int64_t W = Simd<C>::width, kChains = 2;  // a single one would wait for itself
  Vec<C> best[kChains];
  for (Vec<C>& chain : best) chain = broadcast<C>(-kInfinity);
  const auto take = [&](int64_t chain, int64_t i, auto extent) __attribute__((always_inline)) {
    best[chain] = max(side.at(extent, i, n, C(-kInfinity)), best[chain]);
  };
  int64_t i = 0;
  for (; i + kChains * W <= n; i += kChains * W) take(0, i, Whole{}), take(1, i + W, Whole{});
  if (i + W <= n) take(0, i, Whole{}), i += W;
  if (i < n) take(1, i, Part{});
  const C result = max_lanes<C>(max(best[0], best[1]));
  return result == -kInfinity ? C(0) : result;
}

// exp(x / T) to exp(x): by squaring where T is 1, 2 or 4, which is exact enough (x / T is) and cheaper.
template <class C> KDFAST_INLINE Vec<C> hard_exponential(Vec<C> soft, Vec<C> x, C inverse_temperature) {
  if (inverse_temperature == C(1)) return soft;
  if (inverse_temperature == C(0.5)) return soft * soft;
  if (inverse_temperature == C(0.25)) return (soft * soft) * (soft * soft);
  return exp2_nonpositive<C>(x * C(kLog2E));
}

// Sums relative to the maxima. `next_s`, `next_t`: where the next block will be read from.
template <Form form, class Side, class S, class C = typename Side::C>
KDFAST_INLINE BlockStats sums(const Side& s, const Side& t, const S* next_s, const S* next_t, const Block& block,
                              C max_s, C max_t) {
  const int64_t n = block.length;
  C* const keep_a = static_cast<C*>(block.a);
  C* const keep_b = static_cast<C*>(block.b);
  C* const keep_c = static_cast<C*>(block.c);
  // y = x log2(e), so that e = 2^y; sums of y become sums of x at the end.
  const C inverse_s = C(block.inverse_student), factor_s = C(block.inverse_student * kLog2E);
  const C inverse_t = C(block.inverse_teacher), factor_t = C(block.inverse_teacher * kLog2E);
  Vec<C> sum_s{}, sum_t{}, cross{}, hard{}, logits{}, student_x{}, teacher_x{};
  each_vector<C>(n, [&](int64_t i, auto extent) __attribute__((always_inline)) {
    // The next block comes from memory while this one is computed.
    __builtin_prefetch(next_s + i, 0, 2);
    if constexpr (form != Form::student) __builtin_prefetch(next_t + i, 0, 2);
    const Vec<C> shifted = s.at(extent, i, n, C(-kInfinity)) - max_s;
    const Vec<C> y_s = shifted * factor_s, e_s = exp2_nonpositive<C>(y_s);
    Vec<C> kept_b{};
    sum_s += e_s;
    if constexpr (form != Form::student) {
      const Vec<C> shifted_t = t.at(extent, i, n, C(-kInfinity)) - max_t;
      const Vec<C> y_t = shifted_t * factor_t, e_t = exp2_nonpositive<C>(y_t);
      // Not by y: where T is a power of 2 the products are exact.
      const Vec<C> difference = shifted * inverse_s - shifted_t * inverse_t;
      sum_t += e_t;
      kept_b = e_t;
      // An exponential of 0 adds 0 whatever the difference is: it may be inf - inf.
      if constexpr (form == Form::reverse) {
        kept_b = e_s == C(0) ? Vec<C>{} : difference;
        cross += e_s * kept_b;
      } else if constexpr (form == Form::js) {
        if (keep_c) store(keep_c + i, difference);
      } else {
        cross = e_t == C(0) ? cross : cross + e_t * (y_t - y_s);
      }
      if constexpr (form == Form::standardized) {
        student_x += e_s == C(0) ? Vec<C>{} : e_s * y_s;
        teacher_x += e_t == C(0) ? Vec<C>{} : e_t * y_s;
      }
    }
    if constexpr (form == Form::forward_hard) {
      const Vec<C> e_hard = hard_exponential<C>(e_s, shifted, inverse_s);
      hard += e_hard;
      logits += s.at(extent, i, n, C(0));
      if (keep_c) store(keep_c + i, e_hard);
    }
    if (keep_a) {
      store(keep_a + i, e_s);
      if constexpr (form != Form::student) store(keep_b + i, kept_b);
    }
  });
  constexpr bool has_teacher = form != Form::student, has_hard = form == Form::forward_hard;
  constexpr bool has_cross = has_teacher && form != Form::js, has_x = form == Form::standardized;
  constexpr double cross_unit = form == Form::reverse ? 1 : kLn2;
  return {double(max_s),
          double(max_t),
          sum_lanes<C>(sum_s),
          has_teacher ? sum_lanes<C>(sum_t) : 0,
          has_cross ? cross_unit * sum_lanes<C>(cross) : 0,
          has_hard ? sum_lanes<C>(hard) : 0,
          has_hard ? sum_lanes<C>(logits) : 0,
          has_x ? kLn2 * sum_lanes<C>(student_x) : 0,
          has_x ? kLn2 * sum_lanes<C>(teacher_x) : 0};
}

template <Form form, class S> BlockStats punched_stats(const Block& block, const S* next_s, const S* next_t) {
  constexpr bool has_teacher = form != Form::student;
  const Punched<S> s(static_cast<const S*>(block.student), block);
  if constexpr (!has_teacher) return sums<form>(s, s, next_s, next_t, block, largest(s, block.length), ComputeOf<S>(0));
  const Punched<S> t(static_cast<const S*>(block.teacher), block);
  return sums<form>(s, t, next_s, next_t, block, largest(s, block.length), largest(t, block.length));
}

template <Form form, class S> void stats(const Block* blocks, int64_t first, int64_t last, BlockStats* results) {
  const auto student = [&](int64_t i) { return Logits<S>{static_cast<const S*>(blocks[i].student)}; };
  const auto teacher = [&](int64_t i) { return Logits<S>{static_cast<const S*>(blocks[i].teacher)}; };
  for (int64_t begin = first; begin < last;) {
    const int64_t length = blocks[begin].length, left = last - begin;
    const int64_t together = length == kBlock ? 1 : left < kMostRows ? left : kMostRows, ahead = together * length;
    // The maxima of short rows are found for several of them first: no exponential then waits for one.
    ComputeOf<S> max_s[kMostRows], max_t[kMostRows];
    for (int64_t slot = 0, i = begin; slot < together; ++slot, ++i) {
      if (blocks[i].num_holes != 0) continue;
      max_s[slot] = largest(student(i), length);
      max_t[slot] = form == Form::student ? 0 : largest(teacher(i), length);
    }
    for (int64_t slot = 0, i = begin; slot < together; ++slot, ++i) {
      const S* next_s = student(i).p + ahead;
      const S* next_t = form == Form::student ? nullptr : teacher(i).p + ahead;
      results[i] = blocks[i].num_holes != 0
                       ? punched_stats<form>(blocks[i], next_s, next_t)
                       : sums<form>(student(i), teacher(i), next_s, next_t, blocks[i], max_s[slot], max_t[slot]);
    }
    begin += together;
  }
}

template <Shape shape, class S>
void grad(const Block* blocks, int64_t first, int64_t last, const Coefficients* coefficients, bool streamed) {
  using C = ComputeOf<S>;
  for (int64_t block = first; block < last; ++block) {
    const int64_t n = blocks[block].length;
    S* g = static_cast<S*>(blocks[block].grad);
    const S* s = static_cast<const S*>(blocks[block].student);
    const C* a = static_cast<const C*>(blocks[block].a);
    const C* b = static_cast<const C*>(blocks[block].b);
    const C* c = static_cast<const C*>(blocks[block].c);
    const C k = C(coefficients[block].k), l = C(coefficients[block].l), o = C(coefficients[block].n);
    const double rest = coefficients[block].l - double(l);  // NaN where l is infinite
    const C m = shape != Shape::product ? C(coefficients[block].m) : rest == rest ? C(rest) : C(0);
    const auto value_of = [&](int64_t i, int64_t end, auto extent) __attribute__((always_inline)) {
      Vec<C> value = load(a + i) * k;
      if constexpr (shape == Shape::product) {
        // b and l may be large and nearly equal, so m holds what rounding takes from l.
        // A probability of 0 in the row, if not in its block, adds 0: b may be infinite there. A NaN is not 0.
        value = value == C(0) ? Vec<C>{} : value * (load(b + i) - l - m);
      } else if constexpr (shape != Shape::one) {
        value -= load(b + i) * l;
        if constexpr (shape == Shape::hard) value += load(c + i) * m + o;
        if constexpr (shape == Shape::standardized) value += read(extent, s, i, end, C(0)) * m + o;
      }
      return value;
    };
    const int64_t head = streamed ? before_stream(g, n) : 0;
    if (head > 0) write(Part{}, g, 0, head, value_of(0, head, Part{}));
    each_vector<C>(n - head, [&](int64_t i, auto extent) __attribute__((always_inline)) {
      write(extent, g, head + i, n, value_of(head + i, n, extent), streamed);
    });
  }
  if (streamed) stream_fence();
}

// Mean, then squares around it: the one-pass formula cancels. The mean is a sum of differences with the first value,
// which are 0 in a row of one value: rounding must not give it a deviation.
template <class S> Moments moments_of(const S* p, int64_t n) {
  using C = ComputeOf<S>;
  const C first_value = C(load_tail(p, 1, C(0))[0]);
  Vec<C> sum{}, squares{};
  each_vector<C>(n, [&](int64_t i, auto extent) { sum += read(extent, p, i, n, first_value) - first_value; });
  const C mean = C(first_value + sum_lanes<C>(sum) / n);
  each_vector<C>(n, [&](int64_t i, auto extent) {
    const Vec<C> d = read(extent, p, i, n, mean) - mean;
    squares += d * d;
  });
  return {double(n), double(mean), sum_lanes<C>(squares)};
}

template <class S>
void moments(const Block* blocks, int64_t first, int64_t last, Moments* student, Moments* teacher) {
  for (int64_t i = first; i < last; ++i) {
    student[i] = moments_of(static_cast<const S*>(blocks[i].student), blocks[i].length);
    teacher[i] = moments_of(static_cast<const S*>(blocks[i].teacher), blocks[i].length);
  }
}

// With d = log(p_s / p_t), which the logits give without a logarithm, log(m / p) of the larger p is all that is missing:
// its argument lies between that side's weight and 1.
template <class S>
void mix(const Block* blocks, int64_t first, int64_t last, double beta, const Coefficients* coefficients,
         MixSums* results) {
  using C = ComputeOf<S>;
  const Vec<C> teacher_share = broadcast<C>(C(beta)), student_share = broadcast<C>(C(1 - beta)), one = broadcast<C>(1);
  for (int64_t block = first; block < last; ++block) {
    C* a = static_cast<C*>(blocks[block].a);
    C* b = static_cast<C*>(blocks[block].b);
    const C* c = static_cast<const C*>(blocks[block].c);
    const C k = C(coefficients[block].k), l = C(coefficients[block].l), shift = C(coefficients[block].m);
    Vec<C> student{}, teacher{};
    each_vector<C>(blocks[block].length, [&](int64_t i, auto) __attribute__((always_inline)) {
      const Vec<C> p_s = load(a + i) * k, p_t = load(b + i) * l;
      const Vec<C> d = load(c + i) + shift;
      const auto student_larger = d > C(0);  // not so for a NaN, which stays in d
      const Vec<C> larger = student_larger ? p_s : p_t, smaller = student_larger ? p_t : p_s;
      const Vec<C> ratio = smaller / (larger == C(0) ? one : larger);
      const Vec<C> share = student_larger ? student_share : teacher_share;
      const Vec<C> log_m = log_positive<C>(share + (one - share) * ratio);
      const Vec<C> log_s = (student_larger ? Vec<C>{} : d) - log_m, log_t = (student_larger ? -d : Vec<C>{}) - log_m;
      // A probability of 0 adds 0, whatever it is divided by.
      student += p_s == C(0) ? Vec<C>{} : p_s * log_s;
      teacher += p_t == C(0) ? Vec<C>{} : p_t * log_t;
      store(a + i, p_s);
      store(b + i, log_s);
    });
    results[block] = {sum_lanes<C>(student), sum_lanes<C>(teacher)};
  }
}

}  // namespace

namespace KDFAST_LEVEL {
#define KDFAST_STORAGES(function, choice) \
  {function<choice, float>, function<choice, double>, function<choice, Half>, function<choice, BFloat16>}
extern const KlKernels kl_kernels = {
    {KDFAST_STORAGES(stats, Form::forward), KDFAST_STORAGES(stats, Form::forward_hard),
     KDFAST_STORAGES(stats, Form::standardized), KDFAST_STORAGES(stats, Form::reverse), KDFAST_STORAGES(stats, Form::js),
     KDFAST_STORAGES(stats, Form::student)},
    {KDFAST_STORAGES(grad, Shape::one), KDFAST_STORAGES(grad, Shape::difference), KDFAST_STORAGES(grad, Shape::hard),
     KDFAST_STORAGES(grad, Shape::standardized), KDFAST_STORAGES(grad, Shape::product)},
    {moments<float>, moments<double>, moments<Half>, moments<BFloat16>},
    {mix<float>, mix<double>, mix<Half>, mix<BFloat16>},
};
}  // namespace KDFAST_LEVEL

}  // namespace kdfast
