// Prints what tests/ops/test_simd.py compares: built once per instruction set with that set's flags.
#include <cmath>
#include <cstdio>
#include <vector>

#include "cpu/simd.h"

// Largest error of exp2_nonpositive in units in the last place, against long double, over a grid of its range.
template <class C> double worst_exp2_ulp(int64_t samples) {
  constexpr int W = Simd<C>::width;
  double worst = 0;
  for (int64_t i = 0; i < samples; i += W) {
    C x[W], got[W];
    for (int j = 0; j < W; ++j) x[j] = C((1.0 - Simd<C>::bias) * double(i + j) / double(samples));
    store(got, exp2_nonpositive<C>(load(x)));
    for (int j = 0; j < W; ++j) {
      const long double exact = exp2l(static_cast<long double>(x[j]));
      const C nearest = C(exact);
      const long double ulp = std::nextafter(nearest, C(2)) - nearest;
      worst = std::fmax(worst, double(fabsl(got[j] - exact) / ulp));
    }
  }
  return worst;
}

// The same for log_positive, over every binade of its range and finely around 1, where the result is near 0.
template <class C> double worst_log_ulp(int64_t samples) {
  constexpr int W = Simd<C>::width;
  double worst = 0;
  for (int64_t i = 0; i < samples; i += W) {
    C x[W], got[W];
    for (int j = 0; j < W; ++j) {
      const double u = double(i + j) / double(samples);
      x[j] = (i / W) % 2 ? C(0.5 + u) : C(std::exp2(double(Simd<C>::bias - 1) * (2 * u - 1)));
    }
    store(got, log_positive<C>(load(x)));
    for (int j = 0; j < W; ++j) {
      const long double exact = logl(static_cast<long double>(x[j]));
      const C nearest = C(fabsl(exact));
      if (nearest == 0) continue;
      const long double ulp = std::nextafter(nearest, C(1e4)) - nearest;
      worst = std::fmax(worst, double(fabsl(got[j] - exact) / ulp));
    }
  }
  return worst;
}

// The same for log1p_unit over [0, 1], half of the samples in its lower binades.
template <class C> double worst_log1p_ulp(int64_t samples) {
  constexpr int W = Simd<C>::width;
  double worst = 0;
  for (int64_t i = 0; i < samples; i += W) {
    C x[W], got[W];
    for (int j = 0; j < W; ++j) {
      const double u = double(i + j) / double(samples);
      x[j] = (i / W) % 2 ? C(u) : C(std::exp2(-100 * u));
    }
    store(got, log1p_unit<C>(load(x)));
    for (int j = 0; j < W; ++j) {
      const long double exact = log1pl(static_cast<long double>(x[j]));
      const C nearest = C(exact);
      const long double ulp = std::nextafter(nearest, C(2)) - nearest;
      worst = std::fmax(worst, double(fabsl(got[j] - exact) / ulp));
    }
  }
  return worst;
}

template <class S> void print_bits(const char* name) {
  constexpr int W = Simd<float>::width;
  std::printf("%s", name);
  for (int i = 0; i < 65536; i += W) {
    S in[W];
    float out[W];
    for (int j = 0; j < W; ++j) in[j].bits = uint16_t(i + j);
    store(out, load(in));
    for (int j = 0; j < W; ++j) std::printf(" %a", double(out[j]));
  }
  std::printf("\n");
}

// Rounds every 32-bit pattern at a stride to S and prints the bits.
template <class S> void print_rounded(const char* name) {
  constexpr int W = Simd<float>::width;
  std::printf("%s", name);
  for (int64_t i = 0; i < 65536; i += W) {
    float in[W];
    S out[W];
    for (int j = 0; j < W; ++j) {
      const uint32_t bits = uint32_t(i + j) * 65537u + 4099u;
      std::memcpy(&in[j], &bits, 4);
    }
    store(out, load(in));
    for (int j = 0; j < W; ++j) std::printf(" %u", unsigned(out[j].bits));
  }
  std::printf("\n");
}

int main() {
  std::printf("exp2_float %.3f\n", worst_exp2_ulp<float>(1 << 22));
  std::printf("exp2_double %.3f\n", worst_exp2_ulp<double>(1 << 20));
  std::printf("log_float %.3f\n", worst_log_ulp<float>(1 << 22));
  std::printf("log_double %.3f\n", worst_log_ulp<double>(1 << 20));
  std::printf("log1p_float %.3f\n", worst_log1p_ulp<float>(1 << 22));
  std::printf("log1p_double %.3f\n", worst_log1p_ulp<double>(1 << 20));
  float edge[Simd<float>::width] = {0.0f, -INFINITY, NAN, -1e4f}, out[Simd<float>::width];
  store(out, exp2_nonpositive<float>(load(edge)));
  std::printf("edges %g %g %g %g\n", out[0], out[1], out[2], out[3]);
  print_bits<Half>("half");
  print_bits<BFloat16>("bfloat16");
  print_rounded<Half>("to_half");
  print_rounded<BFloat16>("to_bfloat16");
}
