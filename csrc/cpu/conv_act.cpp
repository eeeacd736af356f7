// conv_act: a 1x1 or larger convolution as matrix products with packed weights, with bias and activation on the way out.
#include <algorithm>
#include <vector>

#include "cpu/activation.h"
#include "cpu/kernels.h"
#include "cpu/matmul.h"

namespace segnext {
namespace {

// Stores pixels of y <- activation(sums + bias), as products hand them over.
template <class T, Activation act>
auto finish(const float* bias, int64_t C, T* y) {
  return [=](int64_t m, auto rows, int64_t c, int lanes, auto& z) {
    constexpr int count = rows;
    const Vector<float> b = load_lanes(bias + c, lanes);
    SEGNEXT_UNROLL
    for (int i = 0; i < count; ++i) z[i] += b;
    activate<act, T>(z);
    SEGNEXT_UNROLL
    for (int i = 0; i < count; ++i) store_lanes(y + (m + i) * C + c, z[i], lanes);
  };
}

// The input rows under one output row with zeros outside the image: in channels_last [kernel][pad + width + pad][channels], of
// planes, if they may stay that, [kernel][channels][pad + width + pad]. Rows of E: of T, or widened.
template <class T, class E>
class InputRows {
 public:
  InputRows(const Image& x, const Convolution& conv, bool planes)
      : x_(x),
        conv_(conv),
        lines_(planes ? x.channels : 1),
        pixel_(planes ? 1 : x.channels),
        pad_(conv.kernel / 2 * pixel_),
        line_(x.width * pixel_ + 2 * pad_),
        rows_(conv.kernel * lines_ * line_) {}

  void load(int64_t n, int64_t row) {
    for (int64_t s = 0; s < conv_.kernel; ++s) {
      const int64_t h = row * conv_.stride + s - conv_.kernel / 2;
      for (int64_t i = 0; i < lines_; ++i) {
        E* out = rows_ + (s * lines_ + i) * line_;
        if (h < 0 || h >= x_.height) {
          std::memset(out, 0, sizeof(E) * line_);
          continue;
        }
        std::memset(out, 0, sizeof(E) * pad_);
        std::memset(out + line_ - pad_, 0, sizeof(E) * pad_);
        copy_row(n, h, i, out + pad_);
      }
    }
  }

  // out [pixels][out_row] <- kernel * kernel * channels elements each, of the output row; not of planes
  void gather(int64_t pixels, E* out, int64_t out_row) const {
    const int64_t run = conv_.kernel * x_.channels;
    if (run == kPhotoRun) return gather_runs(pixels, std::integral_constant<int64_t, kPhotoRun>{}, out, out_row);
    gather_runs(pixels, run, out, out_row);
  }

  // Where these elements lie, without gathering them.
  std::vector<int64_t> offsets() const {
    std::vector<int64_t> offsets;
    for (int64_t s = 0; s < conv_.kernel; ++s) {
      for (int64_t t = 0; t < conv_.kernel; ++t) {
        for (int64_t c = 0; c < x_.channels; ++c) {
          offsets.push_back(lines_ > 1 ? (s * lines_ + c) * line_ + t : s * line_ + t * pixel_ + c);
        }
      }
    }
    return offsets;
  }
  const E* data() const { return rows_; }
  int64_t step() const { return conv_.stride * pixel_; }  // from one output pixel to the next

 private:
  static constexpr int64_t kPhotoRun = 9;  // three pixels of a photograph

  void copy_row(int64_t n, int64_t h, int64_t line, E* out) const {
    const int64_t C = x_.channels, plane = x_.height * x_.width;
    const T* image = static_cast<const T*>(x_.data) + n * C * plane;
    if (x_.channels_last || pixel_ == 1) {
      return copy_elements(image + line * plane + h * x_.width * pixel_, x_.width * pixel_, out);
    }
    for (int64_t c = 0; c < C; ++c) {
      const T* in = image + c * plane + h * x_.width;
      for (int64_t w = 0; w < x_.width; ++w) copy_elements(in + w, 1, out + w * C + c);
    }
  }

