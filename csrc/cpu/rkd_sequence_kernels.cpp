// Compiled once per instruction set (setup.py: PER_LEVEL). See rkd_sequence_kernels.h for what is computed.
#include "cpu/rkd_sequence_kernels.h"

#include "cpu/simd.h"

namespace kdfast {
namespace {

template <class C> TwoSums steps(const C* x0, const C* x1, const C* x2, int64_t width) {
  Vec<C> first = {}, second = {};
  for (int64_t d = 0; d < width; d += Simd<C>::width) {
    const Vec<C> x = load(x0 + d), u = load(x1 + d) - x, v = load(x2 + d) - x;
    first += u * u, second += v * v;
  }
  return {sum_lanes<C>(first), sum_lanes<C>(second)};
}

template <class C>
TwoSums turns(const C* x0, const C* x1, const C* x2, int64_t width, C norm_u, C norm_v) {
  Vec<C> apart = {}, along = {};
  for (int64_t d = 0; d < width; d += Simd<C>::width) {
    const Vec<C> x = load(x0 + d), u = (load(x1 + d) - x) / norm_u, v = (load(x2 + d) - x) / norm_v;
    apart += (u - v) * (u - v), along += (u + v) * (u + v);
  }
  return {sum_lanes<C>(apart), sum_lanes<C>(along)};
}

template <class C>
void pull(const C* x0, const C* x1, const C* x2, int64_t width, C norm_u, C norm_v, C apart, C along, C stretch_u,
          C stretch_v, C* g0, C* g1, C* g2) {
  const C inverse_u = 1 / norm_u, inverse_v = 1 / norm_v;
  for (int64_t d = 0; d < width; d += Simd<C>::width) {
    const Vec<C> x = load(x0 + d), u = (load(x1 + d) - x) / norm_u, v = (load(x2 + d) - x) / norm_v;
    const Vec<C> off = (u - v) * apart, with = (u + v) * along;
    const Vec<C> of_u = (off - with - u * stretch_u) * inverse_u, of_v = (-off - with - v * stretch_v) * inverse_v;
    store(g0 + d, load(g0 + d) - (of_u + of_v));
    store(g1 + d, load(g1 + d) + of_u);
    store(g2 + d, load(g2 + d) + of_v);
  }
}

}  // namespace

namespace KDFAST_LEVEL {
extern const RkdSequenceTables rkd_sequence_tables = {{&steps<float>, &turns<float>, &pull<float>},
                                                      {&steps<double>, &turns<double>, &pull<double>}};
}  // namespace KDFAST_LEVEL

}  // namespace kdfast
