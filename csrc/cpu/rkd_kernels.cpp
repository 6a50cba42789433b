// Compiled once per instruction set (setup.py: PER_LEVEL). See rkd_kernels.h for what is computed.
#include "cpu/rkd_kernels.h"

#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/simd.h"
#include "math/huber.h"
#include "math/triplet.h"

// GCC 12 takes the undefined vectors inside its own AVX-512 intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace kdfast {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 4;  // rows of a register tile: 32 registers hold what 4 rows need
constexpr int kVectors = 3;
#else
constexpr int kRows = 2;
constexpr int kVectors = 1;
#endif

template <class C> using Int = typename Simd<C>::Int;
template <class C> using Index = typename std::conditional<sizeof(C) == 4, int32_t, int64_t>::type;

template <class C> KDFAST_INLINE Vec<C> square_root(Vec<C> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) return _mm512_sqrt_ps(v);
  else return _mm512_sqrt_pd(v);
#elif defined(__AVX2__)
  if constexpr (sizeof(C) == 4) return _mm256_sqrt_ps(v);
  else return _mm256_sqrt_pd(v);
#elif defined(__x86_64__)
  if constexpr (sizeof(C) == 4) return _mm_sqrt_ps(v);
  else return _mm_sqrt_pd(v);
#else
  for (int i = 0; i < Simd<C>::width; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
#endif
}

// math::huber_slope. With AVX-512 one instruction, which makes 1 of a NaN: the loss, made of e as well, keeps it.
template <class C> KDFAST_INLINE Vec<C> slope_of(Vec<C> e) {
  const Vec<C> one = broadcast<C>(1);
#if defined(__AVX512F__)
  constexpr int kSmallerMagnitudeWithSign = 2;
  if constexpr (sizeof(C) == 4) return _mm512_range_ps(e, one, kSmallerMagnitudeWithSign);
  else return _mm512_range_pd(e, one, kSmallerMagnitudeWithSign);
#else
  const Vec<C> low = e < -one ? -one : e;
  return low > one ? one : low;
#endif
}