  template <class Run>
  void gather_runs(int64_t pixels, Run run, E* out, int64_t out_row) const {
    for (int64_t w = 0; w < pixels; ++w, out += out_row) {
      const E* in = rows_ + w * conv_.stride * x_.channels;
      for (int64_t s = 0; s < conv_.kernel; ++s) std::memcpy(out + s * run, in + s * line_, sizeof(E) * run);
    }
  }

  const Image& x_;
  const Convolution& conv_;
  const int64_t lines_, pixel_, pad_, line_;
  Buffer<E> rows_;
};

template <class T, class F>
void convolve_in_place(const Image& x, const Convolution& conv, const Packed<T>& weights, const Image& y, const F& finish_at,
                       Share& items) {
  constexpr int64_t kFewPlanes = 8;  // more would take places in the cache from each other
  InputRows<T, float> rows(x, conv, !x.channels_last && x.channels <= kFewPlanes);
  const std::vector<int64_t> offsets = rows.offsets();
  for (const int64_t row : items) {
    rows.load(row / y.height, row % y.height);
    matmul_scattered({rows.data(), rows.step(), offsets.data()}, y.width, weights, finish_at(row * y.width));
  }
}

}  // namespace

void conv_act_forward(const Image& x, const Convolution& conv, const Image& y, const Parallel& parallel) {
  with_dense_type(x.dtype, [&]<class T>() {
    const Packed<T> packed(static_cast<const T*>(conv.weights.data), conv.kernel * conv.kernel * x.channels, y.channels);
    T* out = static_cast<T*>(y.data);
    with_activation(conv.activation, [&]<Activation act>() {
      const auto finish_at = [&](int64_t first) {
        return finish<T, act>(conv.weights.bias, y.channels, out + first * y.channels);
      };
      auto product = [&](const Weights<T>& weights, const T* a, int64_t row, int64_t first, int64_t count) {
        matmul<T>({a, row, count, packed.depth, row > packed.depth}, weights, finish_at(first));
      };
      if (conv.kernel == 1 && conv.stride == 1 && x.channels_last) {
        const int64_t pixels = x.images * x.height * x.width;
        const int64_t blocks = ceil_div(pixels, kPixels);
        return parallel(blocks, [&](Share& items) {
          const Weights<T> weights = prepared(packed, blocks <= parallel.threads);
          for (const int64_t block : items) {
            const int64_t first = block * kPixels;
            const T* in = static_cast<const T*>(x.data) + first * x.channels;
            product(weights, in, x.channels, first, std::min(kPixels, pixels - first));
          }
        });
      }
      if constexpr (kCanScatter<T>) {
        if (y.width >= kPixels) {  // else too few pixels would share a panel
          return parallel(y.images * y.height, [&](Share& items) { convolve_in_place(x, conv, packed, y, finish_at, items); });
        }
      }
      // Where rows are short, several are gathered for one product.
      const int64_t most = std::max<int64_t>(kPixels / std::max<int64_t>(y.width, 1), 2);
      parallel(y.images * y.height, [&](Share& items) {
        InputRows<T, T> rows(x, conv, false);
        const bool once = most * parallel.threads >= y.images * y.height && most * y.width <= kPixels;
        const Weights<T> weights = prepared(packed, once);
        const int64_t depth = filled<T>(packed.depth), size = most * y.width * depth;
        Buffer<T> gathered(size);
        std::memset(gathered, 0, sizeof(T) * size);
        for (Range range = items.next(most); !range.empty(); range = items.next(most)) {
          for (int64_t row = range.begin; row < range.end; ++row) {
            rows.load(row / y.height, row % y.height);
            rows.gather(y.width, gathered + (row - range.begin) * y.width * depth, depth);
          }
          product(weights, gathered, depth, range.begin * y.width, (range.end - range.begin) * y.width);
        }
      });
    });
  });
}

}  // namespace segnext
