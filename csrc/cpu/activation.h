// The activations of fused products, to the accuracy of T: float or BFloat16.
#pragma once
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace segnext {

SEGNEXT_INLINE Vector<float> relu(Vector<float> z) { return z < 0.0f ? Vector<float>{} : z; }  // NaN stays

// GELU(z) = z (1 / 2 + c P(u)) with c = z clamped to [-end, end] and u the polynomial `square` of c^2. P is fitted for the
// least error of GELU and so that c P is one half at the end: from there on it is the ReLU, but for rounding. Minus infinity
// stays where multiply-adds are fused, and is NaN elsewhere, as in PyTorch.
template <int Tile, int N, class F>
SEGNEXT_INLINE void gelu(Vector<float> (&z)[Tile], float end, const float (&p)[N], const F& square) {
  typedef Vector<float> V;
  V c[Tile], u[Tile], sum[Tile];
  SEGNEXT_UNROLL
  for (int i = 0; i < Tile; ++i) {
    c[i] = clamp(z[i], end);
    u[i] = square(c[i]);
    sum[i] = broadcast(p[N - 1]);
  }
  SEGNEXT_UNROLL
  for (int k = N - 2; k >= 0; --k) {
    const V coefficient = broadcast(p[k]);
    SEGNEXT_UNROLL
    for (int i = 0; i < Tile; ++i) sum[i] = sum[i] * u[i] + coefficient;
  }
  SEGNEXT_UNROLL
  for (int i = 0; i < Tile; ++i) z[i] *= c[i] * sum[i] + 0.5f;
}

// The largest error on |z| <= 1 and, beyond, its largest part of |z|: 7e-7 for float, 2.1e-4 for BFloat16.
template <class T, int Tile>
SEGNEXT_INLINE void gelu(Vector<float> (&z)[Tile]) {
  typedef Vector<float> V;
  if constexpr (sizeof(T) == 2) {
    gelu(z, 3.6f, {0.3976631f, -0.06397677f, 0.008361957f, -0.0006989866f, 3.270045e-05f, -6.430164e-07f},
         [](V c) { return c * c; });
  } else {
    gelu(z, 4.9f,
         {0.14423081f, -0.071623296f, 0.05224643f, -0.040546604f, 0.030924395f, -0.022733152f, 0.015991094f, -0.00949704f,
          0.0044331765f, -0.0030957311f, 0.0026627209f, -0.00095198944f},
         [](V c) {
           const V scaled = c * 0.288615013f;  // u = 2 (c / end)^2 - 1
           return scaled * scaled - 1.0f;
         });
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

// Calls f<activation>().
template <class F>
void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kGelu:
      return f.template operator()<Activation::kGelu>();
    case Activation::kRelu:
      return f.template operator()<Activation::kRelu>();
    default:
      return f.template operator()<Activation::kNone>();
  }
}

}  // namespace segnext
