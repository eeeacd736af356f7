// GELU(z) = z Phi(z) and its slope Phi(z) + z phi(z) to the accuracy of the type, on several vectors at a time.
#pragma once
#include "cpu/simd.h"

namespace segnext {

// result = P(u) for u = 2 (z / end)^2 - 1, but at most 1. The loop over the coefficients stays a loop, since GCC would else
// compute one vector after the other, each waiting for itself.
template <int Tile, int N>
SEGNEXT_INLINE void even_polynomial(const Vector<float> (&z)[Tile], float end, const float (&p)[N],
                                    Vector<float> (&result)[Tile]) {
  Vector<float> u[Tile];
  SEGNEXT_UNROLL
  for (int i = 0; i < Tile; ++i) {
    u[i] = minimum(z[i] * z[i] * (2 / (end * end)) - 1.0f, 1.0f);
    result[i] = broadcast(p[N - 1]);
  }
  _Pragma("GCC unroll 1") for (int k = N - 2; k >= 0; --k) {
    const Vector<float> coefficient = broadcast(p[k]);
    SEGNEXT_UNROLL
    for (int i = 0; i < Tile; ++i) result[i] = result[i] * u[i] + coefficient;
  }
}

// z <- GELU(z). Phi is off by at most 3.3e-7. Its fit is past 0 and 1 at the ends, so that it is exact from there on.
template <int Tile>
SEGNEXT_INLINE void exact_gelu(Vector<float> (&z)[Tile]) {
  static constexpr float kFit[] = {0.138605297f,   -0.0690027475f,  0.0507813878f,  -0.0402319618f, 0.0317423083f,
                                   -0.0239226036f, 0.0173137039f,   -0.0122879352f, 0.00723992195f, -0.00291197584f,
                                   0.00197950029f, -0.00209370977f, 0.00082806102f};  // (Phi(z) - 1/2) / z
  Vector<float> fit[Tile];
  even_polynomial(z, 5.1f, kFit, fit);
  SEGNEXT_UNROLL
  for (int i = 0; i < Tile; ++i) z[i] *= 0.5f + clamp(z[i] * fit[i], 0.5f);
}

// z <- the slope, off by at most 4e-7 on |z| <= 3 and 3e-7 |z| beyond.
template <int Tile>
SEGNEXT_INLINE void gelu_slope(Vector<float> (&z)[Tile]) {
  constexpr float kEnd = 5.5f;
  static constexpr float kFit[] = {0.128759146f,   -0.0657395348f, 0.053673543f,  -0.0537500754f, 0.0601393767f, -0.0685762167f,
                                   0.0756528154f,  -0.0743470863f, 0.0596624576f, -0.0493789352f, 0.0511499569f, -0.0329588167f,
                                   0.00285837636f, -0.0028149609f, 0.0125009269f, -0.00592185091f};  // (slope - 1/2) / z
  Vector<float> fit[Tile];
  even_polynomial(z, kEnd, kFit, fit);
  SEGNEXT_UNROLL
  for (int i = 0; i < Tile; ++i) z[i] = z[i] < -kEnd ? Vector<float>{} : 0.5f + clamp(z[i], kEnd) * fit[i];
}

SEGNEXT_INLINE double normal_cdf(double z) { return 0.5 * std::erfc(z * -0.70710678118654752440); }

template <int Tile>
SEGNEXT_INLINE void exact_gelu(Vector<double> (&z)[Tile]) {
  for (auto& v : z) {
    for (int lane = 0; lane < kLanes<double>; ++lane) v[lane] *= normal_cdf(v[lane]);
  }
}

template <int Tile>
SEGNEXT_INLINE void gelu_slope(Vector<double> (&z)[Tile]) {
  constexpr double kDensity = 0.39894228040143267794;
  for (auto& v : z) {
    for (int lane = 0; lane < kLanes<double>; ++lane) {
      v[lane] = normal_cdf(v[lane]) + v[lane] * kDensity * std::exp(-0.5 * v[lane] * v[lane]);
    }
  }
}

}  // namespace segnext
