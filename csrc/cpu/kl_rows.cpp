// Compiled once per instruction set (setup.py: PER_LEVEL). See kl_rows.h for what is computed.
// Memory: reads student and teacher once, writes the gradient once; scratch stays in cache.
// Exponentials an element: 2; forward_hard 2 where T is 1, 2 or 4 (a power of one of them), else 3; js 2 and a logarithm.
#include "cpu/kl_rows.h"

#include "cpu/simd.h"

namespace kdfast {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

KDFAST_INLINE int64_t block_length(int64_t classes, int64_t block) {
  const int64_t left = classes - block * kBlock;
  return left < kBlock ? left : kBlock;
}

// Largest of n values; 0 where all are -inf, so that differences with it are defined. A NaN is left to exp.
template <class S> KDFAST_INLINE ComputeOf<S> largest(const S* p, int64_t n) {
  using C = ComputeOf<S>;
  constexpr int64_t W = Simd<C>::width, kChains = 2;  // a single one would wait for itself
  Vec<C> best[kChains];
  for (Vec<C>& chain : best) chain = broadcast<C>(-kInfinity);
  int64_t i = 0;
  for (; i + kChains * W <= n; i += kChains * W)
#pragma GCC unroll 2
    for (int64_t c = 0; c < kChains; ++c) best[c] = max(load(p + i + c * W), best[c]);
  each_vector<C>(n - i, [&](int64_t j, auto extent) {
    best[0] = max(read(extent, p + i, j, n - i, C(-kInfinity)), best[0]);
  });
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

// `next_s`, `next_t`: where the next block will be read from.
template <Form form, class S, class N>
KDFAST_INLINE BlockStats block_stats(const S* s, const S* t, const N* next_s, const N* next_t, int64_t n, const Row& row,
                                     ComputeOf<S>* keep_a, ComputeOf<S>* keep_b, ComputeOf<S>* keep_c) {
  using C = ComputeOf<S>;
  const C max_s = largest(s, n), max_t = form == Form::student ? C(0) : largest(t, n);
  // y = x log2(e), so that e = 2^y; sums of y become sums of x at the end.
  const C inverse_s = C(row.inverse_student), factor_s = C(row.inverse_student * kLog2E);
  const C inverse_t = C(row.inverse_teacher), factor_t = C(row.inverse_teacher * kLog2E);
  Vec<C> sum_s{}, sum_t{}, cross{}, hard{}, logits{}, student_x{}, teacher_x{};
  each_vector<C>(n, [&](int64_t i, auto extent) __attribute__((always_inline)) {
    // The next block comes from memory while this one is computed.
    __builtin_prefetch(next_s + i, 0, 2);
    if constexpr (form != Form::student) __builtin_prefetch(next_t + i, 0, 2);
    const Vec<C> shifted = read(extent, s, i, n, C(-kInfinity)) - max_s;
    const Vec<C> y_s = shifted * factor_s, e_s = exp2_nonpositive<C>(y_s);
    Vec<C> kept_b{};
    sum_s += e_s;
    if constexpr (form != Form::student) {
      const Vec<C> shifted_t = read(extent, t, i, n, C(-kInfinity)) - max_t;
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
        if (keep_c) write(extent, keep_c, i, n, difference);
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
      logits += read(extent, s, i, n, C(0));
      if (keep_c) write(extent, keep_c, i, n, e_hard);
    }
    if (keep_a) {
      write(extent, keep_a, i, n, e_s);
      if constexpr (form != Form::student) write(extent, keep_b, i, n, kept_b);
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

// Widened copy of a block with the holes that fall into it at -inf; false where none does.
template <class S>
bool punch(const S* p, int64_t begin, int64_t n, const int64_t* holes, int64_t num_holes, ComputeOf<S>* copy) {
  using C = ComputeOf<S>;
  bool any = false;
  for (int64_t h = 0; h < num_holes; ++h) {
    if (holes[h] < begin || holes[h] >= begin + n) continue;
    if (!any) each_vector<C>(n, [&](int64_t i, auto extent) { write(extent, copy, i, n, read(extent, p, i, n, C(0))); });
    any = true;
    copy[holes[h] - begin] = C(-kInfinity);
  }
  return any;
}

template <Form form, class S>
void stats(const Row& row, int64_t first, int64_t last, BlockStats* blocks, const Scratch& scratch) {
  using C = ComputeOf<S>;
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * kBlock, n = block_length(row.classes, block);
    const S* s = static_cast<const S*>(row.student) + begin;
    const S* t = static_cast<const S*>(row.teacher) + begin;
    C* a = scratch.a ? static_cast<C*>(scratch.a) + begin : nullptr;
    C* b = scratch.b ? static_cast<C*>(scratch.b) + begin : nullptr;
    C* c = scratch.c ? static_cast<C*>(scratch.c) + begin : nullptr;
    C student_copy[kBlock], teacher_copy[kBlock];
    if (punch(s, begin, n, row.holes, row.num_holes, student_copy)) {
      if constexpr (form != Form::student) punch(t, begin, n, row.holes, row.num_holes, teacher_copy);
      blocks[block] = block_stats<form, C>(student_copy, teacher_copy, s + n, t + n, n, row, a, b, c);
    } else {
      blocks[block] = block_stats<form, S>(s, t, s + n, t + n, n, row, a, b, c);
    }
  }
}

template <Shape shape, class S>
void grad(void* grad_row, const void* student_row, int64_t classes, int64_t first, int64_t last,
          const Coefficients* blocks, const Scratch& scratch, bool streamed) {
  using C = ComputeOf<S>;
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * kBlock, n = block_length(classes, block);
    S* g = static_cast<S*>(grad_row) + begin;
    const S* s = static_cast<const S*>(student_row) + begin;
    const C* a = static_cast<const C*>(scratch.a) + begin;
    const C* b = static_cast<const C*>(scratch.b) + begin;
    const C* c = static_cast<const C*>(scratch.c) + begin;
    const C k = C(blocks[block].k), l = C(blocks[block].l), o = C(blocks[block].n);
    const double rest = blocks[block].l - double(l);  // NaN where l is infinite
    const C m = shape != Shape::product ? C(blocks[block].m) : rest == rest ? C(rest) : C(0);
    const auto value_of = [&](int64_t i, int64_t end, auto extent) __attribute__((always_inline)) {
      Vec<C> value = read(extent, a, i, end, C(0)) * k;
      if constexpr (shape == Shape::product) {
        // b and l may be large and nearly equal, so m holds what rounding takes from l.
        // A probability of 0 in the row, if not in its block, adds 0: b may be infinite there. A NaN is not 0.
        value = value == C(0) ? Vec<C>{} : value * (read(extent, b, i, end, C(0)) - l - m);
      } else if constexpr (shape != Shape::one) {
        value -= read(extent, b, i, end, C(0)) * l;
        if constexpr (shape == Shape::hard) value += read(extent, c, i, end, C(0)) * m + o;
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
template <class S> void moments(const void* logits, int64_t classes, int64_t first, int64_t last, Moments* blocks) {
  using C = ComputeOf<S>;
  for (int64_t block = first; block < last; ++block) {
    const int64_t n = block_length(classes, block);
    const S* p = static_cast<const S*>(logits) + block * kBlock;
    const C first_value = C(load_tail(p, 1, C(0))[0]);
    Vec<C> sum{}, squares{};
    each_vector<C>(n, [&](int64_t i, auto extent) { sum += read(extent, p, i, n, first_value) - first_value; });
    const C mean = C(first_value + sum_lanes<C>(sum) / n);
    each_vector<C>(n, [&](int64_t i, auto extent) {
      const Vec<C> d = read(extent, p, i, n, mean) - mean;
      squares += d * d;
    });
    blocks[block] = {double(n), double(mean), sum_lanes<C>(squares)};
  }
}

// With d = log(p_s / p_t), which the logits give without a logarithm, log(m / p) of the larger p is all that is missing:
// its argument lies between that side's weight and 1.
template <class S>
void mix(int64_t classes, int64_t first, int64_t last, double beta, const Coefficients* blocks, MixSums* sums,
         const Scratch& scratch) {
  using C = ComputeOf<S>;
  const Vec<C> teacher_share = broadcast<C>(C(beta)), student_share = broadcast<C>(C(1 - beta)), one = broadcast<C>(1);
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * kBlock, n = block_length(classes, block);
    C* a = static_cast<C*>(scratch.a) + begin;
    C* b = static_cast<C*>(scratch.b) + begin;
    const C* c = static_cast<const C*>(scratch.c) + begin;
    const C k = C(blocks[block].k), l = C(blocks[block].l), shift = C(blocks[block].m);
    Vec<C> student{}, teacher{};
    each_vector<C>(n, [&](int64_t i, auto extent) __attribute__((always_inline)) {
      const Vec<C> p_s = read(extent, a, i, n, C(0)) * k, p_t = read(extent, b, i, n, C(0)) * l;
      const Vec<C> d = read(extent, c, i, n, C(0)) + shift;
      const auto student_larger = d > C(0);  // not so for a NaN, which stays in d
      const Vec<C> larger = student_larger ? p_s : p_t, smaller = student_larger ? p_t : p_s;
      const Vec<C> ratio = smaller / (larger == C(0) ? one : larger);
      const Vec<C> share = student_larger ? student_share : teacher_share;
      const Vec<C> log_m = log_positive<C>(share + (one - share) * ratio);
      const Vec<C> log_s = (student_larger ? Vec<C>{} : d) - log_m, log_t = (student_larger ? -d : Vec<C>{}) - log_m;
      // A probability of 0 adds 0, whatever it is divided by.
      student += p_s == C(0) ? Vec<C>{} : p_s * log_s;
      teacher += p_t == C(0) ? Vec<C>{} : p_t * log_t;
      write(extent, a, i, n, p_s);
      write(extent, b, i, n, log_s);
    });
    sums[block] = {sum_lanes<C>(student), sum_lanes<C>(teacher)};
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
