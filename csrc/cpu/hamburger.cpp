// hamburger: y = relu(x + group norm of W V) in channels_last, with V = B C^T the decomposition of relu(W1 x + b1).
//
// W V = (W B) C^T: W meets the R columns of B instead of all pixels, and one product of depth R, with norm, shortcut and ReLU
// on its way out, writes y. The norm's mean and variance follow from the mean and the second moments of C's rows, in double:
// where columns of B are alike, large terms cancel in them.
#include <algorithm>
#include <cmath>
#include <deque>

#include "cpu/activation.h"
#include "cpu/kernels.h"
#include "cpu/matmul.h"
#include "cpu/nmf_forward.h"

namespace segnext {
namespace {

constexpr int64_t kBlock = 64;  // rows of C that are in double at a time

// The norm of W V of a batch, as one product of C, whose mean is taken off, with scaled rows of W B, and what is added to that.
class NormOfProduct {
 public:
  NormOfProduct(Nmf<float>& nmf, int64_t images, const HamburgerWeights& w, const Parallel& parallel)
      : nmf_(nmf),
        s_(nmf.shape()),
        images_(images),
        w_(w),
        parallel_(parallel),
        panels_size_(whole_panels(s_.D) * s_.padded),
        mean_(images * s_.chunks * s_.padded),
        moments_(images * s_.chunks * s_.rank * s_.padded),
        panels_(images * panels_size_),
        shift_(images * s_.D) {
    nmf.project(w.out);
    centre_coefficients();
    std::memset(panels_, 0, sizeof(float) * images * panels_size_);
    parallel(images * w.norm.groups, [&](Share& items) {
      for (const int64_t item : items) scale_group(item / w.norm.groups, item % w.norm.groups);
    });
    for (int64_t image = 0; image < images; ++image)
      scaled_.emplace_back(Packed<float>(panels_ + image * panels_size_, s_.padded, s_.D));
  }

  // y <- relu(x + norm), pixels [first, first + count) of an image
  template <class T>
  void write(int64_t image, int64_t first, int64_t count, const T* x, T* y) const {
    const int64_t C = s_.D;
    const float* c = nmf_.last_coefficients(image) + first * s_.padded;
    const float* shift = shift_ + image * C;
    matmul<float>({c, s_.padded, count, s_.padded}, scaled_[image],
                  [&](int64_t m, auto rows, int64_t d, int lanes, const auto& z) {
                    constexpr int n = rows;
                    const Vector<float> added = load_lanes(shift + d, lanes);
                    SEGNEXT_UNROLL
                    for (int i = 0; i < n; ++i) {
                      const int64_t at = (m + i) * C + d;
                      store_lanes(y + at, relu(z[i] + added + load_lanes(x + at, lanes)), lanes);
                    }
                  });
  }

 private:
  // C less its mean, in float; moments_ <- the mean square [rank][padded] of what is left.
  void centre_coefficients() {
    for_chunks([&](int64_t item, float* c, int64_t count) {
      double* sum = mean_ + item * s_.padded;
      std::fill_n(sum, s_.padded, 0.0);
      for (int64_t n = 0; n < count; ++n, c += s_.padded) {
        for (int64_t r = 0; r < s_.padded; ++r) sum[r] += c[r];
      }
    });
    sum_chunks(mean_, s_.padded);
    for_chunks([&](int64_t item, float* c, int64_t count) {
      constexpr int L = kLanes<double>;
      const double* mean = this->mean(item / s_.chunks);
      Buffer<double> rows(kBlock * s_.padded);
      for (int64_t first = 0; first < count; first += kBlock, c += kBlock * s_.padded) {
        const int64_t block = std::min(kBlock, count - first);
        for (int64_t n = 0; n < block; ++n) {
          for (int64_t r = 0; r < s_.padded; ++r) {
            float& value = c[n * s_.padded + r];
            value -= static_cast<float>(mean[r]);
            rows[n * s_.padded + r] = value;
          }
        }
        gemm<double>({rows, 1, s_.padded}, s_.rank, block, rows, s_.padded, s_.padded / L,
                     moments_ + item * s_.rank * s_.padded, s_.padded, first > 0);
      }
    });
    sum_chunks(moments_, s_.rank * s_.padded);
  }

