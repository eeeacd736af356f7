// group_norm_relu: y = relu(group norm of x + residual) in channels_last: one pass for the statistics, one for the result.
#include <algorithm>
#include <cmath>

#include "cpu/activation.h"
#include "cpu/kernels.h"
#include "cpu/matmul.h"

namespace segnext {
namespace {

constexpr int64_t kBlock = 64;  // pixels whose statistics are kept apart

// out [3][C]: the first pixel and, of the differences from it, the sum and the sum of squares.
template <class T>
void block_sums(const T* x, int64_t C, int64_t pixels, float* out) {
  for_lanes(C, [&](int64_t c, int lanes) {
    const Vector<float> first = load_lanes(x + c, lanes);
    Vector<float> sum = {}, squares = {};
    for (int64_t m = 1; m < pixels; ++m) {
      const Vector<float> d = load_lanes(x + m * C + c, lanes) - first;
      sum += d;
      squares += d * d;
    }
    store_lanes(out + c, first, lanes);
    store_lanes(out + C + c, sum, lanes);
    store_lanes(out + 2 * C + c, squares, lanes);
  });
}

// mean, scale [C] of one group, from the sums of its image's blocks: moments about one of the values, in double
void statistics(const GroupNorm& norm, int64_t group, int64_t C, int64_t pixels, const float* sums, float* mean, float* scale) {
  const int64_t size = C / norm.groups, first_channel = group * size, last_channel = first_channel + size;
  const double origin = sums[first_channel];
  double sum = 0, squares = 0;
  for (int64_t first = 0; first < pixels; first += kBlock, sums += 3 * C) {
    const double count = static_cast<double>(std::min(kBlock, pixels - first));
    for (int64_t c = first_channel; c < last_channel; ++c) {
      const double shift = sums[c] - origin, block_sum = sums[C + c];
      sum += count * shift + block_sum;
      squares += shift * (count * shift + 2 * block_sum) + sums[2 * C + c];
    }
  }
  const double count = static_cast<double>(pixels * size), deviation = sum / count;
  const double variance = std::max(squares / count - deviation * deviation, 0.0);
  for (int64_t c = first_channel; c < last_channel; ++c) {
    mean[c] = static_cast<float>(origin + deviation);
    scale[c] = static_cast<float>(norm.weight[c] / std::sqrt(variance + norm.epsilon));
  }
}

template <class T>
void apply(const T* x, const T* residual, const float* mean, const float* scale, const float* bias, int64_t C, int64_t pixels,
           T* y) {
  for (int64_t m = 0; m < pixels * C; m += C) {
    for_lanes(C, [&](int64_t c, int lanes) {
      const Vector<float> deviation = load_lanes(x + m + c, lanes) - load_lanes(mean + c, lanes);
      Vector<float> z = deviation * load_lanes(scale + c, lanes) + load_lanes(bias + c, lanes);
      if (residual != nullptr) z += load_lanes(residual + m + c, lanes);
      store_lanes(y + m + c, relu(z), lanes);
    });
  }
}

}  // namespace

void group_norm_relu_forward(const Image& x, const GroupNorm& norm, const Image& residual, const Image& y,
                             const Parallel& parallel) {
  const int64_t C = x.channels, pixels = x.height * x.width, blocks = ceil_div(pixels, kBlock);
  with_dense_type(x.dtype, [&]<class T>() {
    const T *in = static_cast<const T*>(x.data), *add = static_cast<const T*>(residual.data);
    Buffer<float> sums(x.images * blocks * 3 * C), mean(x.images * C), scale(x.images * C);
    auto for_blocks = [&](const auto& f) {  // f(item, image, first element, pixels)
      parallel(x.images * blocks, [&](Share& items) {
        for (const int64_t item : items) {
          const int64_t n = item / blocks, first = item % blocks * kBlock;
          f(item, n, (n * pixels + first) * C, std::min(kBlock, pixels - first));
        }
      });
    };
    for_blocks([&](int64_t item, int64_t, int64_t at, int64_t count) { block_sums(in + at, C, count, sums + item * 3 * C); });
    parallel(x.images * norm.groups, [&](Share& items) {
      for (const int64_t item : items) {
        const int64_t n = item / norm.groups;
        statistics(norm, item % norm.groups, C, pixels, sums + n * blocks * 3 * C, mean + n * C, scale + n * C);
      }
    });
    for_blocks([&](int64_t, int64_t n, int64_t at, int64_t count) {
      apply(in + at, add == nullptr ? nullptr : add + at, mean + n * C, scale + n * C, norm.bias, C, count,
            static_cast<T*>(y.data) + at);
    });
  });
}

}  // namespace segnext
