// nmf forward: steps + 1 passes over x.
#include "cpu/nmf.h"
#if defined(__AMX_BF16__)
#include "cpu/nmf_bfloat16.h"
#include "cpu/nmf_float32.h"
#endif

namespace segnext {

void nmf_forward(const Matrices& x, const void* bases, int64_t rank, int64_t steps, const Matrices& y,
                 const Parallel& parallel) {
#if defined(__AMX_BF16__)
  if (x.dtype == Dtype::kBFloat16 && NmfOfBFloat16::serves(x)) return NmfOfBFloat16(x, bases, rank, steps, parallel).run(y);
  if (x.dtype == Dtype::kFloat32 && NmfOfFloat32::serves(x)) return NmfOfFloat32(x, bases, rank, steps, parallel).run(y);
#endif
  with_accumulator(x.dtype, [&](auto* type) {
    Nmf<std::remove_pointer_t<decltype(type)>> nmf(x, bases, rank, steps, false, parallel);
    nmf.run();
    nmf.update_coefficients(steps, Then::kMultiply, &y);
  });
}

}  // namespace segnext
