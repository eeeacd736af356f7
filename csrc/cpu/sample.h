// Bilinear sampling without aligned corners, as PyTorch's interpolate does it.
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/simd.h"

namespace segnext {

// Where the value of one output row or column is found: (1 - weight) of `low`, weight of `high`.
template <class A>
struct Sample {
  int64_t low = 0, high = 0;
  A weight = 0;

  Sample() = default;
  Sample(int64_t at, int64_t in, int64_t out) {
    const A scale = static_cast<A>(in) / static_cast<A>(out), half = static_cast<A>(0.5), zero = 0, one = 1;
    const A source = std::max((static_cast<A>(at) + half) * scale - half, zero);
    low = std::min(static_cast<int64_t>(source), in - 1);
    high = std::min(low + 1, in - 1);
    weight = std::clamp(source - static_cast<A>(low), zero, one);
  }
};

// Of all rows or columns.
template <class A>
std::vector<Sample<A>> samples(int64_t in, int64_t out) {
  std::vector<Sample<A>> all;
  for (int64_t at = 0; at < out; ++at) all.emplace_back(at, in, out);
  return all;
}

template <class A>
SEGNEXT_INLINE Vector<A> lerp(const A* low, const A* high, A weight) {
  const Vector<A> a = load<A>(low);
  return a + (load<A>(high) - a) * weight;
}

}  // namespace segnext
