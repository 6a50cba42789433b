// The cosine of the angle ijk at the apex j from half squared distances alone, and its derivatives.
//
// With a_i = |x_i - x_j|^2 / 2, a_k likewise, a_ik = |x_i - x_k|^2 / 2 and r = 1 / max(|x - x_j|, 1e-12), or 0 where the
// rows coincide: <x_i - x_j, x_k - x_j> = a_i + a_k - a_ik, so
//     cos = (a_i + a_k - a_ik) r_i r_k,
//     d cos / d a_ik = -r_i r_k,     d cos / d a_i = r_i (r_k - cos r_i), without the cos where r is at its limit.
// Halves, because then d a / d x = x_i - x_j: no factor of 2 anywhere.
#pragma once

#include "math/host_device.h"

namespace kdfast {
namespace math {

// Smallest norm that differences are divided by, as in torch.nn.functional.normalize.
constexpr double kSmallestNorm = 1e-12;

// cos / r_k, with along_i = a_i r_i. Error of the cosine: at most 3 eps times max(d_i / d_k, d_k / d_i), because a_i - a_ik
// cancels where k is much nearer to j than i is.
template <class T> KDFAST_HOST_DEVICE T cosine_over_r(T a_k, T a_ik, T r_i, T along_i) {
  return (a_k - a_ik) * r_i + along_i;
}

// dL/da_i of one apex from the sums over k of g r_k and of g cos, g = dL/dcos. `r_bent`: r, or 0 where r is at its limit.
template <class T> KDFAST_HOST_DEVICE T apex_gradient(T sum_g_r, T sum_g_cos, T r, T r_bent) {
  return r * sum_g_r - r_bent * (r_bent * sum_g_cos);
}

}  // namespace math
}  // namespace kdfast
