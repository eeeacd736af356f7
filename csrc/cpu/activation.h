// The activations of fused products, on values that are then stored as T: float or BFloat16.
#pragma once
#include "cpu/simd.h"

namespace segnext {

enum class Activation { kNone, kGelu, kRelu };

SEGNEXT_INLINE Vector<float> relu(Vector<float> z) { return z < 0.0f ? Vector<float>{} : z; }  // NaN stays

// GELU(z) = z / 2 + |z| erf(|z| / sqrt 2) / 2. The second factor is t P(u) with t = min(|z|, end) and u = 2 (t / end)^2 - 1; P
// is fitted for the least error of GELU and is one half at the end, so that GELU is the ReLU from there on.
template <int Tile, int N>
SEGNEXT_INLINE void gelu(Vector<float> (&z)[Tile], float end, float scale, const float (&p)[N]) {
  typedef Vector<float> V;
  V u[Tile], sum[Tile];
  SEGNEXT_UNROLL
  for (int i = 0; i < Tile; ++i) {
    const V v = minimum(absolute(z[i]), end) * scale;
    u[i] = v * v - 1.0f;
    sum[i] = broadcast(p[N - 1]);
  }
  SEGNEXT_UNROLL
  for (int k = N - 2; k >= 0; --k) {
    const V coefficient = broadcast(p[k]);
    SEGNEXT_UNROLL
    for (int i = 0; i < Tile; ++i) sum[i] = sum[i] * u[i] + coefficient;
  }
  SEGNEXT_UNROLL
  for (int i = 0; i < Tile; ++i) {
    const V magnitude = absolute(z[i]);
    z[i] = magnitude * (minimum(magnitude, end) * sum[i]) + 0.5f * z[i];
  }
}

// The largest error on |z| <= 1 and, beyond, its largest part of |z|: 7e-7 for float, 2e-4 for BFloat16.
template <class T, int Tile>
SEGNEXT_INLINE void gelu(Vector<float> (&z)[Tile]) {
  if constexpr (sizeof(T) == 2) {
    gelu(z, 4.0f, 0.353553385f,
         {0.17597076f, -0.084424555f, 0.05539512f, -0.035476062f, 0.024147887f, -0.016534522f, 0.0059213713f});
  } else {
    gelu(z, 5.2f, 0.271964133f,
         {0.13594992f, -0.0677434f, 0.05003019f, -0.03994143f, 0.031907137f, -0.024592325f, 0.018387174f, -0.013106383f,
          0.007558543f, -0.0035021862f, 0.0028524967f, -0.0025051567f, 0.0008592553f});
  }
}

template <Activation act, class T, int Tile>
SEGNEXT_INLINE void activate(Vector<float> (&z)[Tile]) {
  if constexpr (act == Activation::kGelu) gelu<T>(z);
  if constexpr (act == Activation::kRelu) {
    SEGNEXT_UNROLL
    for (int i = 0; i < Tile; ++i) z[i] = relu(z[i]);
  }
}

// Calls f with the activation as an integral constant.
template <class F>
void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>{});
    default:
      return f(std::integral_constant<Activation, Activation::kNone>{});
  }
}

}  // namespace segnext
