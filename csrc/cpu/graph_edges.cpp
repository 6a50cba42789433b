// Compiled once per instruction set (setup.py: PER_LEVEL). See graph_edges.h for what is computed.
// Memory: each listed row is read once for its value and once, slice by slice, for the sum; sums stay in registers.
#include "cpu/graph_edges.h"

#include "cpu/simd.h"

namespace kdfast {
namespace {

constexpr int kChains = 4;  // independent sums: additions have a latency of about 4

// A vector of C in double: as many lanes, so of float twice the bytes.
template <class C> struct Wide {
  typedef double Vec __attribute__((vector_size(sizeof(double) * Simd<C>::width)));
};
template <class C> KDFAST_INLINE typename Wide<C>::Vec widen(Vec<C> v) {
  return __builtin_convertvector(v, typename Wide<C>::Vec);
}

// term(x, y) summed over the width in vectors of Sum; lanes past the end are 0 in both.
template <class Sum, class S, class Term>
KDFAST_INLINE double reduce(const S* x, const S* y, int64_t width, const Term& term) {
  using C = ComputeOf<S>;
  constexpr int W = Simd<C>::width;
  Sum chains[kChains] = {};
  int64_t d = 0;
  for (; d + kChains * W <= width; d += kChains * W)
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) chains[c] += term(load(x + d + c * W), load(y + d + c * W));
  for (; d + W <= width; d += W) chains[0] += term(load(x + d), load(y + d));
  if (d < width) chains[1] += term(load_tail(x + d, width - d, C(0)), load_tail(y + d, width - d, C(0)));
  const Sum all = (chains[0] + chains[1]) + (chains[2] + chains[3]);
  double total = 0;
  for (int i = 0; i < W; ++i) total += all[i];
  return total;
}

template <class S> KDFAST_INLINE double exact_dot(const S* x, const S* y, int64_t width) {
  using C = ComputeOf<S>;
  return reduce<typename Wide<C>::Vec>(x, y, width, [](Vec<C> a, Vec<C> b) __attribute__((always_inline)) {
    return widen<C>(a) * widen<C>(b);
  });
}

template <class S> double square(const void* x, int64_t width) {
  return exact_dot(static_cast<const S*>(x), static_cast<const S*>(x), width);
}

template <class S> void dots(const void* x, const void* const* ys, int64_t count, int64_t width, double* values) {
  using C = ComputeOf<S>;
  for (int64_t e = 0; e < count; ++e)
    values[e] = reduce<Vec<C>>(static_cast<const S*>(x), static_cast<const S*>(ys[e]), width,
                               [](Vec<C> a, Vec<C> b) __attribute__((always_inline)) { return a * b; });
}

template <class S>
void squared_distances(const void* x, const void* const* ys, int64_t count, int64_t width, double* values) {
  using C = ComputeOf<S>;
  for (int64_t e = 0; e < count; ++e)
    values[e] = reduce<typename Wide<C>::Vec>(static_cast<const S*>(x), static_cast<const S*>(ys[e]), width,
                                              [](Vec<C> a, Vec<C> b) __attribute__((always_inline)) {
                                                const auto difference = widen<C>(a) - widen<C>(b);
                                                return difference * difference;
                                              });
}

// The sum over `slice` vectors of the width from `d` on, the last of them `tail` lanes long where that is not 0.
template <bool differences, int slice, bool tail, class S, class C = ComputeOf<S>>
KDFAST_INLINE void sum_slice(const S* x, const void* const* ys, const double* weights, int64_t count, int64_t d,
                             int64_t lanes, C* sum) {
  constexpr int W = Simd<C>::width;
  const auto read = [&](const S* row, int v) __attribute__((always_inline)) {
    if constexpr (tail) return load_tail(row + d, lanes, C(0));
    else return load(row + d + v * W);
  };
  Vec<C> sums[slice] = {}, own[slice];
#pragma GCC unroll 4
  for (int v = 0; v < slice; ++v) own[v] = differences ? read(x, v) : Vec<C>{};
  for (int64_t e = 0; e < count; ++e) {
    const S* y = static_cast<const S*>(ys[e]);
    const Vec<C> weight = broadcast<C>(static_cast<C>(weights[e]));
#pragma GCC unroll 4
    for (int v = 0; v < slice; ++v) sums[v] += weight * (differences ? own[v] - read(y, v) : read(y, v));
  }
#pragma GCC unroll 4
  for (int v = 0; v < slice; ++v) {
    if constexpr (tail) store_tail(sum + d, lanes, sums[v]);
    else store(sum + d + v * W, sums[v]);
  }
}

template <class S, bool differences>
void sum(const void* x, const void* const* ys, const double* weights, int64_t count, int64_t width, void* out) {
  using C = ComputeOf<S>;
  constexpr int W = Simd<C>::width, slice = 4;
  const S* own = static_cast<const S*>(x);
  C* total = static_cast<C*>(out);
  int64_t d = 0;
  for (; d + slice * W <= width; d += slice * W)
    sum_slice<differences, slice, false>(own, ys, weights, count, d, 0, total);
  for (; d + W <= width; d += W) sum_slice<differences, 1, false>(own, ys, weights, count, d, 0, total);
  if (d < width) sum_slice<differences, 1, true>(own, ys, weights, count, d, width - d, total);
}

template <class S>
void finish(const void* x, const void* sum, int64_t width, double scale, double inverse_square, void* grad) {
  using C = ComputeOf<S>;
  constexpr int W = Simd<C>::width;
  const S* row = static_cast<const S*>(x);
  const C* total = static_cast<const C*>(sum);
  S* out = static_cast<S*>(grad);
  double along = 0;
  if (inverse_square != 0) {
    Vec<C> lanes{};
    int64_t d = 0;
    for (; d + W <= width; d += W) lanes += load(row + d) * load(total + d);
    if (d < width) lanes += load_tail(row + d, width - d, C(0)) * load_tail(total + d, width - d, C(0));
    along = sum_lanes<C>(lanes) * inverse_square;
  }
  const Vec<C> a = broadcast<C>(static_cast<C>(scale)), b = broadcast<C>(static_cast<C>(along));
  int64_t d = 0;
  for (; d + W <= width; d += W) store(out + d, a * (load(total + d) - b * load(row + d)));
  if (d < width)
    store_tail(out + d, width - d,
               a * (load_tail(total + d, width - d, C(0)) - b * load_tail(row + d, width - d, C(0))));
}

}  // namespace

namespace KDFAST_LEVEL {
#define KDFAST_STORAGES(function) {function<float>, function<double>, function<Half>, function<BFloat16>}
extern const GraphEdges graph_edges = {
    KDFAST_STORAGES(square),
    KDFAST_STORAGES(dots),
    KDFAST_STORAGES(squared_distances),
    {sum<float, false>, sum<double, false>, sum<Half, false>, sum<BFloat16, false>},
    {sum<float, true>, sum<double, true>, sum<Half, true>, sum<BFloat16, true>},
    KDFAST_STORAGES(finish),
};
}  // namespace KDFAST_LEVEL

}  // namespace kdfast
