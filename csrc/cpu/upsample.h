// Bilinear upsampling of logits, tile by tile, for what is computed from the upsampled values and never needs all of them.
//
// Between two rows of the logits every output row is a mix of the same two rows, so these are resized horizontally once and
// serve all output rows between them. A tile is kLanes columns of the output by all classes, one vector for each class:
// whatever is computed across the classes then needs no sum across a vector's lanes.
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/image.h"
#include "cpu/kernels.h"
#include "cpu/sample.h"

namespace segnext {

template <class A>
struct Upsampling {
  static constexpr int64_t kRows = 4;  // gaps between the logits' rows in an item

  Image logits;
  int64_t width, groups, blocks, items;  // width: of the output; items: blocks of gaps of one image each
  std::vector<Sample<A>> rows, columns;
  std::vector<int64_t> first_row;  // of the output's rows, for every gap; one more for the end

  Upsampling(const Image& logits, int64_t height, int64_t width)
      : logits(logits),
        width(width),
        groups(Groups<A>(logits).per_image),
        blocks(ceil_div(logits.height, kRows)),
        items(height > 0 && width > 0 ? logits.images * blocks : 0),
        rows(items > 0 ? samples<A>(logits.height, height) : std::vector<Sample<A>>()),
        columns(items > 0 ? samples<A>(logits.width, width) : std::vector<Sample<A>>()) {
    if (items == 0) return;
    for (int64_t gap = 0; gap <= logits.height; ++gap) {
      const auto at = std::partition_point(rows.begin(), rows.end(), [&](const Sample<A>& s) { return s.low < gap; });
      first_row.push_back(at - rows.begin());
    }
    // Enough columns for whole vectors, so that a tile needs no special case at the right edge.
    columns.resize(round_up(width, kLanes<A>), columns.back());
  }
  int64_t height() const { return static_cast<int64_t>(rows.size()); }
  int64_t row_size() const { return groups * logits.width * kLanes<A>; }  // of a row of logits, [groups][width][kLanes]
};

// The upsampled logits at output row r in columns [column, column + lanes) are upper + rows[r].weight * step, for every class.
template <class A>
struct UpsampledTile {
  int64_t image, gap, first_row, last_row, column;
  int lanes;
  const A *upper, *step;  // [classes][kLanes]
};

// The tiles of one item after another, in memory of its own.
template <class A>
class UpsampledTiles {
  static constexpr int L = kLanes<A>;

 public:
  explicit UpsampledTiles(const Upsampling<A>& up)
      : up_(up),
        staged_((up.kRows + 1) * up.row_size()),
        upper_(up.groups * L * L),
        lower_(up.groups * L * L),
        step_(up.groups * L * L) {}

  template <class F>
  void run(int64_t item, const F& f) {
    const Image& x = up_.logits;
    const int64_t n = item / up_.blocks, first = item % up_.blocks * up_.kRows, last = std::min(first + up_.kRows, x.height);
    const int64_t width = up_.width, size = up_.row_size();
    for (int64_t row = first; row <= last; ++row)
      load_row<A>(x, n, 0, std::min(row, x.height - 1), staged_ + (row - first) * size, up_.groups, x.width * L);
    for (int64_t column = 0; column < width; column += L) {
      A *upper = upper_, *lower = lower_;
      resize(staged_, column, upper);
      for (int64_t gap = first; gap < last; ++gap) {
        resize(staged_ + (gap + 1 - first) * size, column, lower);
        for (int64_t i = 0; i < up_.groups * L * L; i += L) store<A>(step_ + i, load<A>(lower + i) - load<A>(upper + i));
        const int lanes = static_cast<int>(std::min<int64_t>(L, width - column));
        f(UpsampledTile<A>{n, gap, up_.first_row[gap], up_.first_row[gap + 1], column, lanes, upper, step_});
        std::swap(upper, lower);
      }
    }
  }

 private:
  // out [classes][kLanes] <- a row of logits [groups][width][kLanes] at kLanes columns of the output
  void resize(const A* row, int64_t column, A* out) const {
    for (int64_t g = 0; g < up_.groups; ++g, row += up_.logits.width * L, out += L * L) {
      Vector<A> block[L];
      for (int i = 0; i < L; ++i) {
        const Sample<A>& s = up_.columns[column + i];
        block[i] = lerp<A>(row + s.low * L, row + s.high * L, s.weight);
      }
      transpose<A>(block);
      for (int i = 0; i < L; ++i) store<A>(out + i * L, block[i]);
    }
  }

  const Upsampling<A>& up_;
  Buffer<A> staged_, upper_, lower_, step_;
};

}  // namespace segnext