  // The scaled rows of W B and what is added to their products, for the channels of a group.
  void scale_group(int64_t image, int64_t group) {
    const int64_t R = s_.padded, channels = s_.D / w_.norm.groups, first = group * channels;
    const float* projected = nmf_.left(image) + first * R;
    const double* mean = this->mean(image);
    Buffer<double> rows(channels * R), products(channels * R), offset(channels);
    double group_mean = 0;
    for (int64_t d = 0; d < channels; ++d) {
      offset[d] = 0;
      for (int64_t r = 0; r < R; ++r) {
        rows[d * R + r] = projected[d * R + r];
        group_mean += rows[d * R + r] * mean[r];
        offset[d] += rows[d * R + r] * static_cast<float>(mean[r]);  // what was taken off C
      }
    }
    group_mean /= static_cast<double>(channels);
    gemm<double>({rows, R, 1}, channels, s_.rank, moments_ + image * s_.chunks * s_.rank * R, R, R / kLanes<double>, products,
                 R, false);
    double variance = 0;
    for (int64_t d = 0; d < channels; ++d) {
      offset[d] -= group_mean;
      variance += offset[d] * offset[d];
      for (int64_t r = 0; r < R; ++r) variance += products[d * R + r] * rows[d * R + r];
    }
    const double factor = 1 / std::sqrt(std::max(variance / static_cast<double>(channels), 0.0) + w_.norm.epsilon);
    for (int64_t d = 0; d < channels; ++d) {
      const int64_t channel = first + d;
      const double scale = w_.norm.weight[channel] * factor;
      float* column = panels_ + image * panels_size_ + channel / kPanel * kPanel * R + channel % kPanel;
      for (int64_t r = 0; r < R; ++r) column[r * kPanel] = static_cast<float>(scale * rows[d * R + r]);
      shift_[image * s_.D + channel] = static_cast<float>(w_.norm.bias[channel] + scale * offset[d]);
    }
  }

  const double* mean(int64_t image) const { return mean_ + image * s_.chunks * s_.padded; }

  // Calls f(item, its rows of C, how many) for every chunk of every image.
  template <class F>
  void for_chunks(const F& f) {
    parallel_(images_ * s_.chunks, [&](Share& items) {
      for (const int64_t item : items) {
        const int64_t first = item % s_.chunks * s_.chunk;
        f(item, nmf_.last_coefficients(item / s_.chunks) + first * s_.padded, std::min(s_.chunk, s_.N - first));
      }
    });
  }
  // The first chunk's numbers <- the mean over all of an image's columns.
  void sum_chunks(double* parts, int64_t size) {
    for (int64_t image = 0; image < images_; ++image, parts += s_.chunks * size) {
      for (int64_t i = 0; i < size; ++i) {
        for (int64_t part = 1; part < s_.chunks; ++part) parts[i] += parts[part * size + i];
        parts[i] /= static_cast<double>(s_.N);
      }
    }
  }

  Nmf<float>& nmf_;
  const NmfShape<float>& s_;
  const int64_t images_;
  const HamburgerWeights& w_;
  const Parallel& parallel_;
  const int64_t panels_size_;
  Buffer<double> mean_, moments_;
  Buffer<float> panels_, shift_;
  std::deque<Weights<float>> scaled_;
};

}  // namespace

void hamburger_forward(const Image& x, const HamburgerWeights& w, const Image& y, const Parallel& parallel) {
  with_dense_type(x.dtype, [&]<class T>() {
    const int64_t C = x.channels, pixels = x.height * x.width, blocks = ceil_div(pixels, kPixels);
    conv_act_forward(x, {w.in, 1, 1, Activation::kRelu}, y, parallel);  // V lies where y will be
    const Matrices columns{y.data, x.dtype, true, x.images, C, pixels};
    with_nmf(columns, w.rank, w.steps, w.rounded, Keep::kNothing, nullptr, parallel, [&](auto& nmf) {
      nmf.run(w.bases);
      const NormOfProduct norm(nmf, x.images, w, parallel);
      parallel(x.images * blocks, [&](Share& items) {
        for (const int64_t item : items) {
          const int64_t image = item / blocks, first = item % blocks * kPixels, at = (image * pixels + first) * C;
          norm.write(image, first, std::min(kPixels, pixels - first), static_cast<const T*>(x.data) + at,
                     static_cast<T*>(y.data) + at);
        }
      });
    });
  });
}

}  // namespace segnext
