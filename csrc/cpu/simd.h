// Vectors by the compiler's own vector extension: one source, as wide as the level it is compiled for.
//
// Everything here is in an unnamed namespace and inlined: a symbol shared between levels could be resolved by the
// linker to the AVX-512 copy and fault on a machine without it.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define KDFAST_INLINE inline __attribute__((always_inline))

// Storage types of the half formats: their bits. Arithmetic happens in float.
struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

template <class S> struct Compute { using type = float; };
template <> struct Compute<double> { using type = double; };

template <class C> struct Simd;

template <> struct Simd<float> {
  static constexpr int width = kVectorBytes / 4;
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t UInt __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));
  static constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the mantissa's low bits
  // 2^r - 1 over r, smallest largest relative error of 2^r (Remez): 1.6e-9 for |r| <= 1/32, 2.6e-9 for |r| <= 1/2.
#if defined(__AVX512F__)
  // Bits of 2^(j / 16), less the j * 2^19 that are added with k * 2^19 for k = j mod 16.
  static constexpr uint32_t exp2_steps[] = {
      0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
      0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
  static constexpr float exp2_terms[] = {0.693147182667f, 0.240234288014f, 0.0555021365025f};
#else
  static constexpr uint32_t exp2_steps[] = {0x3f800000};
  static constexpr float exp2_terms[] = {0.693147214968f,  0.240226527829f,   0.0555031055101f,
                                         0.00961769297299f, 0.00134066439024f, 0.000155946781663f};
#endif
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int log_terms = 5, mantissa = 23;
  static constexpr int32_t sqrt_half_bits = 0x3f3504f3;
  static constexpr float smallest_normal = 0x1p-126f;
  static constexpr int32_t bias = 127;
};

template <> struct Simd<double> {
  static constexpr int width = kVectorBytes / 8;
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t UInt __attribute__((vector_size(kVectorBytes)));
  static constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
#if defined(__AVX512F__)
  static constexpr uint64_t exp2_steps[] = {  // of 2^(j / 8), less j * 2^49
      0x3ff0000000000000, 0x3fef72b83c7d517b, 0x3fef06fe0a31b715, 0x3feebfdad5362a27,
      0x3feea09e667f3bcd, 0x3feeace5422aa0db, 0x3feee89f995ad3ad, 0x3fef5818dcfba487};
  static constexpr double exp2_terms[] = {  // 2.8e-18
      0.69314718055994531811,   0.24022650695911516039,   0.055504108664802357744,   0.0096181290851788485839,
      0.0013333558238922776175, 0.00015404521943885496727, 0.000015251844767898281727};
#else
  static constexpr uint64_t exp2_steps[] = {0x3ff0000000000000};
  static constexpr double exp2_terms[] = {  // 1.8e-17
      0.69314718055994569675,    0.24022650695910098007,    0.055504108664790394552,   0.0096181291076070023796,
      0.0013333558153439964747,  0.0001540353044157213033,  0.000015252727385193868197, 1.3215442675329822143e-6,
      1.0180647659234138888e-7,  7.0725704128144235096e-9,  4.078071929588336665e-10};
#endif
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr int log_terms = 11, mantissa = 52;
  static constexpr int64_t sqrt_half_bits = 0x3fe6a09e667f3bcd;
  static constexpr double smallest_normal = 0x1p-1022;
  static constexpr int64_t bias = 1023;
};

template <class C> using Vec = typename Simd<C>::Vec;

template <class C> KDFAST_INLINE Vec<C> broadcast(C value) { return value - Vec<C>{}; }