// Keeps the compiler from contracting a product into the sum it goes into: equal sides then differ by exactly 0.
template <class V> KDFAST_INLINE V rounded(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

template <class C> KDFAST_INLINE Int<C> lane_numbers() {
  Int<C> lanes;
  for (int i = 0; i < Simd<C>::width; ++i) lanes[i] = i;
  return lanes;
}

// The index of each lane in (a, b) laid side by side: the lower or upper half of a group from either.
template <class C, int group, int upper> KDFAST_INLINE Int<C> half_of_groups() {
  constexpr int W = Simd<C>::width, half = group / 2;
  Int<C> index;
#pragma GCC unroll 16
  for (int lane = 0; lane < W; ++lane) {
    const int within = lane % group, base = lane - within;
    index[lane] = upper * half + (within < half ? base + within : W + base + within - half);
  }
  return index;
}

// Lane i of the result: the sum of the lanes of v[i], of which there are as many as lanes. v is used up.
template <class C, int group = Simd<C>::width> KDFAST_INLINE Vec<C> sums_of_lanes(Vec<C>* v) {
  if constexpr (group == 1) {
    return v[0];
  } else {
    const Int<C> low = half_of_groups<C, group, 0>(), high = half_of_groups<C, group, 1>();
#pragma GCC unroll 8
    for (int m = 0; m < group / 2; ++m)
      v[m] = __builtin_shuffle(v[m], v[m + group / 2], low) + __builtin_shuffle(v[m], v[m + group / 2], high);
    return sums_of_lanes<C, group / 2>(v);
  }
}

template <class S, class C> void pack_row(const S* row, int64_t d, C* out, int64_t padded) {
  constexpr int W = Simd<typename Compute<S>::type>::width;
  int64_t i = 0;
  if constexpr (sizeof(C) == sizeof(typename Compute<S>::type)) {
    for (; i + W <= d; i += W) store(out + i, load(row + i));
    if (i < d) store(out + i, load_tail(row + i, d - i, C(0)));
    i = d < padded && d % W != 0 ? i + W : i;
  } else {
    for (; i < d; ++i) out[i] = C(row[i]);
  }
  for (; i < padded; ++i) out[i] = 0;
}

template <class C> void pack(const void* row, Storage storage, int64_t d, C* out, int64_t padded) {
  if constexpr (sizeof(C) == 8) {
    if (storage == Storage::float64) pack_row(static_cast<const double*>(row), d, out, padded);
    else pack_row(static_cast<const float*>(row), d, out, padded);  // wide copies are made of float rows alone
  } else {
    if (storage == Storage::float32) pack_row(static_cast<const float*>(row), d, out, padded);
    else if (storage == Storage::float16) pack_row(static_cast<const Half*>(row), d, out, padded);
    else pack_row(static_cast<const BFloat16*>(row), d, out, padded);
  }
}

template <class C> void distances(const C* x, int64_t width, int64_t block, int64_t blocks, C* out, int64_t stride) {
  constexpr int W = Simd<C>::width, R = kRows, K = 4, tile = R * K;
  const int64_t i_end = (block + 1) * kRkdLanes, row = width + kRkdLanes;
  for (int64_t k = block * kRkdLanes; k < blocks * kRkdLanes; k += K) {
    for (int64_t i = block * kRkdLanes; i < i_end && i < k + K; i += R) {
      Vec<C> sums[tile] = {};
      for (int64_t d = 0; d < width; d += W) {
        Vec<C> x_k[K];
#pragma GCC unroll 4
        for (int c = 0; c < K; ++c) x_k[c] = load(x + (k + c) * row + d);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const Vec<C> x_i = load(x + (i + r) * row + d);
#pragma GCC unroll 4
          for (int c = 0; c < K; ++c) {
            const Vec<C> off = x_i - x_k[c];
            sums[r * K + c] += off * off;
          }
        }
      }
      C pairs[tile];
      if constexpr (tile % W == 0) {
#pragma GCC unroll 4
        for (int part = 0; part < tile / W; ++part) store(pairs + part * W, C(0.5) * sums_of_lanes<C>(sums + part * W));
      } else {
        for (int p = 0; p < tile; ++p) pairs[p] = C(0.5) * fold_lanes<C>(sums[p], [](auto a, auto b) { return a + b; });
      }
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < K; ++c) out[(i + r) * stride + k + c] = out[(k + c) * stride + i + r] = pairs[r * K + c];
    }
  }
}

// Distance from half its square, and 1 / distance, 0 where it is 0.
template <class C> KDFAST_INLINE Vec<C> distance_of(Vec<C> a) { return square_root<C>(a + a); }
template <class C> KDFAST_INLINE Vec<C> inverse_or_zero(Vec<C> d) { return d == Vec<C>{} ? Vec<C>{} : C(1) / d; }

// `a` at columns [k, k + W), 0 past n: there it would be a distance to no row.
template <class C> KDFAST_INLINE Vec<C> pairs_at(const C* row, int64_t k, int64_t n) {
  const Vec<C> a = load(row + k);
  if (k + Simd<C>::width <= n) return a;
  return lane_numbers<C>() < Index<C>(n - k) ? a : Vec<C>{};
}

template <class C> double distance_sum(const C* pairs, int64_t n, int64_t stride, int64_t first, int64_t last) {
  double total = 0;
  for (int64_t i = first; i < last; ++i) {
    Vec<C> sum = {};
    for (int64_t k = 0; k < n; k += Simd<C>::width) sum += distance_of<C>(pairs_at(pairs + i * stride, k, n));
    total += sum_lanes<C>(sum);
  }
  return total;
}

// e and what it is made of at [i][k, k + W).
template <class C> struct Relative {
  Vec<C> distance, psi, slope, e;
  KDFAST_INLINE Relative(const C* student, const C* teacher, int64_t k, int64_t n, C inverse_student, C inverse_teacher)
      : distance(distance_of<C>(pairs_at(student, k, n))), psi(rounded(distance * inverse_student)),
        e(psi - rounded(distance_of<C>(pairs_at(teacher, k, n)) * inverse_teacher)) {
    slope = slope_of<C>(e);
  }
};

