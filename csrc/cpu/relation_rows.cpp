// Compiled once per instruction set (setup.py: PER_LEVEL). See relation_rows.h for what is computed.
// Plain loops over doubles, which the compiler makes vectors of; sums along a row have kLanes of their own.
#include "cpu/relation_rows.h"

namespace kdfast {
namespace {

constexpr int kLanes = 16;

template <class C>
void sum(const void* x, int64_t rows, int64_t width, int64_t begin, int64_t end, const double* weight, double* sum) {
  for (int64_t d = begin; d < end; ++d) sum[d] = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const C* row = static_cast<const C*>(x) + i * width;
    const double w = weight[i];
    for (int64_t d = begin; d < end; ++d) sum[d] += w * static_cast<double>(row[d]);
  }
}

// The sum of term(d) over d.
template <class Term> double along_row(int64_t width, const Term& term) {
  double lanes[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += term(d + l);
  for (int l = 0; d < width; ++d, ++l) lanes[l] += term(d);
  double total = 0;
  for (double lane : lanes) total += lane;
  return total;
}

template <class C> double product(const void* x, const double* vector, int64_t width) {
  const C* row = static_cast<const C*>(x);
  return along_row(width, [&](int64_t d) { return static_cast<double>(row[d]) * vector[d]; });
}

template <class C> void back(void* gradient, const void* x, int64_t width, const BackRow& b) {
  C* g = static_cast<C*>(gradient);
  const C* row = static_cast<const C*>(x);
  if (b.summed != nullptr) {
    const double along_sum = b.slope * b.factor * b.share, along_weighted = b.slope * b.factor;
    for (int64_t d = 0; d < width; ++d)
      g[d] = static_cast<C>(g[d] - (along_sum * b.summed[d] + along_weighted * b.weighted[d]));
  }
  const double along = along_row(width, [&](int64_t d) { return static_cast<double>(g[d]) * row[d]; }) / b.radial;
  const double inverse = 1 / b.divisor;
  for (int64_t d = 0; d < width; ++d) g[d] = static_cast<C>(g[d] * inverse - row[d] * along);
}

}  // namespace

namespace KDFAST_LEVEL {
extern const RelationRows relation_rows = {
    {sum<float>, sum<double>}, {product<float>, product<double>}, {back<float>, back<double>}};
}  // namespace KDFAST_LEVEL

}  // namespace kdfast
