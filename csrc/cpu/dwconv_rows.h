// The 3x3 depthwise stencil on rows of pixels: those of a channels_last image as they are, or staged ones. What is no whole
// vector of channels, and the contiguous layout, is staged row by row, one group of kLanes channels at a time.
#pragma once
#include <algorithm>

#include "cpu/stencil.h"

namespace segnext::dwconv {

inline constexpr int kK = 3;
inline constexpr int kTaps = kK * kK + 1;  // the bias comes last
inline constexpr int kPixels = kRegisters == 32 ? 8 : 4;

// An item is a part of an image's rows in a block of channel groups; all are cut by the shape alone. Staged blocks are one
// group, in the contiguous layout of the height of the image.
template <class A>
struct Parts {
  int64_t groups, direct, rows, per_image, block, blocks, items;

  Parts(const Image& x, int64_t part_rows)
      : groups(Groups<A>(x).per_image), direct(x.channels_last ? x.channels / kLanes<A> : 0) {
    constexpr int64_t kCache = 1024 * 1024, kRows = 2 * kK, kEnoughItems = 16;
    rows = x.channels_last ? part_rows : std::max<int64_t>(x.height, 1);
    per_image = ceil_div(x.height, rows);
    const int64_t fits = kCache / (kRows * (x.width + 1) * kVectorBytes), share = x.images * per_image * groups / kEnoughItems;
    const int64_t most = std::max<int64_t>(1, std::min(fits, share)), cuts = ceil_div(direct, most);
    block = cuts == 0 ? 1 : ceil_div(direct, cuts);
    blocks = ceil_div(direct, block) + groups - direct;
    items = x.images * per_image * blocks;
  }
};

// One item's place: rows [first, last) of image n, `groups` groups of channels from group `group`, channel c on.
template <class A>
struct Part {
  int64_t n, index, first, last, group, groups, c;
  bool direct;