template <class C>
DistanceSums distance_terms(const C* student, const C* teacher, int64_t n, int64_t stride, const C* weight,
                            DistanceScale scale, int64_t first, int64_t last) {
  DistanceSums sums{0, 0};
  for (int64_t i = first; i < last; ++i) {
    Vec<C> loss = {}, slope = {};
    for (int64_t k = 0; k < n; k += Simd<C>::width) {
      const Relative<C> at(student + i * stride, teacher + i * stride, k, n, C(scale.inverse_student), C(scale.inverse_teacher));
      Vec<C> h = math::huber(at.e, at.slope, C(0.5)), g = at.slope;
      if (weight) h *= load(weight + k), g *= load(weight + k);
      loss += h, slope += g * at.psi;
    }
    const double w = weight ? weight[i] : 1;
    sums.loss += w * sum_lanes<C>(loss), sums.slope += w * sum_lanes<C>(slope);
  }
  return sums;
}

template <class C>
void distance_grad(const C* student, const C* teacher, int64_t n, int64_t stride, const C* weight, DistanceScale scale,
                   double factor, double share, C* grad, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const C of_slope = C(weight ? factor * weight[i] : factor);
    for (int64_t k = 0; k < n; k += Simd<C>::width) {
      const Relative<C> at(student + i * stride, teacher + i * stride, k, n, C(scale.inverse_student), C(scale.inverse_teacher));
      Vec<C> g = at.slope * of_slope;
      if (weight) g *= load(weight + k);
      C* out = grad + i * stride + k;
      store(out, load(out) + (g - C(share)) * inverse_or_zero<C>(at.distance));  // dd / da = 1 / d
    }
  }
}

// An error of a few eps times this ratio of distances is what cosines may have before they are made of exact differences.
constexpr double kLargestRatio = 8;

template <class C>
void needs_wide(const C* student, const C* teacher, int64_t n, int64_t stride, int64_t first, int64_t last, bool* wide) {
  for (int64_t j = first; j < last; ++j) {
    wide[j] = false;
    for (const C* row : {student + j * stride, teacher + j * stride}) {
      const C huge = C(3e38);
      Vec<C> largest = {}, smallest = broadcast<C>(huge);
      for (int64_t k = 0; k < n; k += Simd<C>::width) {
        const Vec<C> a = pairs_at(row, k, n);
        largest = a > largest ? a : largest;
        const Vec<C> apart = a > Vec<C>{} ? a : broadcast<C>(huge);
        smallest = apart < smallest ? apart : smallest;
      }
      const C low = fold_lanes<C>(smallest, [](auto a, auto b) { return a < b ? a : b; });
      wide[j] = wide[j] || max_lanes<C>(largest) > C(kLargestRatio * kLargestRatio) * low;
    }
  }
}

// A tile of pairs and the apexes that go over it together. Copies of the tile, 24 KiB of student, teacher and gradient, lie
// side by side in the first cache, where rows of the matrices, far apart, would push each other out.
constexpr int kApexes = 16, kTileRows = 16;
template <class M> constexpr int64_t kTileColumns = 512 / sizeof(M);

template <class C, class M> struct alignas(64) Tile {
  M student[kTileRows][kTileColumns<M>];
  M teacher[kTileRows][kTileColumns<M>];
  C grad[kTileRows][kTileColumns<M>];

  // Rows from i and columns [k, k + columns) of the matrices; no gradient yet.
  void fill(const Triplets<C, M>& in, int64_t i, int64_t k, int64_t columns) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      std::memcpy(student[r], in.student + (i + r) * in.stride + k, columns * sizeof(M));
      std::memcpy(teacher[r], in.teacher + (i + r) * in.stride + k, columns * sizeof(M));
      std::memset(grad[r], 0, columns * sizeof(C));
    }
  }
  void add_grad(C* out, int64_t stride, int64_t i, int64_t k, int64_t columns) const {
    for (int64_t r = 0; r < kTileRows; ++r)
      for (int64_t c = 0; c < columns; c += Simd<C>::width) {
        C* to = out + (i + r) * stride + k + c;
        store(to, load(to) + load(grad[r] + c));
      }
  }
};