template <class To, class From> KDFAST_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Full vectors from and to memory of any alignment.
template <class C> KDFAST_INLINE Vec<C> load(const C* p) {
  Vec<C> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class C> KDFAST_INLINE void store(C* p, Vec<C> v) { std::memcpy(p, &v, sizeof(v)); }

KDFAST_INLINE Simd<float>::UInt load_bits(const void* p) {
  Simd<float>::Bits16 bits;
  std::memcpy(&bits, p, sizeof(bits));
  return __builtin_convertvector(bits, Simd<float>::UInt);
}
KDFAST_INLINE void store_bits(void* p, Simd<float>::UInt wide) {
  const auto bits = __builtin_convertvector(wide, Simd<float>::Bits16);
  std::memcpy(p, &bits, sizeof(bits));
}

KDFAST_INLINE Vec<float> load(const BFloat16* p) { return bit_cast<Vec<float>>(load_bits(p) << 16); }

KDFAST_INLINE void store(BFloat16* p, Vec<float> v) {
  const auto bits = bit_cast<Simd<float>::UInt>(v);
  const auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  store_bits(p, v == v ? rounded : rounded * 0 + 0x7fc0);           // a NaN must not round up into infinity
}

KDFAST_INLINE Vec<float> load(const Half* p) {
  using UInt = Simd<float>::UInt;
  const UInt bits = load_bits(p);
  const UInt sign = (bits & 0x8000) << 16;
  const UInt magnitude = (bits & 0x7fff) << 13;
  // Exponent and mantissa are in place but for the bias: 2^112 moves it, and normalises subnormals on the way.
  const auto finite = bit_cast<UInt>(bit_cast<Vec<float>>(magnitude) * 0x1p112f);
  const UInt special = magnitude | 0x7f800000;  // inf and NaN keep their mantissa
  return bit_cast<Vec<float>>(((bits & 0x7c00) == 0x7c00 ? special : finite) | sign);
}

KDFAST_INLINE void store(Half* p, Vec<float> v) {
  using UInt = Simd<float>::UInt;
  const UInt bits = bit_cast<UInt>(v);
  const UInt sign = (bits >> 16) & 0x8000;
  const UInt magnitude = bits & 0x7fffffff;
  // Normal halves: rebias, round to nearest even at bit 13 (may carry into the exponent, up to infinity).
  const UInt normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal halves: adding 0.5 lets the float adder round at the right bit.
  const UInt subnormal = bit_cast<UInt>(bit_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000;
  const UInt infinity = normal * 0 + 0x7c00, nan = normal * 0 + 0x7e00;
  UInt half = magnitude < 0x38800000 ? subnormal : normal;  // below 2^-14
  half = magnitude >= 0x477ff000 ? infinity : half;         // 65520 and up round to infinity
  half = magnitude > 0x7f800000 ? nan : half;
  store_bits(p, half | sign);
}

// `n` elements, 0 < n < width, the rest `fill`: keeps a row's tail on the same code path as its body.
template <class S, class C> KDFAST_INLINE Vec<C> load_tail(const S* p, int64_t n, C fill) {
  if (n < 1 || n >= Simd<C>::width) __builtin_unreachable();
  S padded[Simd<C>::width] = {};
  std::memcpy(padded, p, n * sizeof(S));
  C wide[Simd<C>::width];
  store(wide, load(padded));
  for (int64_t i = n; i < Simd<C>::width; ++i) wide[i] = fill;
  return load(wide);
}
template <class S, class V> KDFAST_INLINE void store_tail(S* p, int64_t n, V v) {
  constexpr int64_t width = sizeof(V) / sizeof(typename Compute<S>::type);
  if (n < 1 || n >= width) __builtin_unreachable();
  S padded[width];
  store(padded, v);
  std::memcpy(p, padded, n * sizeof(S));
}
#if defined(__AVX512F__)
// Masked memory operations: a short row is mostly tail, and the copies above cost more than its arithmetic.
KDFAST_INLINE Vec<float> load_tail(const float* p, int64_t n, float fill) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << n) - 1), p);
}
KDFAST_INLINE Vec<double> load_tail(const double* p, int64_t n, double fill) {
  return _mm512_mask_loadu_pd(_mm512_set1_pd(fill), static_cast<__mmask8>((1u << n) - 1), p);
}
KDFAST_INLINE void store_tail(float* p, int64_t n, Vec<float> v) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
}
KDFAST_INLINE void store_tail(double* p, int64_t n, Vec<double> v) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), v);
}
#endif

// A store that passes by the caches, for what nobody will read while it would be in them: the line is not read before it
// is written. `p` is a multiple of the stored vector's size; `stream_fence` before anyone else looks.
template <class S, class V> KDFAST_INLINE void stream(S* p, V v) {
  constexpr int bytes = sizeof(V) / sizeof(typename Compute<S>::type) * sizeof(S);
  alignas(bytes) S lanes[bytes / sizeof(S)];
  store(lanes, v);
#if defined(__AVX512F__)
  if constexpr (bytes == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_load_si512(lanes));
#endif
#if defined(__AVX2__)
  if constexpr (bytes == 32)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_load_si256(reinterpret_cast<__m256i*>(lanes)));
