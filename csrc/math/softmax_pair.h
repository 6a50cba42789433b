// Sums over two rows of logits in one read, and the divergence of their softmaxes: scalar maths of CPU and GPU alike.
//
// y = logit * factor - shift with factor = log2(e) / T and shift = maximum * factor, rounded once and the same number
// wherever it stands; e = 2^y is in [0, 1]. float32 throughout; relative error of a sum of n terms about sqrt(n) 2^-24.
#pragma once

#include <cmath>

#include "math/host_device.h"

namespace kdfast {

constexpr float kMinusInfinity = -__builtin_huge_valf();
constexpr float kLn2 = 0.693147180559945309f;

// What brings the largest y to about 0; 0 where there is no logit above -inf, so that differences are defined.
// A product that must not be contracted into an fma: shifts of equal maxima are equal.
KDFAST_HOST_DEVICE float shift_of(float largest, float factor) {
  if (largest == kMinusInfinity) return 0;
#ifdef __CUDA_ARCH__
  return __fmul_rn(largest, factor);
#else
  volatile float product = largest * factor;
  return product;
#endif
}

// Of part of a row, or of all of it.
struct PairSums {
  float max_s = kMinusInfinity, max_t = kMinusInfinity;
  float sum_s = 0, sum_t = 0;  // of e
  float cross = 0;             // forward: sum e_t (y_t - y_s), reverse: sum e_s (y_s - y_t); an e of 0 adds 0 whatever y is
};

// ``sums`` relative to maxima that are not smaller.
template <bool REVERSE>
KDFAST_HOST_DEVICE PairSums moved(PairSums sums, float max_s, float max_t, float factor) {
  const float d_s = shift_of(sums.max_s, factor) - shift_of(max_s, factor);
  const float d_t = shift_of(sums.max_t, factor) - shift_of(max_t, factor);
  // Only a sum without a finite logit, which is 0, moves up: it must not meet an infinite power.
  const float f_s = exp2f(fminf(d_s, 0.f)), f_t = exp2f(fminf(d_t, 0.f));
  // A sum may be infinite where its factor is 0.
  if (REVERSE)
    sums.cross = f_s == 0 ? 0.f : f_s * (sums.cross + sums.sum_s * (d_s - d_t));
  else
    sums.cross = f_t == 0 ? 0.f : f_t * (sums.cross + sums.sum_t * (d_t - d_s));
  sums.sum_s *= f_s;
  sums.sum_t *= f_t;
  sums.max_s = max_s;
  sums.max_t = max_t;
  return sums;
}

// The sums of two parts together; the same bits whichever of them comes first.
template <bool REVERSE>
KDFAST_HOST_DEVICE PairSums joined(const PairSums& a, const PairSums& b, float factor) {
  const float max_s = fmaxf(a.max_s, b.max_s), max_t = fmaxf(a.max_t, b.max_t);
  PairSums x = moved<REVERSE>(a, max_s, max_t, factor);
  const PairSums y = moved<REVERSE>(b, max_s, max_t, factor);
  x.sum_s += y.sum_s;
  x.sum_t += y.sum_t;
  x.cross += y.cross;
  return x;
}

// ``sums`` and N more logits of either row.
template <bool REVERSE, int N>
KDFAST_HOST_DEVICE PairSums extended(const PairSums& sums, const float (&s)[N], const float (&t)[N], float factor) {
  float max_s = sums.max_s, max_t = sums.max_t;
  for (int i = 0; i < N; ++i) {
    max_s = fmaxf(max_s, s[i]);
    max_t = fmaxf(max_t, t[i]);
  }
  PairSums x = moved<REVERSE>(sums, max_s, max_t, factor);
  const float shift_s = shift_of(max_s, factor), shift_t = shift_of(max_t, factor);
  for (int i = 0; i < N; ++i) {
    const float y_s = fmaf(s[i], factor, -shift_s), y_t = fmaf(t[i], factor, -shift_t);
    const float e_s = exp2f(y_s), e_t = exp2f(y_t);
    x.sum_s += e_s;
    x.sum_t += e_t;
    if (REVERSE)
      x.cross += e_s == 0 ? 0.f : e_s * (y_s - y_t);
    else
      x.cross += e_t == 0 ? 0.f : e_t * (y_t - y_s);
  }
  return x;
}

// What a whole row's sums say: the divergence in nats, and the gradient with respect to a student's logit.
template <bool REVERSE>
struct PairDivergence {
  float factor, shift_s, shift_t, value, k_s, k_t, middle;

  // ``slope``: what multiplies p_s - p_t (forward), p_s (log(p_s / p_t) - KL) (reverse).
  KDFAST_HOST_DEVICE PairDivergence(const PairSums& row, float factor, float slope)
      : factor(factor), shift_s(shift_of(row.max_s, factor)), shift_t(shift_of(row.max_t, factor)) {
    const float ratio = log2f(row.sum_s) - log2f(row.sum_t);
    middle = row.cross / (REVERSE ? row.sum_s : row.sum_t);
    value = (REVERSE ? middle - ratio : middle + ratio) * kLn2;
    k_s = slope / row.sum_s * (REVERSE ? kLn2 : 1.f);
    k_t = slope / row.sum_t;
  }

  KDFAST_HOST_DEVICE float gradient(float s, float t) const {
    const float y_s = fmaf(s, factor, -shift_s), y_t = fmaf(t, factor, -shift_t);
    const float e_s = exp2f(y_s);
    if (REVERSE) return e_s == 0 ? 0.f : e_s * k_s * ((y_s - y_t) - middle);
    return product(e_s, k_s) - product(exp2f(y_t), k_t);  // not an fma: equal rows give exactly 0
  }

 private:
  KDFAST_HOST_DEVICE static float product(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    volatile float rounded = a * b;
    return rounded;
#endif
  }
};

}  // namespace kdfast
