// What msca_strips' forward and backward share: the taps in vector form and the two strip passes.
//
// H and V commute (they work on different axes, and zero padding is linear), so a column pass over the ring of rows comes
// first: it needs one ring instead of one per branch, and the row pass then adds all branches into one set of registers.
#pragma once
#include "cpu/kernels.h"
#include "cpu/stencil.h"

namespace segnext {

// Output rows computed together, so that a row read from the ring serves several; as many sums of two pixels as registers hold.
inline constexpr int kStripRows = kRegisters == 32 ? 8 : 4;
inline constexpr int kWindow = kStripRows + 2 * kReach;
// Pixels more between rows: at distances of whole pages they would share few places in a cache.
inline constexpr int kApart = 1;

// Where each tensor's taps lie in one group's [kTaps][kLanes].
constexpr int tensor_offset(int tensor) {
  int offset = 0;
  for (int i = 0; i < tensor; ++i) offset += kStripTaps[i];
  return offset;
}
inline constexpr int kTaps = tensor_offset(kStripTensors);
inline constexpr int kW5 = tensor_offset(0), kB5 = tensor_offset(1);
constexpr int row_taps(int branch) { return tensor_offset(2 + 4 * branch); }
constexpr int row_bias(int branch) { return tensor_offset(3 + 4 * branch); }
constexpr int column_taps(int branch) { return tensor_offset(4 + 4 * branch); }
constexpr int column_bias(int branch) { return tensor_offset(5 + 4 * branch); }
inline constexpr int kRowTaps[kBranches] = {row_taps(0), row_taps(1), row_taps(2)};
inline constexpr int kColumnTaps[kBranches] = {column_taps(0), column_taps(1), column_taps(2)};

template <class A>
void load_strip_taps(const StripFilters& filters, const Image& x, int64_t c, A* taps) {
  for (int i = 0; i < kStripTensors; ++i) {
    load_row<A>(filter_row(filters.tensors[i], filters.dtype, x.channels, kStripTaps[i]), 0, c, 0,
                taps + tensor_offset(i) * kLanes<A>);
  }
}

// Calls f(integral constant) for each branch.
template <class F>
SEGNEXT_INLINE void for_branches(const F& f) {
  f(std::integral_constant<int, 0>{});
  f(std::integral_constant<int, 1>{});
  f(std::integral_constant<int, 2>{});
}

// The rows row - kReach ... of a ring that a window of kStripRows output rows needs; null outside the image.
template <class A>
struct Window {
  const A* rows[kWindow];
  Window(const RowRing<A>& ring, int64_t row, int64_t height) {
    for (int i = 0; i < kWindow; ++i) {
      const int64_t r = row - kReach + i;
      rows[i] = r >= 0 && r < height ? ring[r] : nullptr;
    }
  }
};

// Rows [branch][kStripRows][width + kApart]: the column pass writes them, the row pass reads them.
template <class A>
class StripRows {
 public:
  explicit StripRows(int64_t width) : row_size_((width + kApart) * kLanes<A>), rows_(kBranches * kStripRows * row_size_) {}
  A* operator()(int branch, int row) const { return rows_ + (branch * kStripRows + row) * row_size_; }