// What the sweep knows of one apex j, by row: inverse distances and along = a r of either side, and sums of the gradient.
template <class C> struct Apex {
  int64_t j;
  C* memory;
  int64_t stride;
  KDFAST_INLINE C* r_student() const { return memory; }
  KDFAST_INLINE C* along_student() const { return memory + stride; }
  KDFAST_INLINE C* r_teacher() const { return memory + 2 * stride; }
  KDFAST_INLINE C* along_teacher() const { return memory + 3 * stride; }
  KDFAST_INLINE C* sum_g_r() const { return memory + 4 * stride; }
  KDFAST_INLINE C* sum_g_cos() const { return memory + 5 * stride; }
};
constexpr int kApexArrays = 6;

template <class C> int64_t scratch(int64_t n) { return kApexes * kApexArrays * rkd_stride(n); }

KDFAST_INLINE Vec<float> narrow(Vec<double> low, Vec<double> high) {
#if defined(__AVX512F__)
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
#elif defined(__AVX2__)
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(low)), _mm256_cvtpd_ps(high), 1);
#else
  Vec<float> v;
  constexpr int half = Simd<double>::width;
  for (int i = 0; i < half; ++i) v[i] = float(low[i]), v[i + half] = float(high[i]);
  return v;
#endif
}
template <class C, class M> KDFAST_INLINE Vec<C> narrowed(const M* p) {
  if constexpr (sizeof(C) == sizeof(M)) return load(p);
  else return narrow(load(p), load(p + Simd<M>::width));
}

// cos / r_k of row i, from a_ik at `pair` and a_k at `apex`, columns of one vector.
template <class C, class M> struct Cosine {
  Vec<M> a_k[sizeof(M) / sizeof(C)];
  KDFAST_INLINE explicit Cosine(const M* apex) {
    for (size_t p = 0; p < sizeof(M) / sizeof(C); ++p) a_k[p] = load(apex + p * Simd<M>::width);
  }
  KDFAST_INLINE Vec<C> over_r(const M* pair, M a_i, Vec<C> r_i, Vec<C> along_i) const {
    if constexpr (sizeof(M) == sizeof(C)) {
      return math::cosine_over_r(a_k[0], load(pair), r_i, along_i);
    } else {
      return narrow((a_k[0] - load(pair)) + a_i, (a_k[1] - load(pair + Simd<M>::width)) + a_i) * r_i;
    }
  }
};

