// Sums over two rows of logits in one read, and the divergence of their softmaxes: scalar maths of CPU and GPU alike.
//
// y = logit * factor - shift with factor = log2(e) / T and shift = maximum * factor, rounded once and the same number
// wherever it stands; e = 2^y is in [0, 1], up to 2^kSlack while sums grow. float32 throughout; relative error of a sum
// of n terms about sqrt(n) 2^-24.
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

// An e below 2^-126 is 0 on a GPU: to keep it would take three more instructions in the innermost loops.
KDFAST_HOST_DEVICE float power_of_2(float y) {
#ifdef __CUDA_ARCH__
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(y));
  return e;
#else
  return exp2f(y);
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
  const float f_s = power_of_2(fminf(d_s, 0.f)), f_t = power_of_2(fminf(d_t, 0.f));
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

// Sums of a row that come a few logits at a time.
//
// They stay relative to maxima that later logits exceed by up to kSlack in y. Some lane of a warp's 32 sees a new maximum
// nearly always, and the others would wait while its sums move.
template <bool REVERSE>
struct GrowingPairSums {
  PairSums sums;
  float top_s = kMinusInfinity, top_t = kMinusInfinity;      // largest logits so far
  float limit_s = kMinusInfinity, limit_t = kMinusInfinity;  // beyond them the sums move
  float shift_s = 0, shift_t = 0;                            // of the sums' maxima

  static constexpr float kSlack = 8;

  template <int N>
  KDFAST_HOST_DEVICE void add(const float (&s)[N], const float (&t)[N], float factor) {
    for (int i = 0; i < N; ++i) {
      top_s = fmaxf(top_s, s[i]);
      top_t = fmaxf(top_t, t[i]);
    }
    if (top_s > limit_s || top_t > limit_t) {
      sums = moved<REVERSE>(sums, top_s, top_t, factor);
      shift_s = shift_of(top_s, factor);
      shift_t = shift_of(top_t, factor);
      limit_s = top_s + kSlack / factor;
      limit_t = top_t + kSlack / factor;
    }
    for (int i = 0; i < N; ++i) {
      const float y_s = fmaf(s[i], factor, -shift_s), y_t = fmaf(t[i], factor, -shift_t);
      const float e_s = power_of_2(y_s), e_t = power_of_2(y_t);
      sums.sum_s += e_s;
      sums.sum_t += e_t;
      const float e = REVERSE ? e_s : e_t, difference = REVERSE ? y_s - y_t : y_t - y_s;
      if (e != 0) sums.cross = fmaf(e, difference, sums.cross);
    }
  }
};

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
    const float e_s = power_of_2(y_s);
    if (REVERSE) return e_s == 0 ? 0.f : e_s * k_s * ((y_s - y_t) - middle);
    return product(e_s, k_s) - product(power_of_2(y_t), k_t);  // not an fma: equal rows give exactly 0
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