 private:
  int64_t row_size_;
  Buffer<A> rows_;
};

// column_pass for one branch on the pixels w ... w + Tile - 1; row i of the branch's window is rows[i].
template <class A, int K, int Tile>
SEGNEXT_NOINLINE void column_tile(const A* const* rows, const A* taps, int64_t w, const StripRows<A>& out, int branch) {
  constexpr int L = kLanes<A>;
  Vector<A> acc[kStripRows][Tile] = {}, tap[K];
  SEGNEXT_UNROLL
  for (int i = 0; i < kStripRows + K - 1; ++i) {
    if (i < K) tap[i] = load<A>(taps + i * L);
    if (rows[i] == nullptr) continue;
    SEGNEXT_UNROLL
    for (int p = 0; p < Tile; ++p) {
      const Vector<A> v = load<A>(rows[i] + (w + p) * L);
      SEGNEXT_UNROLL
      for (int j = 0; j < kStripRows; ++j) {
        if (i - j >= 0 && i - j < K) acc[j][p] += tap[i - j] * v;
      }
    }
  }
  SEGNEXT_UNROLL
  for (int j = 0; j < kStripRows; ++j) {
    SEGNEXT_UNROLL
    for (int p = 0; p < Tile; ++p) store<A>(out(branch, j) + (w + p) * L, acc[j][p]);
  }
}

// out(b, j)[w] = sum over t of taps_b[t] * row (j + t - k_b / 2)[w], for kStripRows rows j and all branches. These take turns
// on few pixels, where the window's rows are then in the first cache.
template <class A>
void column_pass(const Window<A>& window, const A* taps, int64_t width, const StripRows<A>& out) {
  constexpr int kPixels = 2;
  for_tiles<kTile>(width, [&](int64_t first, auto size) {
    constexpr int tile = size < kPixels ? size : kPixels;
    for_branches([&](auto b) {
      constexpr int K = kBranchTaps[b];
      for (int64_t w = first; w < first + size; w += tile) {
        column_tile<A, K, tile>(window.rows + kReach - K / 2, taps + kColumnTaps[b] * kLanes<A>, w, out, b);
      }
    });
  });
}

// What strip_tile does, with all of the tile's pixels in reach known to be inside the row or not.
template <class A, int K, bool Inside, int Tile>
SEGNEXT_INLINE void strip_tile_at(const A* row, const A* taps, int64_t w, int64_t width, Vector<A> (&acc)[Tile]) {
  constexpr int L = kLanes<A>;
  constexpr bool kHold = kRegisters == 32;  // a part of the taps is held in registers, else each is read where it is used
  constexpr int kPart = kHold ? 12 : K;
  SEGNEXT_UNROLL
  for (int first = 0; first < K; first += kPart) {
    const int count = K - first < kPart ? K - first : kPart;
    const int64_t from = w - K / 2 + first;
    Vector<A> held[kPart];
    SEGNEXT_UNROLL
    for (int t = 0; kHold && t < count; ++t) held[t] = load<A>(taps + (first + t) * L);
    SEGNEXT_UNROLL
    for (int i = 0; i < Tile + count - 1; ++i) {
      if (!Inside && (from + i < 0 || from + i >= width)) continue;
      const Vector<A> v = load<A>(row + (from + i) * L);
      SEGNEXT_UNROLL
      for (int t = 0; t < count; ++t) {
        if (i - t >= 0 && i - t < Tile) acc[i - t] += (kHold ? held[t] : load<A>(taps + (first + t) * L)) * v;
      }
    }
  }
}

// acc[i] += sum over t of taps[t] * row[w + i + t - K / 2], in which pixels outside the row are left out
template <class A, int K, int Tile>
SEGNEXT_INLINE void strip_tile(const A* row, const A* taps, int64_t w, int64_t width, Vector<A> (&acc)[Tile]) {
  if (w >= K / 2 && w + Tile + K / 2 <= width) return strip_tile_at<A, K, true>(row, taps, w, width, acc);
  strip_tile_at<A, K, false>(row, taps, w, width, acc);
}

// put(w, sums) <- (start + base + sum over branches of taps_b * strips(b, row))[w ...], a tile of pixels at a time
template <class A, class F>
SEGNEXT_NOINLINE void row_pass(const StripRows<A>& strips, int row, const A* taps, const A* base, Vector<A> start,
                               int64_t width, const F& put) {
  constexpr int L = kLanes<A>;
  for_tiles<kTile>(width, [&](int64_t w, auto size) {
    constexpr int tile = size;
    Vector<A> acc[tile];
    SEGNEXT_UNROLL
    for (int i = 0; i < tile; ++i) acc[i] = start + load<A>(base + (w + i) * L);
    for_branches([&](auto b) { strip_tile<A, kBranchTaps[b]>(strips(b, row), taps + kRowTaps[b] * L, w, width, acc); });
    put(w, acc);
  });
}

// Computes a = W5 * x + b5 row by row, staging x on the way. The caller may read a window of rows of a and, if `for_gradients`
// of taps, kReach zero pixels at their ends and the rows of x around the window's middle rows.
template <class A>
class Conv5x5Rows {
 public:
  Conv5x5Rows(const Image& x, const A* taps, bool for_gradients)
      : x_(x),
        taps_(taps),
        x_rows_(for_gradients ? kStripRows + kReach + 5 : 5, x.width, 2),
        a_rows_(kWindow, x.width, for_gradients ? kReach : kApart) {}
  // Begins with another group of channels, at row `first` of a (clipped to the image).
  void restart(int64_t n, int64_t c, int64_t first) {
    n_ = n;
    c_ = c;
    next_ = first > 0 ? first : 0;
    next_x_ = next_ > 2 ? next_ - 2 : 0;
  }
  // Makes all rows up to `last` (clipped to the image) available.
  void advance(int64_t last) {
    last = last < x_.height ? last : x_.height - 1;
    for (; next_ <= last; ++next_) {
      for (; next_x_ <= next_ + 2 && next_x_ < x_.height; ++next_x_) load_row<A>(x_, n_, c_, next_x_, x_rows_[next_x_]);
      const A* rows[5];
      x_rows_.window(next_, 0, x_.height, rows);
      depthwise<A, 5>(rows, taps_ + kW5 * kLanes<A>, load<A>(taps_ + kB5 * kLanes<A>), x_.width, a_rows_[next_]);
    }
  }
  const RowRing<A>& x() const { return x_rows_; }
  const RowRing<A>& a() const { return a_rows_; }

 private:
  const Image& x_;
  const A* taps_;
  int64_t n_ = 0, c_ = 0, next_ = 0, next_x_ = 0;
  RowRing<A> x_rows_, a_rows_;
};

}  // namespace segnext