// Rows [i, i + R) of the tile that begins at (i_tile, k_tile), against columns [k_begin, k_end), at one apex; with
// `masked` above the diagonal alone.
template <class C, class M, bool weighted, bool needs_grad, bool masked>
KDFAST_INLINE void rows_at_apex(const Triplets<C, M>& in, const Apex<C>& apex, Tile<C, M>& tile, int64_t i_tile,
                                int64_t k_tile, int64_t i, int64_t k_begin, int64_t k_end, Vec<C>* sums_r,
                                Vec<C>* sums_cos, Vec<C>& loss) {
  constexpr int W = Simd<C>::width, R = kRows;
  const M* __restrict student = in.student + apex.j * in.stride;
  const M* __restrict teacher = in.teacher + apex.j * in.stride;
  const C* __restrict r_student = apex.r_student();
  const C* __restrict r_teacher = apex.r_teacher();
  C* __restrict columns_r = apex.sum_g_r();
  C* __restrict columns_cos = apex.sum_g_cos();
  // What a row needs, and its sums, in registers.
  Vec<C> r_i[R], along_i[R], target_r_i[R], target_along_i[R], row_r[R], row_cos[R], total = loss;
  M a_i[R], target_a_i[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    r_i[r] = broadcast<C>(r_student[i + r]), along_i[r] = broadcast<C>(apex.along_student()[i + r]);
    target_r_i[r] = broadcast<C>(r_teacher[i + r]), target_along_i[r] = broadcast<C>(apex.along_teacher()[i + r]);
    a_i[r] = student[i + r], target_a_i[r] = teacher[i + r];
    if constexpr (needs_grad) row_r[r] = sums_r[r], row_cos[r] = sums_cos[r];
  }
  for (int64_t k = k_begin; k < k_end; k += W) {
    const Cosine<C, M> of_student(student + k), of_teacher(teacher + k);
    const Vec<C> r_k = load(r_student + k), target_r_k = load(r_teacher + k);
    Vec<C> column_r = {}, column_cos = {};
    if constexpr (needs_grad) column_r = load(columns_r + k), column_cos = load(columns_cos + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const int64_t row = i - i_tile + r, column = k - k_tile;
      const Vec<C> cos = rounded(of_student.over_r(tile.student[row] + column, a_i[r], r_i[r], along_i[r]) * r_k);
      const Vec<C> target = rounded(
          of_teacher.over_r(tile.teacher[row] + column, target_a_i[r], target_r_i[r], target_along_i[r]) * target_r_k);
      const Vec<C> e = cos - target;
      Vec<C> g = slope_of<C>(e);
      if constexpr (masked) g = lane_numbers<C>() > Index<C>(i + r - k) ? g : Vec<C>{};
      const Vec<C> off = e - C(0.5) * g;  // math::huber, with the weight where the gradient wants it too
      if constexpr (weighted) g = g * (load(in.weight + k) * (in.weight[i + r] * in.weight[apex.j]));
      total += g * off;
      if constexpr (needs_grad) {
        const Vec<C> g_r = g * r_k;
        C* grad = tile.grad[row] + column;
        store(grad, load(grad) - g_r * r_i[r]);
        row_r[r] += g_r, row_cos[r] += g * cos;
        column_r += g * r_i[r], column_cos += g * cos;
      }
    }
    if constexpr (needs_grad) store(columns_r + k, column_r), store(columns_cos + k, column_cos);
  }
  loss = total;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    if constexpr (needs_grad) sums_r[r] = row_r[r], sums_cos[r] = row_cos[r];
}

// out[0, kTileRows) += the lanes of each of as many vectors, summed.
template <class C> KDFAST_INLINE void add_sums_of_lanes(C* out, Vec<C>* sums) {
  constexpr int W = Simd<C>::width;
#pragma GCC unroll 8
  for (int part = 0; part < kTileRows / W; ++part) store(out + part * W, load(out + part * W) + sums_of_lanes<C>(sums + part * W));
}

// The tile at (i, k), columns up to k_end, at one apex. Returns the loss.
template <class C, class M, bool weighted, bool needs_grad>
double tile_at_apex(const Triplets<C, M>& in, const Apex<C>& apex, Tile<C, M>& tile, int64_t i, int64_t k, int64_t k_end) {
  constexpr int R = kRows;
  Vec<C> loss = {}, sums_r[kTileRows] = {}, sums_cos[kTileRows] = {};
  const int64_t k_whole = k == i ? k + kTileRows : k;  // the first square of a tile on the diagonal is half a tile
#pragma GCC unroll 1
  for (int r = 0; r < kTileRows; r += R) {
    if (k == i)
      rows_at_apex<C, M, weighted, needs_grad, true>(in, apex, tile, i, k, i + r, k, k_whole, sums_r + r, sums_cos + r, loss);
    rows_at_apex<C, M, weighted, needs_grad, false>(in, apex, tile, i, k, i + r, k_whole, k_end, sums_r + r, sums_cos + r, loss);
  }
  if constexpr (needs_grad) add_sums_of_lanes<C>(apex.sum_g_r() + i, sums_r), add_sums_of_lanes<C>(apex.sum_g_cos() + i, sums_cos);
  return sum_lanes<C>(loss);
}

