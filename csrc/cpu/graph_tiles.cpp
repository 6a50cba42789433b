// Compiled once per instruction set (setup.py: PER_LEVEL). See graph_tiles.h for what is computed.
// Work: D multiply-adds an element of the tile, 3 loads of a vector and kRows broadcasts for 3 kRows of them; then one
// load, one or two comparisons an element's vector and a branch for three. At D = 128 that is 2 percent.
#include "cpu/graph_tiles.h"

#include "cpu/simd.h"

namespace kdfast {
namespace {

constexpr int kVectors = 3;
// Rows of a block of accumulators: with kVectors vectors each they fill the registers (32, 16 and 16) but for a row of
// columns and a broadcast.
#if defined(__AVX512F__)
template <class C> constexpr int kRows = 8;
#elif defined(__AVX2__)
template <class C> constexpr int kRows = 4;
#else
template <class C> constexpr int kRows = sizeof(C) == 4 ? 4 : 2;
#endif
template <class C> constexpr int kPanel = kVectors * Simd<C>::width;

// Depth between two visits to the accumulators' memory: the columns' panel and a block's share of the rows' stay in L1.
constexpr int64_t kDepth = 128;

// One bit a lane: not (a < b), so that a NaN counts.
#if defined(__AVX512F__)
KDFAST_INLINE uint32_t not_less(Vec<float> a, Vec<float> b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
KDFAST_INLINE uint32_t not_less(Vec<double> a, Vec<double> b) { return _mm512_cmp_pd_mask(a, b, _CMP_NLT_UQ); }
#else
template <class V> KDFAST_INLINE uint32_t not_less(V a, V b) {
  const auto less = a < b;
  uint32_t bits = 0;
  for (unsigned i = 0; i < sizeof(less) / sizeof(less[0]); ++i) bits |= static_cast<uint32_t>(less[i] == 0) << i;
  return bits;
}
#endif

// The next kDepth (or fewer) terms of kRows rows of the tile, added to what `tile` holds unless they are the first.
template <class C>
KDFAST_INLINE void accumulate(const C* rows, const C* columns, int64_t depth, bool first, C* tile) {
  constexpr int W = Simd<C>::width, R = kRows<C>, P = kPanel<C>;
  Vec<C> sums[R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sums[r][v] = first ? Vec<C>{} : load(tile + r * P + v * W);
  for (int64_t d = 0; d < depth; ++d, rows += P, columns += P) {
    Vec<C> column[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) column[v] = load(columns + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<C> row = broadcast<C>(rows[r]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sums[r][v] += row * column[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) store(tile + r * P + v * W, sums[r][v]);
}

template <class C, bool columns_too, bool euclidean>
KDFAST_INLINE int64_t filter(const Filter& f, const C* tile, Hit<C>* hits) {
  constexpr int W = Simd<C>::width, P = kPanel<C>;
  const C* row_limits = static_cast<const C*>(f.row_limits);
  const C* column_limits = static_cast<const C*>(f.column_limits);
  const C* row_squares = static_cast<const C*>(f.row_squares);
  const C* column_squares = static_cast<const C*>(f.column_squares);
  Vec<C> limits[kVectors], squares[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    if constexpr (columns_too) limits[v] = load(column_limits + v * W);
    if constexpr (euclidean) squares[v] = load(column_squares + v * W);
  }
  int64_t count = 0;
  for (int r = 0; r < P; ++r) {
    Vec<C> values[kVectors];
    uint64_t in_row = 0, in_column = 0;  // one bit a column
    const Vec<C> limit = broadcast<C>(row_limits[r]);
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      values[v] = load(tile + r * P + v * W);
      if constexpr (euclidean) values[v] = values[v] * C(2) - (squares[v] + row_squares[r]);
      in_row |= static_cast<uint64_t>(not_less(values[v], limit)) << v * W;
      if constexpr (columns_too) in_column |= static_cast<uint64_t>(not_less(values[v], limits[v])) << v * W;
    }
    if (__builtin_expect((in_row | in_column) == 0, 1)) continue;
    C lanes[P];
    for (int v = 0; v < kVectors; ++v) store(lanes + v * W, values[v]);
    const int32_t row = static_cast<int32_t>(f.first_row + r), column = static_cast<int32_t>(f.first_column);
    for (; in_row != 0; in_row &= in_row - 1) {
      const int lane = __builtin_ctzll(in_row);
      hits[count++] = {lanes[lane], row, column + lane};
    }
    for (; in_column != 0; in_column &= in_column - 1) {
      const int lane = __builtin_ctzll(in_column);
      hits[count++] = {lanes[lane], column + lane, row};
    }
  }
  return count;
}

template <class C>
int64_t product(const void* rows, const void* columns, int64_t width, const Filter& f, void* memory, void* hits) {
  constexpr int R = kRows<C>, P = kPanel<C>;
  const C* a = static_cast<const C*>(rows);
  const C* b = static_cast<const C*>(columns);
  C* tile = static_cast<C*>(memory);
  int64_t d = 0;
  do {  // once at least: rows of no width have similarity 0
    const int64_t depth = width - d < kDepth ? width - d : kDepth;
    for (int r = 0; r < P; r += R) accumulate<C>(a + d * P + r, b + d * P, depth, d == 0, tile + r * P);
    d += kDepth;
  } while (d < width);
  Hit<C>* out = static_cast<Hit<C>*>(hits);
  if (f.row_squares) return f.column_limits ? filter<C, true, true>(f, tile, out) : filter<C, false, true>(f, tile, out);
  return f.column_limits ? filter<C, true, false>(f, tile, out) : filter<C, false, false>(f, tile, out);
}

template <class S>
void pack(const void* const* rows, int64_t count, int64_t width, const double* centre, const double* divisors, void* panel) {
  using C = typename Compute<S>::type;
  constexpr int W = Simd<C>::width, P = kPanel<C>;
  C* out = static_cast<C*>(panel);
  for (int64_t d = 0; d < width; d += W) {  // W columns of a panel at a time stay in L1
    const int64_t n = width - d < W ? width - d : W;
    for (int64_t i = 0; i < P; ++i) {
      C lanes[W] = {};
      if (i < count) {
        const S* row = static_cast<const S*>(rows[i]) + d;
        store(lanes, n == W ? load(row) : load_tail(row, n, C(0)));
        for (int64_t l = 0; l < n; ++l)
          lanes[l] = static_cast<C>((lanes[l] - (centre ? centre[d + l] : 0)) / divisors[i]);
      }
      for (int64_t l = 0; l < n; ++l) out[(d + l) * P + i] = lanes[l];
    }
  }
}

}  // namespace

namespace KDFAST_LEVEL {
extern const GraphTiles graph_tiles = {
    {kPanel<float>, kPanel<double>},
    {pack<float>, pack<double>, pack<Half>, pack<BFloat16>},
    {product<float>, product<double>},
};
}  // namespace KDFAST_LEVEL

}  // namespace kdfast
