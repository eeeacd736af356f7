// nmf forward: steps + 1 passes over x.
#include "cpu/nmf.h"
#if defined(__AVX512BF16__)
#include "cpu/nmf_bfloat16.h"
#endif
#if defined(__AMX_BF16__)
#include "cpu/nmf_float32.h"
#endif

namespace segnext {

int64_t nmf_factors_size(const Matrices& x, int64_t rank, int64_t steps, bool one_step) {
  constexpr int64_t kWidest = 16;  // the most lanes of any instruction set, so that the size is the same for all
  const int64_t kept = one_step ? 0 : steps, padded = (rank + kWidest - 1) / kWidest * kWidest;
  return x.batch * ((2 * kept + 3) * x.columns + (2 * kept + 1) * x.rows) * padded;
}

void nmf_forward(const Matrices& x, const void* bases, int64_t rank, int64_t steps, bool rounded, bool one_step, void* factors,
                 const Matrices& y, const Parallel& parallel) {
  const Keep keep = factors == nullptr ? Keep::kNothing : one_step ? Keep::kLast : Keep::kAll;
#if defined(__AVX512BF16__)
  // What is kept is kept in float32's precision, more than products of bfloat16 have.
  if (x.dtype == Dtype::kBFloat16 && factors == nullptr && NmfOfBFloat16::serves(x, rank, rounded))
    return NmfOfBFloat16(x, rank, steps, rounded, parallel).run(bases, y);
#endif
#if defined(__AMX_BF16__)
  if (x.dtype == Dtype::kFloat32 && NmfOfFloat32::serves(x))
    return NmfOfFloat32(x, rank, steps, keep, factors, parallel).run(bases, y);
#endif
  with_accumulator(x.dtype, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    Nmf<A> nmf(x, rank, steps, keep, factors, parallel);
    if (factors != nullptr) {
      const int64_t unused = nmf_factors_size(x, rank, steps, one_step) - nmf.size();
      std::memset(static_cast<A*>(factors) + nmf.size(), 0, sizeof(A) * unused);
    }
    nmf.run(bases);
    nmf.update_coefficients(steps, Then::kMultiply, &y);
  });
}

}  // namespace segnext
