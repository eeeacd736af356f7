// What msca_strips' forward and backward share: the taps in vector form and the two strip passes.
//
// H and V commute (they work on different axes, and zero padding is linear), so a column pass over the ring of rows comes
// first: it needs one ring instead of one per branch, and the row pass then adds all branches into one set of registers.
#pragma once
#include "cpu/kernels.h"
#include "cpu/stencil.h"

namespace segnext {

inline constexpr int kStripRows = 4;  // output rows computed together, so that a row read from the ring serves several
inline constexpr int kWindow = kStripRows + 2 * kReach;

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
    load_row<A>(filter_row(filters.tensors[i], x.dtype, x.channels, kStripTaps[i]), 0, c, 0,
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

// Buffers [branch][kStripRows] of rows padded by kReach zero pixels: the column pass writes them, the row pass reads them.
template <class A>
class StripRows {
 public:
  explicit StripRows(int64_t width) : ring_(kBranches * kStripRows, width, kReach) {}
  A* operator()(int branch, int row) const { return ring_[branch * kStripRows + row]; }

 private:
  RowRing<A> ring_;
};

// out(b, j)[w] = sum over t of taps_b[t] * row (j + t - k_b / 2)[w], for kStripRows rows j and all branches
template <class A>
void column_pass(const Window<A>& window, const A* taps, int64_t width, const StripRows<A>& out) {
  constexpr int L = kLanes<A>;
  constexpr int kPixels = kRegisters == 32 ? 2 : 1;
  for_tiles<kPixels>(width, [&](int64_t w, auto size) {
    constexpr int tile = size;
    Vector<A> acc[kBranches][kStripRows][tile] = {};
    SEGNEXT_UNROLL
    for (int i = 0; i < kWindow; ++i) {
      if (window.rows[i] == nullptr) continue;
      Vector<A> v[tile];
      SEGNEXT_UNROLL
      for (int p = 0; p < tile; ++p) v[p] = load<A>(window.rows[i] + (w + p) * L);
      SEGNEXT_UNROLL
      for (int b = 0; b < kBranches; ++b) {
        SEGNEXT_UNROLL
        for (int j = 0; j < kStripRows; ++j) {
          const int t = i - j - kReach + kBranchTaps[b] / 2;
          if (t < 0 || t >= kBranchTaps[b]) continue;
          const Vector<A> tap = load<A>(taps + (kColumnTaps[b] + t) * L);
          SEGNEXT_UNROLL
          for (int p = 0; p < tile; ++p) acc[b][j][p] += tap * v[p];
        }
      }
    }
    SEGNEXT_UNROLL
    for (int b = 0; b < kBranches; ++b) {
      SEGNEXT_UNROLL
      for (int j = 0; j < kStripRows; ++j) {
        SEGNEXT_UNROLL
        for (int p = 0; p < tile; ++p) store<A>(out(b, j) + (w + p) * L, acc[b][j][p]);
      }
    }
  });
}

// acc[i] += sum over t of taps[t] * row[w + i + t - K / 2]
template <class A, int K, int Tile>
SEGNEXT_INLINE void strip_tile(const A* row, const A* taps, int64_t w, Vector<A> (&acc)[Tile]) {
  constexpr int L = kLanes<A>;
  row += (w - K / 2) * L;
  SEGNEXT_UNROLL
  for (int i = 0; i < Tile + K - 1; ++i) {
    const Vector<A> v = load<A>(row + i * L);
    SEGNEXT_UNROLL
    for (int t = 0; t < K; ++t) {
      if (i - t >= 0 && i - t < Tile) acc[i - t] += load<A>(taps + t * L) * v;
    }
  }
}

// put(w, sums) <- (start + base + sum over branches of taps_b * strips(b, row))[w ...], a tile of pixels at a time
template <class A, class F>
void row_pass(const StripRows<A>& strips, int row, const A* taps, const A* base, Vector<A> start, int64_t width, const F& put) {
  constexpr int L = kLanes<A>;
  for_tiles<kTile>(width, [&](int64_t w, auto size) {
    constexpr int tile = size;
    Vector<A> acc[tile];
    SEGNEXT_UNROLL
    for (int i = 0; i < tile; ++i) acc[i] = start + load<A>(base + (w + i) * L);
    for_branches([&](auto b) { strip_tile<A, kBranchTaps[b], tile>(strips(b, row), taps + kRowTaps[b] * L, w, acc); });
    put(w, acc);
  });
}

// Computes a = W5 * x + b5 row by row, staging x on the way. The caller may read a window of rows of a, and the rows of x
// around the window's middle rows if `keep_x`.
template <class A>
class StemRows {
 public:
  StemRows(const Image& x, const A* taps, bool keep_x)
      : x_(x), taps_(taps), x_rows_(keep_x ? kStripRows + kReach + 5 : 5, x.width, 2), a_rows_(kWindow, x.width, kReach) {}
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
