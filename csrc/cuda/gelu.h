// GELU in its erf form, and its slope, without branches.
//
// With t = |z| and P the normal distribution's P(-t): gelu(z) = max(z, 0) - t P(-t). The logarithm of P(-t) is so smooth that
// one polynomial of degree 8 serves all t: it was fitted to 1.5e-8 of max(t, 1) P(-t) for t up to 6, and falls without end
// beyond. In float32 the result is within 8e-8 of max(|z|, 1); 0.5 z (1 + erf(z / sqrt(2))) takes twice as many instructions.
#pragma once
#include "cuda/memory.h"

namespace segnext::cuda {

// 2^v to two units in the last place, 0 where that is below the normal numbers.
__device__ __forceinline__ float power_of_two(float v) {
#ifdef SEGNEXT_HOST_RUN
  return exp2f(v);
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v));
  return power;
#endif
}

// P(-t)
__device__ __forceinline__ float normal_tail(float t) {
  float q = -2.3349487e-06f;
  q = q * t + 3.3737812e-05f;
  q = q * t - 1.6129382e-04f;
  q = q * t - 1.9170358e-04f;
  q = q * t + 7.1268650e-03f;
  q = q * t - 5.2533612e-02f;
  q = q * t - 4.5919830e-01f;
  q = q * t - 1.1511060f;
  return power_of_two(q * t - 1);
}

__device__ __forceinline__ float gelu(float z) {
  const float t = fabsf(z);
  return fmaxf(z, 0.0f) - fminf(t, 16.0f) * normal_tail(t);  // 16: infinity times zero is none; NaN comes with the tail
}

// With z's density d(z): P(z) + z d(z), which is 1 less what it is for -t where z is positive.
__device__ __forceinline__ float gelu_slope(float z) {
  const float t = fabsf(z);
  const float density = power_of_two(z * z * -0.72134752f - 1.3257481f);
  const float half = t * density - normal_tail(t) + 0.5f;
  return 0.5f + copysignf(half, z);
}

}  // namespace segnext::cuda
