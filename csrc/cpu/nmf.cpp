// nmf forward: steps + 1 passes over x.
#include "cpu/nmf.h"

namespace segnext {

void nmf_forward(const Matrices& x, const void* bases, int64_t rank, int64_t steps, const Matrices& y,
                 const Parallel& parallel) {
  with_accumulator(x.dtype, [&](auto* type) {
    Nmf<std::remove_pointer_t<decltype(type)>> nmf(x, bases, rank, steps, false, parallel);
    nmf.run();
    nmf.update_coefficients(steps, Then::kMultiply, &y);
  });
}

}  // namespace segnext
