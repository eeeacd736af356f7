// Which nmf serves forward of x: products of float, or of bfloat16 where the processor has them.
#pragma once
#include "cpu/nmf.h"
#if defined(__AVX512BF16__)
#include "cpu/nmf_bfloat16.h"
#endif
#if defined(__AMX_BF16__)
#include "cpu/nmf_float32.h"
#endif

namespace segnext {

// Calls f(nmf), whose accumulators are float; for x of any dtype but float64. The arguments are those of nmf_forward.
template <class F>
void with_nmf(const Matrices& x, int64_t rank, int64_t steps, bool rounded, Keep keep, void* factors, const Parallel& parallel,
              const F& f) {
#if defined(__AVX512BF16__)
  // What is kept is kept in float32's precision, more than products of bfloat16 have.
  if (x.dtype == Dtype::kBFloat16 && factors == nullptr && NmfOfBFloat16::serves(x, rank, rounded)) {
    NmfOfBFloat16 nmf(x, rank, steps, rounded, parallel);
    return f(nmf);
  }
#endif
#if defined(__AMX_BF16__)
  if (x.dtype == Dtype::kFloat32 && NmfOfFloat32::serves(x)) {
    NmfOfFloat32 nmf(x, rank, steps, keep, factors, parallel);
    return f(nmf);
  }
#endif
  Nmf<float> nmf(x, rank, steps, keep, factors, parallel);
  f(nmf);
}

}  // namespace segnext
