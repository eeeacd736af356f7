// Images in memory, and the staging of one row of kLanes channels at a time between memory and padded buffers.
#pragma once
#include <algorithm>
#include <utility>

#include "arguments.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace segnext {

// How work is cut into items: one group of kLanes channels of one image each.
template <class A>
struct Groups {
  int64_t per_image, items;
  explicit Groups(const Image& x) : per_image(ceil_div(x.channels, kLanes<A>)), items(x.images * per_image) {}
  int64_t image(int64_t item) const { return item / per_image; }
  int64_t channel(int64_t item) const { return item % per_image * kLanes<A>; }
};

// Calls f<A>() with the type A of accumulators.
template <class F>
void with_accumulator(Dtype dtype, const F& f) {
  dtype == Dtype::kFloat64 ? f.template operator()<double>() : f.template operator()<float>();
}

// Calls f<T>() with the storage type T; only types that accumulate in A are compiled.
template <class A, class F>
SEGNEXT_INLINE void with_storage(Dtype dtype, const F& f) {
  if constexpr (std::is_same_v<A, double>) {
    f.template operator()<double>();
  } else {
    switch (dtype) {
      case Dtype::kBFloat16:
        return f.template operator()<BFloat16>();
      case Dtype::kHalf:
        return f.template operator()<Half>();
      default:
        return f.template operator()<float>();
    }
  }
}

// A ring of rows, each of `groups` times [pad + width + pad][kLanes], of which the `count` newest are kept; the pads are zero,
// and so is one row more.
template <class A>
class RowRing {
 public:
  RowRing(int count, int64_t width, int pad, int64_t groups = 1)
      : count_(count),
        pad_(pad * kLanes<A>),
        group_size_((width + 2 * pad) * kLanes<A>),
        row_size_(groups * group_size_),
        rows_(count * row_size_ + group_size_) {
    for (int64_t group = 0; group < count * groups; ++group) {
      std::memset(rows_ + group * group_size_, 0, sizeof(A) * pad_);
      std::memset(rows_ + (group + 1) * group_size_ - pad_, 0, sizeof(A) * pad_);
    }
    std::memset(rows_ + count * row_size_, 0, sizeof(A) * group_size_);
  }
  // First pixel of a row, of its first group and of any.
  A* operator[](int64_t row) const { return rows_ + row % count_ * row_size_ + pad_; }
  A* operator()(int64_t row, int64_t group) const { return (*this)[row] + group * group_size_; }

  // The K rows around `row`; those outside the image are zero.
  template <int K>
  void window(int64_t row, int64_t group, int64_t height, const A* (&rows)[K]) const {
    for (int s = 0; s < K; ++s) {
      const int64_t r = row + s - K / 2;
      rows[s] = r >= 0 && r < height ? (*this)(r, group) : rows_ + count_ * row_size_ + pad_;
    }
  }

 private:
  int64_t count_, pad_, group_size_, row_size_;
  Buffer<A> rows_;
};

// Calls f(first channel, number of channels) for every vector of channels.
template <class F>
SEGNEXT_INLINE void for_lanes(int64_t channels, const F& f) {
  constexpr int L = kLanes<float>;
  for (int64_t c = 0; c < channels; c += L) f(c, channels - c < L ? static_cast<int>(channels - c) : L);
}

// to [count] <- from, widened if `to` is float
template <class T, class O>
void copy_elements(const T* from, int64_t count, O* to) {
  if constexpr (std::is_same_v<O, T>) {
    std::copy_n(from, count, to);
  } else {
    int64_t k = 0;
    for (; k + kLanes<float> <= count; k += kLanes<float>) store<float>(to + k, load_as<float>(from + k));
    for (; k < count; ++k) to[k] = widen(from[k]);
  }
}

// Where one row of the channels from c on lies.
template <class T>
struct RowAccess {
  T* first;       // element
  int64_t plane;  // elements between channels, contiguous layout
  int64_t pixel;  // elements between pixels, channels_last
  int64_t width;
  int64_t channels;  // from c on
  bool channels_last;

  RowAccess(const Image& x, int64_t n, int64_t c, int64_t row)
      : plane(x.height * x.width), pixel(x.channels), width(x.width), channels(x.channels - c), channels_last(x.channels_last) {
    T* data = static_cast<T*>(x.data);
    first = channels_last ? data + (n * plane + row * width) * pixel + c : data + (n * x.channels + c) * plane + row * width;
  }
};

// out [width], `pixel` elements apart, <- the first kLanes of the channels, `plane` elements apart in memory; lanes past the
// last channel become zero
template <class A, class T>
SEGNEXT_INLINE void gather_channels(const T* in, int64_t plane, int64_t channels, int64_t width, A* out, int64_t pixel) {
  constexpr int L = kLanes<A>;
  for (int64_t w = 0; w < width; w += L) {
    const int count = static_cast<int>(width - w < L ? width - w : L);
    Vector<A> block[L];
    for (int lane = 0; lane < L; ++lane) {
      const T* from = in + lane * plane + w;
      block[lane] = lane >= channels ? Vector<A>{} : count == L ? load_as<A>(from) : load_some<A>(from, count);
    }
    transpose<A>(block);
    for (int i = 0; i < count; ++i) store<A>(out + (w + i) * pixel, block[i]);
  }
}