// 1 / max(d, 1e-12) or 0 at d = 0; cos of the angle iji, which is 1 unless the limit or 0 is met.
template <class C> struct OwnAngle {
  Vec<C> r, at_limit, cos;  // at_limit: r there, 0 elsewhere
  KDFAST_INLINE explicit OwnAngle(Vec<C> a) {
    const Vec<C> d = distance_of<C>(a), smallest = broadcast<C>(C(math::kSmallestNorm)), zero = {};
    r = inverse_or_zero<C>(d < smallest ? (d == zero ? zero : smallest) : d);
    r = a == a ? r : a;
    at_limit = d < smallest ? r : zero;
    cos = d < smallest ? (a + a) * r * r : d == zero ? zero : broadcast<C>(1);
  }
};

// Fills what the sweep knows of the apex; returns the loss of its angles iji, over 1/2 as the others are.
template <class C, class M> double prepare(const Triplets<C, M>& in, const Apex<C>& apex) {
  constexpr int W = Simd<C>::width;
  const M* student = in.student + apex.j * in.stride;
  const M* teacher = in.teacher + apex.j * in.stride;
  Vec<C> loss = {};
  for (int64_t k = 0; k < rkd_padded(in.n); k += W) {
    const auto present = lane_numbers<C>() < Index<C>(in.n - k);
    const Vec<C> a_student = present ? narrowed<C>(student + k) : Vec<C>{};
    const Vec<C> a_teacher = present ? narrowed<C>(teacher + k) : Vec<C>{};
    const OwnAngle<C> of_student(a_student), of_teacher(a_teacher);
    store(apex.r_student() + k, of_student.r), store(apex.along_student() + k, a_student * of_student.r);
    store(apex.r_teacher() + k, of_teacher.r), store(apex.along_teacher() + k, a_teacher * of_teacher.r);
    store(apex.sum_g_r() + k, Vec<C>{}), store(apex.sum_g_cos() + k, Vec<C>{});
    const Vec<C> e = of_student.cos - of_teacher.cos;
    Vec<C> h = math::huber(e, slope_of<C>(e), C(0.5));
    if (in.weight) h *= load(in.weight + k) * load(in.weight + k) * in.weight[apex.j];
    loss += h;
  }
  return 0.5 * sum_lanes<C>(loss);
}

// Half the gradient with respect to the distances from the apex.
template <class C, class M> void finish(const Triplets<C, M>& in, const Apex<C>& apex, C* grad) {
  for (int64_t k = 0; k < in.n; k += Simd<C>::width) {
    const OwnAngle<C> of_student(narrowed<C>(in.student + apex.j * in.stride + k));
    const OwnAngle<C> of_teacher(narrowed<C>(in.teacher + apex.j * in.stride + k));
    const Vec<C> r = load(apex.r_student() + k);
    Vec<C> own = slope_of<C>(of_student.cos - of_teacher.cos) * of_student.at_limit * of_student.at_limit;
    if (in.weight) own *= load(in.weight + k) * load(in.weight + k) * in.weight[apex.j];
    const Vec<C> bent = of_student.at_limit == Vec<C>{} ? r : Vec<C>{};
    const Vec<C> g = math::apex_gradient(load(apex.sum_g_r() + k), load(apex.sum_g_cos() + k), r, bent);
    C* out = grad + apex.j * in.stride + k;
    store(out, load(out) + (r == Vec<C>{} ? Vec<C>{} : g + own));
  }
}

template <class C, class M, bool weighted, bool needs_grad>
double sweep(const Triplets<C, M>& in, const int64_t* apexes, int64_t count, C* grad, C* scratch) {
  const int64_t padded = rkd_padded(in.n), stride = rkd_stride(in.n);
  Tile<C, M> tile;
  double total = 0;
  for (int64_t first = 0; first < count; first += kApexes) {
    Apex<C> group[kApexes];
    const int64_t members = count - first < kApexes ? count - first : kApexes;
    for (int64_t m = 0; m < members; ++m) {
      group[m] = {apexes[first + m], scratch + m * kApexArrays * stride, stride};
      total += prepare(in, group[m]);
    }
    for (int64_t i = 0; i < in.n; i += kTileRows) {
      for (int64_t k = i; k < padded; k += kTileColumns<M>) {
        const int64_t k_end = k + kTileColumns<M> < padded ? k + kTileColumns<M> : padded;
        tile.fill(in, i, k, k_end - k);
        for (int64_t m = 0; m < members; ++m)
          total += tile_at_apex<C, M, weighted, needs_grad>(in, group[m], tile, i, k, k_end);
        if (needs_grad) tile.add_grad(grad, stride, i, k, k_end - k);
      }
    }
    if (needs_grad)
      for (int64_t m = 0; m < members; ++m) finish(in, group[m], grad);
  }
  return 2 * total;
}

