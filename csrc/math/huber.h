// Huber's function with beta 1, PyTorch's smooth_l1: h(e) = e^2 / 2 for |e| <= 1, |e| - 1/2 beyond.
#pragma once

#include "math/host_device.h"

namespace kdfast {
namespace math {

// h'(e) = e cut to [-1, 1]. Exact. NaN stays NaN.
template <class T> KDFAST_HOST_DEVICE T huber_slope(T e) { return e > T(1) ? T(1) : e < T(-1) ? T(-1) : e; }

// h(e) from its slope g: g (e - g / 2), one formula on both sides of the bend. Two roundings: at most 1.5 ulp.
template <class T, class C> KDFAST_HOST_DEVICE T huber(T e, T slope, C half) { return slope * (e - half * slope); }
template <class T> KDFAST_HOST_DEVICE T huber(T e) { return huber(e, huber_slope(e), T(0.5)); }

}  // namespace math
}  // namespace kdfast