// The reverse.
template <class A, class T>
SEGNEXT_INLINE void scatter_channels(const A* in, int64_t pixel, int64_t width, T* out, int64_t plane, int64_t channels) {
  constexpr int L = kLanes<A>;
  for (int64_t w = 0; w < width; w += L) {
    const int count = static_cast<int>(width - w < L ? width - w : L);
    Vector<A> block[L];
    for (int i = 0; i < L; ++i) block[i] = i < count ? load<A>(in + (w + i) * pixel) : Vector<A>{};
    transpose<A>(block);
    for (int lane = 0; lane < L && lane < channels; ++lane) {
      T* to = out + lane * plane + w;
      count == L ? store_as<A>(to, block[lane]) : store_some<A>(to, block[lane], count);
    }
  }
}

// out [width][kLanes] <- one row of the channels from c on; lanes past the last channel become zero. More groups of channels
// follow at multiples of `out_group`: in channels_last they lie side by side in memory.
template <class A>
void load_row(const Image& x, int64_t n, int64_t c, int64_t row, A* out, int64_t groups = 1, int64_t out_group = 0) {
  constexpr int L = kLanes<A>;
  with_storage<A>(x.dtype, [&]<class T>() {
    const RowAccess<T> in(x, n, c, row);
    if (in.channels_last) {
      const int64_t rest = in.channels - (groups - 1) * L;  // channels in the last group, if fewer than L
      const int64_t full = rest < L ? groups - 1 : groups;
      for (int64_t w = 0; w < in.width; ++w) {
        const T* pixel = in.first + w * in.pixel;
        for (int64_t g = 0; g < full; ++g) store<A>(out + g * out_group + w * L, load_as<A>(pixel + g * L));
        if (full < groups) store<A>(out + full * out_group + w * L, load_some<A>(pixel + full * L, static_cast<int>(rest)));
      }
      return;
    }
    for (int64_t g = 0; g < groups; ++g)
      gather_channels<A>(in.first + g * L * in.plane, in.plane, in.channels - g * L, in.width, out + g * out_group, L);
  });
}

// The reverse: one row of the channels from c on <- in [width][kLanes], and more groups at multiples of `in_group`.
template <class A>
void store_row(const Image& y, int64_t n, int64_t c, int64_t row, const A* in, int64_t groups = 1, int64_t in_group = 0) {
  constexpr int L = kLanes<A>;
  with_storage<A>(y.dtype, [&]<class T>() {
    const RowAccess<T> out(y, n, c, row);
    if (out.channels_last) {
      const int64_t rest = out.channels - (groups - 1) * L;
      const int64_t full = rest < L ? groups - 1 : groups;
      for (int64_t w = 0; w < out.width; ++w) {
        T* pixel = out.first + w * out.pixel;
        for (int64_t g = 0; g < full; ++g) store_as<A>(pixel + g * L, load<A>(in + g * in_group + w * L));
        if (full < groups) store_some<A>(pixel + full * L, load<A>(in + full * in_group + w * L), static_cast<int>(rest));
      }
      return;
    }
    for (int64_t g = 0; g < groups; ++g)
      scatter_channels<A>(in + g * in_group, L, out.width, out.first + g * L * out.plane, out.plane, out.channels - g * L);
  });
}

// A tile of pixels, `pixel` elements apart.
template <class A, class T, int Tile>
SEGNEXT_INLINE void store_tile(T* out, int64_t pixel, const Vector<A> (&tile)[Tile]) {
  SEGNEXT_UNROLL
  for (int i = 0; i < Tile; ++i) store_as<A>(out + i * pixel, tile[i]);
}

// A row of kLanes channels that will soon be read or written: asked for in pieces, the caches fetch it while other work is
// done.
template <class A>
class RowAhead {
 public:
  RowAhead(const Image& x, int64_t n, int64_t c, int64_t row) {
    with_storage<A>(x.dtype, [&]<class T>() {
      const RowAccess<T> at(x, n, c, row);
      const bool exists = row < x.height;
      first_ = reinterpret_cast<const char*>(at.first);
      pixel_ = (at.channels_last ? at.pixel : 1) * sizeof(T);
      lanes_ = !exists || at.channels_last ? exists : std::min<int64_t>(at.channels, kLanes<A>);
      lane_ = at.plane * sizeof(T);
    });
  }
  SEGNEXT_INLINE void fetch(int64_t w, int count) const {
    constexpr int64_t kLine = 64;
    for (int64_t lane = 0; lane < lanes_; ++lane) {
      const char* at = first_ + lane * lane_ + w * pixel_;
      for (int64_t i = 0; i < count * pixel_; i += pixel_ < kLine ? kLine : pixel_) __builtin_prefetch(at + i);
    }
  }

 private:
  const char* first_;
  int64_t pixel_, lanes_, lane_;
};

// A filter [C][count] seen as an image of one row: load_row and store_row then move it to and from taps [count][kLanes].
inline Image filter_row(void* filter, Dtype dtype, int64_t channels, int64_t count) {
  return {filter, dtype, count == 1, 1, channels, 1, count};  // one tap: channels lie side by side, no transposing
}

}  // namespace segnext
