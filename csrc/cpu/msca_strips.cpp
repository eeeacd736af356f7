// msca_strips forward: one pass over x, everything in between in a ring of rows that stays in cache.
#include "cpu/strips.h"

namespace segnext {
namespace {

constexpr int kColumns[kBranches] = {column_taps(0), column_taps(1), column_taps(2)};
constexpr int kRows[kBranches] = {row_taps(0), row_taps(1), row_taps(2)};

// What the biases add to a whole output row: bv_k + bh_k * (the sum of V_k's taps that fall inside the image).
template <class A>
Vector<A> row_start(const A* taps, int64_t row, int64_t height) {
  constexpr int L = kLanes<A>;
  Vector<A> sum = {};
  for (int b = 0; b < kBranches; ++b) {
    Vector<A> inside = {};
    for (int t = 0; t < kBranchTaps[b]; ++t) {
      const int64_t r = row + t - kBranchTaps[b] / 2;
      if (r >= 0 && r < height) inside += load<A>(taps + (column_taps(b) + t) * L);
    }
    sum += load<A>(taps + row_bias(b) * L) * inside + load<A>(taps + column_bias(b) * L);
  }
  return sum;
}

template <class A>
void forward(const Image& x, const StripFilters& filters, const Image& y, int64_t begin, int64_t end) {
  const Groups<A> groups(x);
  Buffer<A> taps(kTaps * kLanes<A>), out(x.width * kLanes<A>);
  StripRows<A> strips(x.width);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = groups.image(item), c = groups.channel(item);
    load_strip_taps<A>(filters, x, c, taps);
    StemRows<A> stem(x, n, c, taps, kWindow - 1);
    for (int64_t row = 0; row < x.height; row += kStripRows) {
      stem.advance(row + kStripRows - 1 + kReach);
      column_pass<A>(Window<A>(stem.a(), row, x.height), taps, kColumns, x.width, strips);
      for (int64_t r = row; r < row + kStripRows && r < x.height; ++r) {
        row_pass<A>(strips, r - row, taps, kRows, stem.a()[r], row_start<A>(taps, r, x.height), x.width, out);
        store_row<A>(y, n, c, r, out);
      }
    }
  }
}

}  // namespace

int64_t msca_strips_items(const Image& x) {
  return x.images * (x.dtype == Dtype::kFloat64 ? Groups<double>(x).per_image : Groups<float>(x).per_image);
}

void msca_strips_forward(const Image& x, const StripFilters& filters, const Image& y, int64_t begin, int64_t end) {
  x.dtype == Dtype::kFloat64 ? forward<double>(x, filters, y, begin, end) : forward<float>(x, filters, y, begin, end);
}

}  // namespace segnext
