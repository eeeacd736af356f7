// nmf forward: steps + 1 passes over x.
#include <new>

#include "cpu/nmf_forward.h"

namespace segnext {

int64_t nmf_factors_size(const Matrices& x, int64_t rank, int64_t steps, bool one_step) {
  constexpr int64_t kWidest = 16;  // the most lanes of any instruction set, so that the size is the same for all
  const int64_t kept = one_step ? 0 : steps, padded = round_up(rank, kWidest);
  const double about = (2.0 * kept + 3) * x.columns + (2.0 * kept + 1) * x.rows;
  if (about * x.batch * padded > 0x1p60) throw std::bad_alloc();
  return x.batch * ((2 * kept + 3) * x.columns + (2 * kept + 1) * x.rows) * padded;
}

void nmf_forward(const Matrices& x, const void* bases, int64_t rank, int64_t steps, bool rounded, bool one_step, void* factors,
                 const void* projection, const Matrices& y, const Parallel& parallel) {
  const Keep keep = factors == nullptr ? Keep::kNothing : one_step ? Keep::kLast : Keep::kAll;
  auto run = [&](auto& nmf) {
    using A = typename std::remove_reference_t<decltype(nmf)>::Accumulator;
    if (factors != nullptr) {
      const int64_t unused = nmf_factors_size(x, rank, steps, one_step) - nmf.size();
      std::memset(static_cast<A*>(factors) + nmf.size(), 0, sizeof(A) * unused);
    }
    nmf.run(bases, &y, static_cast<const A*>(projection));
  };
  if (x.dtype != Dtype::kFloat64) return with_nmf(x, rank, steps, rounded, keep, factors, parallel, run);
  Nmf<double> nmf(x, rank, steps, keep, factors, parallel);
  run(nmf);
}

}  // namespace segnext