#endif
#if defined(__SSE2__)
  if constexpr (bytes == 16)
    return _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm_load_si128(reinterpret_cast<__m128i*>(lanes)));
#endif
  store(p, v);
}
KDFAST_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
// Elements before the first that `stream` takes, at most n.
template <class S> KDFAST_INLINE int64_t before_stream(const S* p, int64_t n) {
  constexpr uintptr_t bytes = Simd<typename Compute<S>::type>::width * sizeof(S);
  const int64_t head = (bytes - reinterpret_cast<uintptr_t>(p) % bytes) % bytes / sizeof(S);
  return head < n ? head : n;
}

template <class V> KDFAST_INLINE V max(V a, V b) { return a > b ? a : b; }

// exp2_steps[i mod their number]: one step, or as many as fill a register (in the form for which GCC 12 does not warn of
// its own header).
#if defined(__AVX512F__)
KDFAST_INLINE Simd<float>::UInt step_bits(Simd<float>::UInt i) {
  const __m512i steps = _mm512_loadu_si512(Simd<float>::exp2_steps);
  return bit_cast<Simd<float>::UInt>(_mm512_maskz_permutexvar_epi32(0xffff, bit_cast<__m512i>(i), steps));
}
KDFAST_INLINE Simd<double>::UInt step_bits(Simd<double>::UInt i) {
  const __m512i steps = _mm512_loadu_si512(Simd<double>::exp2_steps);
  return bit_cast<Simd<double>::UInt>(_mm512_maskz_permutexvar_epi64(0xff, bit_cast<__m512i>(i), steps));
}
#else
KDFAST_INLINE Simd<float>::UInt step_bits(Simd<float>::UInt i) { return i * 0 + Simd<float>::exp2_steps[0]; }
KDFAST_INLINE Simd<double>::UInt step_bits(Simd<double>::UInt i) { return i * 0 + Simd<double>::exp2_steps[0]; }
#endif

// 2^x for x <= 0 or NaN; relative error at most 2 ulp (1.0 measured with FMA, 1.3 without: tests/ops/test_simd.py),
// 0 where the result is subnormal.
template <class C> KDFAST_INLINE Vec<C> exp2_nonpositive(Vec<C> x) {
  using M = Simd<C>;
  using UInt = typename M::UInt;  // of inputs far below, which are masked out, it wraps
  constexpr int terms = sizeof(M::exp2_terms) / sizeof(C), steps = sizeof(M::exp2_steps) / sizeof(C);
  constexpr int shift = M::mantissa - __builtin_ctz(steps);
  // x = k / steps + r, exact; k is in the low bits of `shifted`. Below the lowest masked out at the end.
  const Vec<C> shifted = x + M::magic / steps, r = x - (shifted - M::magic / steps);
  Vec<C> sum = broadcast<C>(M::exp2_terms[terms - 1]);
#pragma GCC unroll 16
  for (int k = terms - 2; k >= 0; --k) sum = sum * r + M::exp2_terms[k];
  const UInt k = bit_cast<UInt>(shifted);
  const Vec<C> power = bit_cast<Vec<C>>(step_bits(k) + (k << shift));  // 2^(k / steps)
  // A step is rounded already: its product with something near 1 would be rounded once more than this sum.
  const Vec<C> result = steps == 1 ? power * (r * sum + C(1)) : power * (r * sum) + power;
  return x < broadcast<C>(C(1 - M::bias)) ? Vec<C>{} : result;
}

