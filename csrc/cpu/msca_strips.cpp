// msca_strips forward: one pass over x, everything in between in a ring of rows that stays in cache.
#include "cpu/strips.h"

namespace segnext {
namespace {

constexpr int kColumns[kBranches] = {column_taps(0), column_taps(1), column_taps(2)};
constexpr int kRows[kBranches] = {row_taps(0), row_taps(1), row_taps(2)};

// What the biases add to a whole output row: bv_k + bh_k * (the sum of V_k's taps that fall inside the image). The sums of a
// range of taps are differences of running sums.
template <class A>
class RowStarts {
 public:
  RowStarts(const A* taps, int64_t height) : taps_(taps), height_(height) {
    for (int b = 0; b < kBranches; ++b) {
      running_[b][0] = Vector<A>{};
      for (int t = 0; t < kBranchTaps[b]; ++t) {
        running_[b][t + 1] = running_[b][t] + load<A>(taps + (column_taps(b) + t) * kLanes<A>);
      }
    }
  }
  Vector<A> operator()(int64_t row) const {
    Vector<A> sum = {};
    for (int b = 0; b < kBranches; ++b) {
      const int64_t above = row - kBranchTaps[b] / 2, below = height_ - above;
      const int64_t first = above < 0 ? -above : 0, last = below < kBranchTaps[b] ? below : kBranchTaps[b];
      sum += load<A>(taps_ + row_bias(b) * kLanes<A>) * (running_[b][last] - running_[b][first]);
      sum += load<A>(taps_ + column_bias(b) * kLanes<A>);
    }
    return sum;
  }

 private:
  const A* taps_;
  int64_t height_;
  Vector<A> running_[kBranches][kBranchTaps[kBranches - 1] + 1];
};

template <class A>
void forward(const Image& x, const StripFilters& filters, const Image& y, int64_t begin, int64_t end) {
  const Groups<A> groups(x);
  Buffer<A> taps(kTaps * kLanes<A>), out(x.width * kLanes<A>);
  StripRows<A> strips(x.width);
  StemRows<A> stem(x, taps, kWindow - 1);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = groups.image(item), c = groups.channel(item);
    load_strip_taps<A>(filters, x, c, taps);
    const RowStarts<A> starts(taps, x.height);
    stem.restart(n, c);
    for (int64_t row = 0; row < x.height; row += kStripRows) {
      stem.advance(row + kStripRows - 1 + kReach);
      column_pass<A>(Window<A>(stem.a(), row, x.height), taps, kColumns, x.width, strips);
      for (int64_t r = row; r < row + kStripRows && r < x.height; ++r) {
        row_pass<A>(strips, r - row, taps, kRows, stem.a()[r], starts(r), x.width, out);
        store_row<A>(y, n, c, r, out);
      }
    }
  }
}

}  // namespace

void msca_strips_forward(const Image& x, const StripFilters& filters, const Image& y, const Parallel& parallel) {
  with_accumulator(x.dtype, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    parallel(Groups<A>(x).items, [&](int64_t begin, int64_t end) { forward<A>(x, filters, y, begin, end); });
  });
}

}  // namespace segnext
