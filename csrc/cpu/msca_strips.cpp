// msca_strips forward: one pass over x, everything in between in a ring of rows that stays in cache.
#include <algorithm>
#include <optional>

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

// An item is kStripRows rows of a group of channels. A thread that begins in the middle of a group computes 2 kReach rows of a
// more than it has; no output depends on where that is.
int64_t items_per_group(const Image& x) { return ceil_div(x.height, kStripRows); }

template <class A>
void forward(const Image& x, const StripFilters& filters, const Image& y, Share& items) {
  Buffer<A> taps(kTaps * kLanes<A>), out(x.width * kLanes<A>);
  StripRows<A> strips(x.width);
  Conv5x5Rows<A> stem(x, taps, false);
  std::optional<RowStarts<A>> starts;
  const Groups<A> groups(x);
  // A row of x, past the end of a group one of the next group.
  const auto row_ahead = [&](int64_t group, int64_t row) {
    if (row >= x.height && group + 1 < groups.items) ++group, row -= x.height;
    return RowAhead<A>(x, groups.image(group), groups.channel(group), row);
  };
  int64_t n = 0, c = 0, next_item = -1;
  for (const int64_t item : items) {
    const int64_t group = item / items_per_group(x), row = item % items_per_group(x) * kStripRows;
    if (row == 0 || item != next_item) {
      n = groups.image(group);
      c = groups.channel(group);
      load_strip_taps<A>(filters, x, c, taps);
      starts.emplace(taps, x.height);
      stem.restart(n, c, row - kReach);
    }
    next_item = item + 1;
    stem.advance(row + kStripRows - 1 + kReach);
    column_pass<A>(Window<A>(stem.a(), row, x.height), taps, x.width, strips);
    for (int64_t r = row; r < std::min(row + kStripRows, x.height); ++r) {
      const RowAhead<A> next = row_ahead(group, r + kStripRows + kReach + 2);  // what stem will load in its next step
      with_storage<A>(y.dtype, [&]<class T>() {
        const RowAccess<T> at(y, n, c, r);
        const bool whole = at.channels_last && at.channels >= kLanes<A>;
        row_pass<A>(strips, r - row, taps, stem.a()[r], (*starts)(r), x.width, [&](int64_t w, const auto& sums) {
          next.fetch(w, std::extent_v<std::remove_reference_t<decltype(sums)>>);
          if (whole) return store_tile<A>(at.first + w * at.pixel, at.pixel, sums);
          store_tile<A>(out + w * kLanes<A>, kLanes<A>, sums);
        });
        if (!whole) store_row<A>(y, n, c, r, out);
      });
    }
  }
}

}  // namespace

void msca_strips_forward(const Image& x, const StripFilters& filters, const Image& y, const Parallel& parallel) {
  constexpr int64_t kLeast = ceil_div(2 * kReach, kStripRows);
  with_accumulator(x.dtype, [&]<class A>() {
    const int64_t count = Groups<A>(x).items * items_per_group(x);
    parallel({count, std::min(kLeast, items_per_group(x))}, [&](Share& items) { forward<A>(x, filters, y, items); });
  });
}

}  // namespace segnext