// log(x) for finite x >= 0 or NaN; relative error at most 2 ulp (tests/ops/test_simd.py). Below the smallest normal
// number, 0 included, it is the logarithm of that: here x weighs the result, so the difference vanishes.
template <class C> KDFAST_INLINE Vec<C> log_positive(Vec<C> x) {
  using M = Simd<C>;
  using Int = typename M::Int;
  const Vec<C> smallest = broadcast<C>(M::smallest_normal);
  const Vec<C> safe = x < smallest ? smallest : x;
  // x = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)): subtract the bits of sqrt(1/2), keep the exponent.
  const Int bits = bit_cast<Int>(safe);
  const Int n = (bits - M::sqrt_half_bits) >> M::mantissa;
  const Vec<C> f = bit_cast<Vec<C>>(bits - (n << M::mantissa)) - C(1);
  // log(1 + f) = 2 atanh(z) = f - z (f - z^2 (2/3 + 2/5 z^2 + ...)), z = f / (2 + f): f itself is exact.
  const Vec<C> z = f / (f + C(2)), z2 = z * z;
  Vec<C> series = broadcast<C>(C(2.0 / (2 * M::log_terms + 1)));
#pragma GCC unroll 16
  for (int k = M::log_terms - 1; k >= 1; --k) series = series * z2 + C(2.0 / (2 * k + 1));
  const Vec<C> exponent = __builtin_convertvector(n, Vec<C>);
  const Vec<C> low = exponent * M::ln2_low - z * (f - z2 * series);
  const Vec<C> result = exponent * M::ln2_high + (f + low);
  return x == x ? result : x;
}

// log(1 + e) for e in [0, 1] or NaN; relative error at most 2 ulp (tests/ops/test_simd.py).
template <class C> KDFAST_INLINE Vec<C> log1p_unit(Vec<C> e) {
  // 2 atanh(z) with z = e / (2 + e) <= 1/3: 2 z (1 + z^2/3 + z^4/5 + ...).
  constexpr int kTerms = sizeof(C) == 4 ? 8 : 17;
  const Vec<C> z = e / (e + C(2)), z2 = z * z;
  Vec<C> series = broadcast<C>(C(2.0 / (2 * kTerms + 1)));
#pragma GCC unroll 32
  for (int k = kTerms - 1; k >= 1; --k) series = series * z2 + C(2.0 / (2 * k + 1));
  return z * C(2) + z * (z2 * series);
}

#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
// Rotations within the register: through memory a fold costs as much as a hundred elements.
template <class C, class Combine, int... Lane>
KDFAST_INLINE C fold_halves(Vec<C> v, const Combine& combine, std::integer_sequence<int, Lane...>) {
  constexpr int width = sizeof...(Lane);
  if constexpr (width > 8) v = combine(v, __builtin_shufflevector(v, v, ((Lane + 8) % width)...));
  if constexpr (width > 4) v = combine(v, __builtin_shufflevector(v, v, ((Lane + 4) % width)...));
  if constexpr (width > 2) v = combine(v, __builtin_shufflevector(v, v, ((Lane + 2) % width)...));
  return combine(v, __builtin_shufflevector(v, v, ((Lane + 1) % width)...))[0];
}
#endif

// All lanes combined, by halves; `combine` takes two vectors or two numbers.
template <class C, class Combine> KDFAST_INLINE C fold_lanes(Vec<C> v, const Combine& combine) {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  return fold_halves<C>(v, combine, std::make_integer_sequence<int, Simd<C>::width>{});
#else
  C lanes[Simd<C>::width];
  store(lanes, v);
  for (int half = Simd<C>::width / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
  return lanes[0];
#endif
}
template <class C> KDFAST_INLINE double sum_lanes(Vec<C> v) {
  return fold_lanes<C>(v, [](auto a, auto b) { return a + b; });
}
template <class C> KDFAST_INLINE C max_lanes(Vec<C> v) {
  return fold_lanes<C>(v, [](auto a, auto b) { return a > b ? a : b; });
}

template <class S> using ComputeOf = typename Compute<S>::type;

// Calls body(i, whole) for each full vector of n elements and once for the rest: `whole` is a compile-time bool.
struct Whole { static constexpr bool value = true; };
struct Part { static constexpr bool value = false; };
template <class C, class Body> KDFAST_INLINE void each_vector(int64_t n, const Body& body) {
  constexpr int W = Simd<C>::width;
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, Whole{});
  if (i < n) body(i, Part{});
}
template <class Extent, class S, class C = ComputeOf<S>>
KDFAST_INLINE Vec<C> read(Extent, const S* p, int64_t i, int64_t n, C fill) {
  if constexpr (Extent::value) return load(p + i);
  else return load_tail(p + i, n - i, fill);
}
template <class Extent, class S, class V>
KDFAST_INLINE void write(Extent, S* p, int64_t i, int64_t n, V v, bool streamed = false) {
  if constexpr (Extent::value) streamed ? stream(p + i, v) : store(p + i, v);
  else store_tail(p + i, n - i, v);
}

}  // namespace
