// Images in memory, and the staging of one row of kLanes channels at a time between memory and padded buffers.
#pragma once
#include <cstdlib>
#include <new>

#include "cpu/simd.h"

namespace segnext {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kHalf };

// [N, C, H, W], dense, in either layout.
struct Image {
  void* data;
  Dtype dtype;
  bool channels_last;
  int64_t images, channels, height, width;
};

// How work is cut into items: one group of kLanes channels of one image each.
template <class A>
struct Groups {
  int64_t per_image, items;
  explicit Groups(const Image& x) : per_image((x.channels + kLanes<A> - 1) / kLanes<A>), items(x.images * per_image) {}
  int64_t image(int64_t item) const { return item / per_image; }
  int64_t channel(int64_t item) const { return item % per_image * kLanes<A>; }
};

// Calls f with a null pointer of the storage type; only types that accumulate in A are compiled.
template <class A, class F>
SEGNEXT_INLINE void with_storage(Dtype dtype, const F& f) {
  if constexpr (std::is_same_v<A, double>) {
    f(static_cast<double*>(nullptr));
  } else {
    switch (dtype) {
      case Dtype::kBFloat16:
        return f(static_cast<BFloat16*>(nullptr));
      case Dtype::kHalf:
        return f(static_cast<Half*>(nullptr));
      default:
        return f(static_cast<float*>(nullptr));
    }
  }
}

// Aligned scratch memory that frees itself.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<A*>(::operator new(static_cast<size_t>(size > 0 ? size : 1) * sizeof(A), std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator A*() const { return data_; }

 private:
  A* data_;
};

// A ring of rows [pad + width + pad][kLanes], of which the `count` newest are kept; the pads are zero.
template <class A>
class RowRing {
 public:
  RowRing(int count, int64_t width, int pad)
      : count_(count), pad_(pad), stride_((width + 2 * pad) * kLanes<A>), rows_(count * stride_) {
    for (int row = 0; row < count; ++row) {
      std::memset(rows_ + row * stride_, 0, sizeof(A) * pad * kLanes<A>);
      std::memset(rows_ + (row + 1) * stride_ - pad * kLanes<A>, 0, sizeof(A) * pad * kLanes<A>);
    }
  }
  // First pixel of a row; `row` may be negative down to -count.
  A* operator[](int64_t row) const { return rows_ + (row + count_) % count_ * stride_ + pad_ * kLanes<A>; }

 private:
  int count_, pad_;
  int64_t stride_;
  Buffer<A> rows_;
};

// Where one row of a group of channels lies.
template <class A, class T>
struct RowAccess {
  T* first;       // pixel of the first channel
  int64_t plane;  // elements between channels, contiguous layout
  int64_t width;
  int64_t channels;  // of the image, which are the elements between pixels in channels_last
  int lanes;         // channels in this group
  bool channels_last;

  RowAccess(const Image& x, int64_t n, int64_t c, int64_t row)
      : plane(x.height * x.width),
        width(x.width),
        channels(x.channels),
        lanes(static_cast<int>(x.channels - c < kLanes<A> ? x.channels - c : kLanes<A>)),
        channels_last(x.channels_last) {
    T* data = static_cast<T*>(x.data);
    first =
        channels_last ? data + ((n * x.height + row) * width) * channels + c : data + (n * channels + c) * plane + row * width;
  }
};

// out [width][kLanes] <- one row of the channels from c on; lanes past the last channel become zero.
template <class A>
void load_row(const Image& x, int64_t n, int64_t c, int64_t row, A* out) {
  constexpr int L = kLanes<A>;
  with_storage<A>(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    RowAccess<A, T> in(x, n, c, row);
    if (in.channels_last) {
      if (in.lanes == L) {
        for (int64_t w = 0; w < in.width; ++w) store<A>(out + w * L, load_as<A>(in.first + w * in.channels));
      } else {
        for (int64_t w = 0; w < in.width; ++w) store<A>(out + w * L, load_some<A>(in.first + w * in.channels, in.lanes));
      }
      return;
    }
    for (int64_t w = 0; w < in.width; w += L) {
      const int count = static_cast<int>(in.width - w < L ? in.width - w : L);
      Vector<A> block[L];
      for (int lane = 0; lane < L; ++lane) {
        const T* from = in.first + lane * in.plane + w;
        block[lane] = lane >= in.lanes ? Vector<A>{} : count == L ? load_as<A>(from) : load_some<A>(from, count);
      }
      transpose<A>(block);
      for (int i = 0; i < count; ++i) store<A>(out + (w + i) * L, block[i]);
    }
  });
}

// The reverse: one row of the channels from c on <- in [width][kLanes].
template <class A>
void store_row(const Image& y, int64_t n, int64_t c, int64_t row, const A* in) {
  constexpr int L = kLanes<A>;
  with_storage<A>(y.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    RowAccess<A, T> out(y, n, c, row);
    if (out.channels_last) {
      if (out.lanes == L) {
        for (int64_t w = 0; w < out.width; ++w) store_as<A>(out.first + w * out.channels, load<A>(in + w * L));
      } else {
        for (int64_t w = 0; w < out.width; ++w) store_some<A>(out.first + w * out.channels, load<A>(in + w * L), out.lanes);
      }
      return;
    }
    for (int64_t w = 0; w < out.width; w += L) {
      const int count = static_cast<int>(out.width - w < L ? out.width - w : L);
      Vector<A> block[L];
      for (int i = 0; i < L; ++i) block[i] = i < count ? load<A>(in + (w + i) * L) : Vector<A>{};
      transpose<A>(block);
      for (int lane = 0; lane < out.lanes; ++lane) {
        T* to = out.first + lane * out.plane + w;
        count == L ? store_as<A>(to, block[lane]) : store_some<A>(to, block[lane], count);
      }
    }
  });
}

// A filter [C][count] seen as an image of one row: load_row and store_row then move it to and from taps [count][kLanes].
inline Image filter_row(void* filter, Dtype dtype, int64_t channels, int64_t count) {
  return {filter, dtype, false, 1, channels, 1, count};
}

}  // namespace segnext
