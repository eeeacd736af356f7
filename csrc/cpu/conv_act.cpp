// conv_act: a 1x1 or larger convolution as matrix products with packed weights, with bias and activation on the way out.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/matmul.h"

namespace segnext {
namespace {

// y pixels <- activation(a * weights + bias)
template <class T, Activation act>
void multiply(const Left<T>& a, const Weights<T>& weights, const float* bias, T* y) {
  const int64_t C = weights.columns;
  matmul<T>(a, weights, [&](int64_t m, auto rows, int64_t c, int lanes, auto& z) {
    constexpr int count = rows;
    const Vector<float> b = load_lanes(bias + c, lanes);
    SEGNEXT_UNROLL
    for (int i = 0; i < count; ++i) z[i] += b;
    activate<act, T>(z);
    SEGNEXT_UNROLL
    for (int i = 0; i < count; ++i) store_lanes(y + (m + i) * C + c, z[i], lanes);
  });
}

// The input rows under one output row, [kernel][pad + width + pad][channels] with zeros outside the image.
template <class T>
class InputRows {
 public:
  InputRows(const Image& x, const Convolution& conv)
      : x_(x),
        conv_(conv),
        pad_(conv.kernel / 2 * x.channels),
        row_(x.width * x.channels + 2 * pad_),
        rows_(conv.kernel * row_) {}

  void load(int64_t n, int64_t row) {
    for (int64_t s = 0; s < conv_.kernel; ++s) {
      const int64_t h = row * conv_.stride + s - conv_.kernel / 2;
      T* out = rows_ + s * row_;
      if (h < 0 || h >= x_.height) {
        std::memset(out, 0, sizeof(T) * row_);
        continue;
      }
      std::memset(out, 0, sizeof(T) * pad_);
      std::memset(out + row_ - pad_, 0, sizeof(T) * pad_);
      copy_row(n, h, out + pad_);
    }
  }

  // out [pixels][out_row] <- kernel * kernel * channels elements each, pixels [first, last) of the output row
  void gather(int64_t first, int64_t last, T* out, int64_t out_row) const {
    const int64_t run = conv_.kernel * x_.channels;
    if (run == kPhotoRun) return gather_runs(first, last, std::integral_constant<int64_t, kPhotoRun>{}, out, out_row);
    gather_runs(first, last, run, out, out_row);
  }

 private:
  static constexpr int64_t kPhotoRun = 9;  // three pixels of a photograph

  void copy_row(int64_t n, int64_t h, T* out) const {
    const int64_t C = x_.channels, plane = x_.height * x_.width;
    const T* image = static_cast<const T*>(x_.data) + n * C * plane;
    if (x_.channels_last) {
      std::memcpy(out, image + h * x_.width * C, sizeof(T) * x_.width * C);
      return;
    }
    for (int64_t c = 0; c < C; ++c) {
      const T* in = image + c * plane + h * x_.width;
      for (int64_t w = 0; w < x_.width; ++w) out[w * C + c] = in[w];
    }
  }

  template <class Run>
  void gather_runs(int64_t first, int64_t last, Run run, T* out, int64_t out_row) const {
    for (int64_t w = first; w < last; ++w, out += out_row) {
      const T* in = rows_ + w * conv_.stride * x_.channels;
      for (int64_t s = 0; s < conv_.kernel; ++s) std::memcpy(out + s * run, in + s * row_, sizeof(T) * run);
    }
  }

  const Image& x_;
  const Convolution& conv_;
  const int64_t pad_, row_;
  Buffer<T> rows_;
};

}  // namespace

void conv_act_forward(const Image& x, const Convolution& conv, const Image& y, const Parallel& parallel) {
  with_dense_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Packed<T> packed(static_cast<const T*>(conv.weights.data), conv.kernel * conv.kernel * x.channels, y.channels);
    T* out = static_cast<T*>(y.data);
    with_activation(conv.activation, [&](auto act) {
      auto product = [&](const Weights<T>& weights, const T* a, int64_t row, int64_t first, int64_t count) {
        multiply<T, act>({a, row, count, packed.depth, row > packed.depth}, weights, conv.weights.bias,
                         out + first * y.channels);
      };
      if (conv.kernel == 1 && conv.stride == 1 && x.channels_last) {
        const int64_t pixels = x.images * x.height * x.width;
        const int64_t blocks = (pixels + kPixels - 1) / kPixels;
        return parallel(blocks, [&](Share& items) {
          const Weights<T> weights = prepared(packed, blocks <= parallel.threads);
          for (const int64_t block : items) {
            const int64_t first = block * kPixels;
            const T* in = static_cast<const T*>(x.data) + first * x.channels;
            product(weights, in, x.channels, first, std::min(kPixels, pixels - first));
          }
        });
      }
      // Where rows are short, several are gathered for one product.
      const int64_t most = std::max<int64_t>(kPixels / std::max<int64_t>(y.width, 1), 2);
      parallel(y.images * y.height, [&](Share& items) {
        InputRows<T> rows(x, conv);
        const bool once = most * parallel.threads >= y.images * y.height && most * y.width <= kPixels;
        const Weights<T> weights = prepared(packed, once);
        const int64_t depth = filled<T>(packed.depth), size = most * y.width * depth;
        Buffer<T> gathered(size);
        std::memset(gathered, 0, sizeof(T) * size);
        for (Range range = items.next(most); !range.empty(); range = items.next(most)) {
          for (int64_t row = range.begin; row < range.end; ++row) {
            rows.load(row / y.height, row % y.height);
            rows.gather(0, y.width, gathered + (row - range.begin) * y.width * depth, depth);
          }
          product(weights, gathered, depth, range.begin * y.width, (range.end - range.begin) * y.width);
        }
      });
    });
  });
}

}  // namespace segnext
