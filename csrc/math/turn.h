// The angle between two vectors from their unit vectors u and v, and its gradient: accurate at every angle, finite at 0
// and pi, where the arccosine of <u, v> has no digits and an infinite slope.
//
//     theta = 2 atan2(p, q),     p = |u - v|, q = |u + v|
//     d theta / du = a (u - v) - b (u + v),     d theta / dv = -a (u - v) - b (u + v)
//     a = 2 q / (p (p^2 + q^2)),  b = 2 p / (q (p^2 + q^2)),  0 where p or q is 0: there the angle has no direction to grow
// Where both have length 1 these are across u and v: the norms that made them so take nothing off. What is shorter than
// kSmallestNorm is divided by that, a constant, and stays shorter than 1; the gradient of the other vector, of length 1,
// then has a share along itself, which its norm takes off:
//     <d theta / du, u> = c = a (1 - <u, v>) - b (1 + <u, v>),  <u, v> = (q^2 - p^2) / 4,  c too for a v of length 1
// Error of theta: at most 4e-16 of it.
#pragma once

#include <cmath>

#include "math/host_device.h"

namespace kdfast {
namespace math {

struct Turn {
  double theta, apart, along, stretch;  // a, b and c above
};

KDFAST_HOST_DEVICE Turn turn(double apart_squared, double along_squared) {
  const double p = std::sqrt(apart_squared), q = std::sqrt(along_squared), sum = apart_squared + along_squared;
  const double a = p == 0 ? 0 : 2 * q / (p * sum), b = q == 0 ? 0 : 2 * p / (q * sum);
  const double inner = (along_squared - apart_squared) / 4;
  return {2 * std::atan2(p, q), a, b, a * (1 - inner) - b * (1 + inner)};
}

}  // namespace math
}  // namespace kdfast