template <class C, class M>
double triplets(const Triplets<C, M>& in, const int64_t* apexes, int64_t count, C* grad, C* scratch) {
  const auto run = in.weight ? (in.needs_grad ? &sweep<C, M, true, true> : &sweep<C, M, true, false>)
                             : (in.needs_grad ? &sweep<C, M, false, true> : &sweep<C, M, false, false>);
  return run(in, apexes, count, grad, scratch);
}

template <class C>
void fold(C* parts, int64_t count, int64_t part_stride, int64_t block, int64_t blocks, int64_t stride, double factor) {
  constexpr int64_t L = kRkdLanes;
  for (int64_t other = block; other < blocks; ++other) {
    C* upper = parts + block * L * stride + other * L;
    C* lower = parts + other * L * stride + block * L;
    C sums[L][L] = {};
    for (int64_t part = 0; part < count; ++part)
      for (int64_t i = 0; i < L; ++i)
        for (int64_t k = 0; k < L; ++k) sums[i][k] += upper[part * part_stride + i * stride + k];
    for (int64_t part = 0; part < count; ++part)
      for (int64_t k = 0; k < L; ++k)
        for (int64_t i = 0; i < L; ++i) sums[i][k] += lower[part * part_stride + k * stride + i];
    if (other == block) {  // its own mirror image: the sum of both orders must be the same number on either side
      for (int64_t i = 0; i < L; ++i)
        for (int64_t k = 0; k < i; ++k) sums[i][k] = sums[k][i];
    }
    for (int64_t i = 0; i < L; ++i)
      for (int64_t k = 0; k < L; ++k) upper[i * stride + k] = lower[k * stride + i] = C(factor) * sums[i][k];
  }
}

template <class C, int V>
KDFAST_INLINE void pull_columns(const C* grad, int64_t stride, const C* x, int64_t n, int64_t width, int64_t first,
                                int64_t d, C* out) {
  constexpr int W = Simd<C>::width, R = 4;
  const int64_t row = width + kRkdLanes;
  Vec<C> sums[R][V] = {}, x_i[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) x_i[r][v] = load(x + (first + r) * row + d + v * W);
  for (int64_t k = 0; k < n; ++k) {
    Vec<C> x_k[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x_k[v] = load(x + k * row + d + v * W);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<C> g = broadcast<C>(grad[(first + r) * stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += g * (x_i[r][v] - x_k[v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(out + r * width + d + v * W, sums[r][v]);
}

template <class C>
void pull(const C* grad, int64_t stride, const C* x, int64_t n, int64_t width, int64_t first, C* out) {
  constexpr int W = Simd<C>::width;
  int64_t d = 0;
  for (; d + kVectors * W <= width; d += kVectors * W) pull_columns<C, kVectors>(grad, stride, x, n, width, first, d, out);
  for (; d < width; d += W) pull_columns<C, 1>(grad, stride, x, n, width, first, d, out);
}

template <class C> constexpr RkdKernels<C> kernels() {
  return {&pack<C>, &distances<C>, &distance_sum<C>, &distance_terms<C>, &distance_grad<C>, &needs_wide<C>, &scratch<C>,
          &triplets<C, C>, &triplets<C, double>, &fold<C>, &pull<C>};
}

}  // namespace

namespace KDFAST_LEVEL {
extern const RkdTables rkd_tables = {kernels<float>(), kernels<double>()};
}  // namespace KDFAST_LEVEL

}  // namespace kdfast