  Part(const Image& x, const Parts<A>& parts, int64_t item) : index(item / parts.blocks) {
    n = index / parts.per_image;
    first = index % parts.per_image * parts.rows;
    last = std::min(first + parts.rows, x.height);
    const int64_t i = item % parts.blocks, direct_blocks = parts.blocks - (parts.groups - parts.direct);
    direct = i < direct_blocks;
    group = direct ? i * parts.block : parts.direct + i - direct_blocks;
    groups = direct ? std::min(parts.block, parts.direct - group) : 1;
    c = group * kLanes<A>;
  }
};

// Rows of pixels that lie `step` elements apart, groups of channels side by side.
template <class T>
struct Rows {
  const T* rows[kK];  // null outside the image
  const T* zeros;     // the pixel before a row and the one after it
  int64_t step, width;
};

// f(i, v) for the pixels w - 1 + i of row s, where i is below Tile + 2; v is the group of channels from c on.
template <class A, int Tile, class T, class F>
SEGNEXT_INLINE void for_pixels(const Rows<T>& x, int s, int64_t w, int64_t c, const F& f) {
  const T* pixels = x.rows[s] + w * x.step + c;
  const T* before = w > 0 ? pixels - x.step : x.zeros;
  const T* after = w + Tile < x.width ? pixels + Tile * x.step : x.zeros;
  SEGNEXT_UNROLL
  for (int i = 0; i < Tile + 2; ++i) f(i, load_as<A>(i == 0 ? before : i == Tile + 1 ? after : pixels + (i - 1) * x.step));
}

// z[i] = bias + the stencil around pixel w + i
template <class A, int Tile, class T>
SEGNEXT_INLINE void convolve(const Rows<T>& x, const A* taps, int64_t w, int64_t c, Vector<A> (&z)[Tile]) {
  SEGNEXT_UNROLL
  for (int i = 0; i < Tile; ++i) z[i] = load<A>(taps + (kTaps - 1) * kLanes<A>);
  for (int s = 0; s < kK; ++s) {
    if (x.rows[s] == nullptr) continue;
    Vector<A> tap[kK];
    SEGNEXT_UNROLL
    for (int t = 0; t < kK; ++t) tap[t] = load<A>(taps + (s * kK + t) * kLanes<A>);
    for_pixels<A, Tile>(x, s, w, c, [&](int i, Vector<A> v) {
      SEGNEXT_UNROLL
      for (int t = 0; t < kK; ++t) {
        if (i - t >= 0 && i - t < Tile) z[i - t] += tap[t] * v;
      }
    });
  }
}

// sums [kTaps] += the gradients of the taps and the bias that come from pixels w + i, whose gradients are dz[i].
template <class A, int Tile, class T>
SEGNEXT_INLINE void add_tap_grads(const Rows<T>& x, const Vector<A> (&dz)[Tile], int64_t w, int64_t c, A* sums) {
  for (int s = 0; s < kK; ++s) {
    if (x.rows[s] == nullptr) continue;
    Vector<A> acc[kK] = {};
    for_pixels<A, Tile>(x, s, w, c, [&](int i, Vector<A> v) {
      SEGNEXT_UNROLL
      for (int t = 0; t < kK; ++t) {
        if (i - t >= 0 && i - t < Tile) acc[t] += dz[i - t] * v;
      }
    });
    add_to<A>(sums + s * kK * kLanes<A>, acc);
  }
  Vector<A> sum[1] = {dz[0]};
  SEGNEXT_UNROLL
  for (int i = 1; i < Tile; ++i) sum[0] += dz[i];
  add_to<A>(sums + (kTaps - 1) * kLanes<A>, sum);
}

// One image in a part: its rows as they are stored, or staged as accumulators.
template <class A, class T, bool Staged>
class Source {
 public:
  explicit Source(const Image& image)
      : step(Staged ? kLanes<A> : image.channels),
        image_(image),
        zeros_(kLanes<A>),
        ring_(Staged ? kK : 0, Staged ? image.width : 0, 0) {
    std::memset(zeros_, 0, sizeof(T) * kLanes<A>);
  }
  void restart(const Part<A>& part, int64_t row) {
    n_ = part.n;
    c_ = part.c;
    next_ = std::max<int64_t>(row, 0);
  }
  // A row of the image; rows before the last two may be gone.
  T* operator[](int64_t row) {
    if constexpr (Staged) {
      for (; next_ <= row; ++next_) load_row<A>(image_, n_, c_, next_, ring_[next_]);
      return ring_[row];
    } else {
      return RowAccess<T>(image_, n_, c_, row).first;
    }
  }
  Rows<T> around(int64_t row) {
    Rows<T> rows = {{}, zeros_, step, image_.width};
    for (int64_t r = std::max<int64_t>(row - 1, 0); r <= row + 1 && r < image_.height; ++r) rows.rows[r - row + 1] = (*this)[r];
    return rows;
  }

  const int64_t step;

 private:
  const Image& image_;
  int64_t n_ = 0, c_ = 0, next_ = 0;
  Buffer<T> zeros_;
  RowRing<A> ring_;
};

// Where a row of results goes: the image, or a buffer that is then stored.
template <class A, class T, bool Staged>
class Target {
 public:
  explicit Target(const Image& image)
      : step(Staged ? kLanes<A> : image.channels), image_(image), row_(Staged ? image.width * step : 0) {}
  // write(T*) fills a row
  template <class F>
  void write(const Part<A>& part, int64_t row, const F& write) {
    if constexpr (Staged) {
      write(static_cast<T*>(row_));
      store_row<A>(image_, part.n, part.c, row, row_);
    } else {
      write(RowAccess<T>(image_, part.n, part.c, row).first);
    }
  }

  const int64_t step;

 private:
  const Image& image_;
  Buffer<A> row_;
};

}  // namespace segnext::dwconv
