// msca_strips forward: one pass over x, everything in between in a ring of rows that stays in cache.
#include <algorithm>

#include "cpu/strips.h"

namespace segnext {
namespace {

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

// An item is a group of channels of an image, or a part of its rows where the groups are fewer than the threads. Parts compute
// kReach rows of a beyond their own once more; no output depends on where the parts begin.
template <class A>
struct Parts {
  Groups<A> groups;
  int64_t per_group, rows;

  Parts(const Image& x, int64_t threads) : groups(x) {
    const int64_t wanted = groups.items > 0 ? (threads + groups.items - 1) / groups.items : 1;
    rows = (x.height + wanted - 1) / wanted;
    rows = (rows + kStripRows - 1) / kStripRows * kStripRows;
    rows = rows < 2 * kReach ? 2 * kReach : rows;
    per_group = (x.height + rows - 1) / rows;
  }
};

template <class A>
void forward(const Image& x, const StripFilters& filters, const Image& y, const Parts<A>& parts, int64_t begin, int64_t end) {
  Buffer<A> taps(kTaps * kLanes<A>), out(x.width * kLanes<A>);
  StripRows<A> strips(x.width);
  StemRows<A> stem(x, taps, false);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = parts.groups.image(item / parts.per_group), c = parts.groups.channel(item / parts.per_group);
    const int64_t first = item % parts.per_group * parts.rows, last = std::min(first + parts.rows, x.height);
    load_strip_taps<A>(filters, x, c, taps);
    const RowStarts<A> starts(taps, x.height);
    stem.restart(n, c, first - kReach);
    for (int64_t row = first; row < last; row += kStripRows) {
      stem.advance(row + kStripRows - 1 + kReach);
      column_pass<A>(Window<A>(stem.a(), row, x.height), taps, x.width, strips);
      for (int64_t r = row; r < row + kStripRows && r < last; ++r) {
        const RowAhead<A> next(x, n, c, r + kStripRows + kReach + 2);  // what stem will load in its next step
        with_storage<A>(y.dtype, [&](auto* type) {
          using T = std::remove_pointer_t<decltype(type)>;
          const RowAccess<T> at(y, n, c, r);
          const bool whole = at.channels_last && at.channels >= kLanes<A>;
          row_pass<A>(strips, r - row, taps, stem.a()[r], starts(r), x.width, [&](int64_t w, const auto& sums) {
            next.fetch(w, std::extent_v<std::remove_reference_t<decltype(sums)>>);
            if (whole) return store_tile<A>(at.first + w * at.pixel, at.pixel, sums);
            store_tile<A>(out + w * kLanes<A>, kLanes<A>, sums);
          });
          if (!whole) store_row<A>(y, n, c, r, out);
        });
      }
    }
  }
}

}  // namespace

void msca_strips_forward(const Image& x, const StripFilters& filters, const Image& y, const Parallel& parallel) {
  with_accumulator(x.dtype, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    const Parts<A> parts(x, parallel.threads);
    parallel(parts.groups.items * parts.per_group,
             [&](int64_t begin, int64_t end) { forward<A>(x, filters, y, parts, begin, end); });
  });
}

}  // namespace segnext
