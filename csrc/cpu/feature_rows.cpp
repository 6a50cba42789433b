// Compiled once per instruction set (setup.py: PER_LEVEL). See feature_rows.h for what is computed.
// Memory: a map is read once for its sums, and once more, from cache, for its gradient, which is written once. A pooled
// map is not read again: its pooled values are kept. Arithmetic is a few operations an element but for powers other than
// 1, 2 and 3, which take a logarithm and an exponential.
#include "cpu/feature_rows.h"

#include "cpu/simd.h"

namespace kdfast {
namespace {

template <class S> struct Gradient { using type = S; };
template <> struct Gradient<Half> { using type = float; };
template <class S> using GradientOf = typename Gradient<S>::type;

template <class C> KDFAST_INLINE Vec<C> magnitude(Vec<C> x) { return x < C(0) ? -x : x; }

// x^p for x >= 0, 0 for 0 whatever p is.
template <class C> KDFAST_INLINE Vec<C> power_of(Vec<C> x, C p) {
  const Vec<C> log = x == broadcast<C>(C(__builtin_inf())) ? x : log_positive<C>(x);
  const Vec<C> y = log * C(1.4426950408889634074 * p);  // log2(x^p)
  const Vec<C> e = exp2_nonpositive<C>(y > C(0) ? -y : y);
  return x == C(0) ? Vec<C>{} : (y > C(0) ? C(1) / e : e);
}

// Powers with a form of their own.
enum class Exponent { one, two, three, any };

template <Exponent exponent, class S> KDFAST_INLINE void sum_powers(const S* map, const MapSize& size, double p, ComputeOf<S>* a) {
  using C = ComputeOf<S>;
  const int64_t pixels = size.pixels();
  for (int64_t i = 0; i < pixels; ++i) a[i] = 0;
  for (int64_t c = 0; c < size.channels; ++c)
    each_vector<C>(pixels, [&](int64_t i, auto extent) __attribute__((always_inline)) {
      const Vec<C> f = read(extent, map + c * pixels, i, pixels, C(0));
      Vec<C> term = magnitude<C>(f);
      if constexpr (exponent == Exponent::two) term = f * f;
      if constexpr (exponent == Exponent::three) term *= f * f;
      if constexpr (exponent == Exponent::any) term = power_of<C>(term, C(p));
      write(extent, a, i, pixels, read(extent, a, i, pixels, C(0)) + term);
    });
}

template <class S> void power(const void* map, const MapSize& size, double p, void* a) {
  const S* f = static_cast<const S*>(map);
  ComputeOf<S>* sums = static_cast<ComputeOf<S>*>(a);
  if (p == 2) sum_powers<Exponent::two, S>(f, size, p, sums);
  else if (p == 1) sum_powers<Exponent::one, S>(f, size, p, sums);
  else if (p == 3) sum_powers<Exponent::three, S>(f, size, p, sums);
  else sum_powers<Exponent::any, S>(f, size, p, sums);
}

template <Exponent exponent, class S>
KDFAST_INLINE void power_slopes(const S* map, const MapSize& size, double p, const ComputeOf<S>* k, GradientOf<S>* out,
                                bool streamed) {
  using C = ComputeOf<S>;
  const int64_t pixels = size.pixels();
  for (int64_t c = 0; c < size.channels; ++c) {
    const bool aligned = before_stream(out + c * pixels, pixels) == 0;
    each_vector<C>(pixels, [&](int64_t i, auto extent) __attribute__((always_inline)) {
      const Vec<C> f = read(extent, map + c * pixels, i, pixels, C(0));
      Vec<C> slope = f;
      if constexpr (exponent == Exponent::one) slope = f > C(0) ? broadcast<C>(1) : (f < C(0) ? broadcast<C>(-1) : f);
      if constexpr (exponent == Exponent::three) slope = f * magnitude<C>(f);
      if constexpr (exponent == Exponent::any) {
        const Vec<C> size_of_slope = power_of<C>(magnitude<C>(f), C(p - 1));
        slope = f < C(0) ? -size_of_slope : size_of_slope;
      }
      write(extent, out + c * pixels, i, pixels, slope * read(extent, k, i, pixels, C(0)), streamed && aligned);
    });
  }
  if (streamed) stream_fence();
}

template <class S>
void power_grad(const void* map, const MapSize& size, double p, const void* k, void* out, bool streamed) {
  const S* f = static_cast<const S*>(map);
  const ComputeOf<S>* slopes = static_cast<const ComputeOf<S>*>(k);
  GradientOf<S>* grad = static_cast<GradientOf<S>*>(out);
  if (p == 2) power_slopes<Exponent::two, S>(f, size, p, slopes, grad, streamed);
  else if (p == 1) power_slopes<Exponent::one, S>(f, size, p, slopes, grad, streamed);
  else if (p == 3) power_slopes<Exponent::three, S>(f, size, p, slopes, grad, streamed);
  else power_slopes<Exponent::any, S>(f, size, p, slopes, grad, streamed);
}

// Bin b of n out of m elements: [begin, end), as PyTorch's adaptive pooling cuts them; neighbours may share an element.
KDFAST_INLINE int64_t bin_begin(int64_t b, int64_t n, int64_t m) { return b * m / n; }
KDFAST_INLINE int64_t bin_end(int64_t b, int64_t n, int64_t m) { return ((b + 1) * m + n - 1) / n; }

template <class S> void pool(const void* map, const MapSize& from, const MapSize& to, void* pooled) {
  using C = ComputeOf<S>;
  const S* plane = static_cast<const S*>(map);
  C* out = static_cast<C*>(pooled);
  constexpr int64_t kColumns = 512;  // of the bins' rows summed at a time
  C sums[kColumns];
  for (int64_t c = 0; c < from.channels; ++c, plane += from.pixels())
    for (int64_t y = 0; y < to.height; ++y, out += to.width) {
      const int64_t top = bin_begin(y, to.height, from.height), bottom = bin_end(y, to.height, from.height);
      for (int64_t x = 0; x < to.width; ++x) out[x] = 0;
      int64_t x = 0;  // the first bin that may have elements beyond those summed
      for (int64_t first = 0; first < from.width; first += kColumns) {
        const int64_t n = from.width - first < kColumns ? from.width - first : kColumns;
        each_vector<C>(n, [&](int64_t i, auto extent) __attribute__((always_inline)) {
          Vec<C> sum{};
          for (int64_t row = top; row < bottom; ++row) sum += read(extent, plane + row * from.width + first, i, n, C(0));
          write(extent, sums, i, n, sum);
        });
        if (n == from.width && n == 2 * to.width) {  // the common case, without the divisions that find a bin's ends
          for (int64_t bin = 0; bin < to.width; ++bin) out[bin] = sums[2 * bin] + sums[2 * bin + 1];
          break;
        }
        for (int64_t bin = x; bin < to.width; ++bin) {
          int64_t left = bin_begin(bin, to.width, from.width), right = bin_end(bin, to.width, from.width);
          if (left >= first + n) break;
          left = left < first ? first : left;
          if (right <= first + n) x = bin + 1; else right = first + n;
          for (int64_t i = left; i < right; ++i) out[bin] += sums[i - first];
        }
      }
      if (from.width == 2 * to.width) {
        const C area = C(2 * (bottom - top));
        for (int64_t bin = 0; bin < to.width; ++bin) out[bin] /= area;
        continue;
      }
      for (int64_t bin = 0; bin < to.width; ++bin)
        out[bin] /= C((bottom - top) * (bin_end(bin, to.width, from.width) - bin_begin(bin, to.width, from.width)));
    }
}

KDFAST_INLINE void put(float* p, float v) { *p = v; }
KDFAST_INLINE void put(double* p, double v) { *p = v; }
KDFAST_INLINE void put(BFloat16* p, float v) { store_tail(p, 1, broadcast<float>(v)); }

// The rows of a map that lie in the same bins have the same gradient: it is made once for them.
template <class S> void pool_grad(const void* pooled, const MapSize& from, const MapSize& to, void* out) {
  using C = ComputeOf<S>;
  using G = GradientOf<S>;
  const C* plane = static_cast<const C*>(pooled);
  G* grad = static_cast<G*>(out);
  for (int64_t c = 0; c < from.channels; ++c, plane += to.pixels()) {
    int64_t first_bin = 0, made_first = -1, made_last = -1;
    const G* made = nullptr;
    for (int64_t row = 0; row < from.height; ++row, grad += from.width) {
      while (bin_end(first_bin, to.height, from.height) <= row) ++first_bin;
      int64_t last_bin = first_bin + 1;
      while (last_bin < to.height && bin_begin(last_bin, to.height, from.height) <= row) ++last_bin;
      if (first_bin == made_first && last_bin == made_last) {
        std::memcpy(grad, made, from.width * sizeof(G));
        continue;
      }
      made = grad, made_first = first_bin, made_last = last_bin;
      int64_t first_x = 0;
      for (int64_t column = 0; column < from.width; ++column) {
        while (bin_end(first_x, to.width, from.width) <= column) ++first_x;
        C sum = 0;
        for (int64_t y = first_bin; y < last_bin; ++y)
          for (int64_t x = first_x; x < to.width && bin_begin(x, to.width, from.width) <= column; ++x)
            sum += plane[y * to.width + x] /
                   C((bin_end(y, to.height, from.height) - bin_begin(y, to.height, from.height)) *
                     (bin_end(x, to.width, from.width) - bin_begin(x, to.width, from.width)));
        put(grad + column, sum);
      }
    }
  }
}

template <bool masked, class S>
KDFAST_INLINE double mse_block(const S* s, const S* t, const bool* keep, int64_t n, double slope, GradientOf<S>* out,
                               bool streamed) {
  using C = ComputeOf<S>;
  const bool aligned = before_stream(out, n) == 0;
  Vec<C> sum{};
  each_vector<C>(n, [&](int64_t i, auto extent) __attribute__((always_inline)) {
    Vec<C> d = read(extent, s, i, n, C(0)) - read(extent, t, i, n, C(0));
    if constexpr (masked) {
      C kept[Simd<C>::width] = {};
      const int64_t lanes = n - i < Simd<C>::width ? n - i : Simd<C>::width;
      for (int64_t l = 0; l < lanes; ++l) kept[l] = C(keep[i + l]);
      d = load(kept) == C(0) ? Vec<C>{} : d;  // what is left out may be NaN
    }
    sum += d * d;
    if (out) write(extent, out, i, n, d * C(slope), streamed && aligned);
  });
  if (streamed) stream_fence();
  return sum_lanes<C>(sum);
}

template <class S>
double mse(const void* student, const void* teacher, const bool* keep, int64_t n, double slope, void* out, bool streamed) {
  const S *s = static_cast<const S*>(student), *t = static_cast<const S*>(teacher);
  GradientOf<S>* grad = static_cast<GradientOf<S>*>(out);
  return keep ? mse_block<true>(s, t, keep, n, slope, grad, streamed)
              : mse_block<false>(s, t, keep, n, slope, grad, streamed);
}

}  // namespace

namespace KDFAST_LEVEL {
#define KDFAST_STORAGES(function) {function<float>, function<double>, function<Half>, function<BFloat16>}
extern const FeatureKernels feature_kernels = {KDFAST_STORAGES(power), KDFAST_STORAGES(power_grad), KDFAST_STORAGES(pool),
                                               KDFAST_STORAGES(pool_grad), KDFAST_STORAGES(mse)};
}  // namespace KDFAST_LEVEL

}  // namespace kdfast
