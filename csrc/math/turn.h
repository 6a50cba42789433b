// The angle between two vectors from their unit vectors u and v, and its gradient: accurate at every angle, finite at 0
// and pi, where the arccosine of <u, v> has no digits and an infinite slope.
//
//     theta = 2 atan2(p, q),     p = |u - v|, q = |u + v|
//     d theta / du = a (u - v) - b (u + v),     d theta / dv = -a (u - v) - b (u + v)
//     a = 2 q / (p (p^2 + q^2)),  b = 2 p / (q (p^2 + q^2)),  0 where p or q is 0: there the angle has no direction to grow
// Error of theta: at most 4e-16 of it. Vectors need not be quite of length 1 (those shorter than kSmallestNorm are not).
#pragma once

#include <cmath>

#include "math/host_device.h"

namespace kdfast {
namespace math {

struct Turn {
  double theta, apart, along;  // a and b above
};

KDFAST_HOST_DEVICE Turn turn(double apart_squared, double along_squared) {
  const double p = std::sqrt(apart_squared), q = std::sqrt(along_squared), sum = apart_squared + along_squared;
  return {2 * std::atan2(p, q), p == 0 ? 0 : 2 * q / (p * sum), q == 0 ? 0 : 2 * p / (q * sum)};
}

}  // namespace math
}  // namespace kdfast
