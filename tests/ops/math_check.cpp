// Prints the largest errors of csrc/math against long double, which tests/ops/test_math.py compares with what is stated.
#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "math/huber.h"
#include "math/triplet.h"
#include "math/turn.h"

using namespace kdfast::math;

template <class T> T ulp_of(long double exact) {
  const T nearest = static_cast<T>(fabsl(exact));
  return std::nextafter(nearest, T(INFINITY)) - nearest;
}

template <class T> void check_huber(const char* name) {
  double worst = 0;
  for (int i = -4000; i <= 4000; ++i) {
    const T e = static_cast<T>(i * 0.00123);
    const long double x = e, exact = fabsl(x) <= 1 ? x * x / 2 : fabsl(x) - 0.5L;
    if (exact != 0) worst = std::fmax(worst, static_cast<double>(fabsl(huber(e) - exact) / ulp_of<T>(exact)));
  }
  std::printf("%s %g\n", name, worst);
}

// Angle ijk between (d_i, 0) and d_k (cos t, sin t): largest error in units of eps times the ratio of the distances.
template <class T> void check_cosine(const char* name) {
  double worst = 0;
  for (double ratio : {1.0, 3.0, 1e3})
    for (int i = 1; i < 1000; ++i) {
      const long double t = i * 0.00314159L, d_i = 0.7L, d_k = d_i * ratio;
      const long double x = d_i - d_k * cosl(t), y = d_k * sinl(t);
      const T a_i = static_cast<T>(d_i * d_i / 2), a_k = static_cast<T>(d_k * d_k / 2);
      const T a_ik = static_cast<T>((x * x + y * y) / 2), r_i = 1 / std::sqrt(2 * a_i), r_k = 1 / std::sqrt(2 * a_k);
      const T forward = cosine_over_r(a_k, a_ik, r_i, a_i * r_i) * r_k;
      const T backward = cosine_over_r(a_i, a_ik, r_k, a_k * r_k) * r_i;
      const long double unit = ratio * (std::nextafter(T(1), T(2)) - T(1));
      worst = std::fmax(worst, static_cast<double>(fabsl(forward - cosl(t)) / unit));
      worst = std::fmax(worst, static_cast<double>(fabsl(backward - cosl(t)) / unit));
    }
  std::printf("%s %g\n", name, worst);
}

// d cos / d a_i by central differences in long double; with r at its limit the cosine's share is left out.
void check_apex_gradient() {
  const long double a_i = 0.31L, a_k = 0.52L, a_ik = 0.4L, step = 1e-6L, r_k = 1 / sqrtl(2 * a_k);
  const auto cosine = [&](long double a) { return (a + a_k - a_ik) / sqrtl(2 * a) * r_k; };
  const long double slope = (cosine(a_i + step) - cosine(a_i - step)) / (2 * step), r_i = 1 / sqrtl(2 * a_i);
  std::printf("apex_gradient %g\n", static_cast<double>(fabsl(apex_gradient(r_k, cosine(a_i), r_i, r_i) - slope)));
  std::printf("apex_gradient_at_limit %g\n", static_cast<double>(fabsl(apex_gradient(r_k, cosine(a_i), r_i, 0.0L) - r_i * r_k)));
}

// c, at an angle t to a vector of `length`, by central differences in long double.
double stretch_error(long double t, long double length) {
  const auto squared = [&](long double s, int sign) { return s * s + length * length + sign * 2 * s * length * cosl(t); };
  const auto theta = [&](long double s) { return 2 * atan2l(sqrtl(squared(s, -1)), sqrtl(squared(s, 1))); };
  const long double step = 1e-6L, slope = (theta(1 + step) - theta(1 - step)) / (2 * step);
  const Turn got = turn(static_cast<double>(squared(1, -1)), static_cast<double>(squared(1, 1)));
  return static_cast<double>(fabsl(got.stretch - slope));
}

// Unit vectors at angle t to each other; a and b from d theta = 1 as both turn apart.
void check_turn() {
  double worst = 0, worst_slope = 0, worst_stretch = 0;
  for (long double t : {0.0L, 1e-12L, 1e-6L, 0.1L, 1.0L, 2.0L, 3.0L, 3.1415926L, acosl(-1.0L)}) {
    const long double p = 2 * sinl(t / 2), q = 2 * cosl(t / 2);
    const Turn got = turn(static_cast<double>(p * p), static_cast<double>(q * q));
    worst = std::fmax(worst, static_cast<double>(fabsl(got.theta - t) / (t == 0 ? 1 : t)));
    // |d theta / du| = sqrt((a p)^2 + (b q)^2) = 1 for unit vectors, where the angle has a direction to grow.
    const double slope = std::hypot(got.apart * static_cast<double>(p), got.along * static_cast<double>(q));
    if (t > 0 && t < 3.14L) worst_slope = std::fmax(worst_slope, std::fabs(slope - 1));
    for (long double length : {1e-6L, 0.1L, 0.5L, 0.9L})
      if (t < 3.14L) worst_stretch = std::fmax(worst_stretch, stretch_error(t, length));
  }
  std::printf("turn %g\nturn_slope %g\nturn_stretch %g\n", worst, worst_slope, worst_stretch);
  const Turn ends[] = {turn(0, 4), turn(4, 0)};
  std::printf("turn_ends %g %g %g %g\n", ends[0].theta, ends[0].apart, ends[1].theta - acos(-1.0), ends[1].along);
}

int main() {
  check_huber<float>("huber_float");
  check_huber<double>("huber_double");
  check_cosine<float>("cosine_float");
  check_cosine<double>("cosine_double");
  check_apex_gradient();
  check_turn();
  std::printf("edges %g %g %g\n", huber_slope(3.0), huber_slope(-3.0), huber_slope(static_cast<double>(NAN)));
}
