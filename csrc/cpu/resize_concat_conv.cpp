// resize_concat_conv: a 1x1 convolution of several maps, resized bilinearly to the first one's size and concatenated.
//
// Resizing and a 1x1 convolution commute: each map is convolved at its own size with its own part of the weights, and the first
// one's product takes up the others' while it is written, resized. No concatenation is ever held.
#include <algorithm>
#include <deque>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/matmul.h"
#include "cpu/sample.h"

namespace segnext {
namespace {

// The product of one coarser map with its weights, [images][h][w][padded channels], and its rows at the output's rows.
struct Coarse {
  static constexpr int64_t kSpare = 15;  // pixels that matmul_sum may write
  int64_t height, width, row;
  Buffer<float> product;

  Coarse(const Image& x, int64_t padded)
      : height(x.height), width(x.width), row(x.width * padded), product((x.images * x.height * x.width + kSpare) * padded) {}

  // out [w][padded channels]
  void resize_row(int64_t n, int64_t at, int64_t out_height, float* out) const {
    const Sample<float> sample(at, height, out_height);
    const float* image = product + n * height * row;
    for (int64_t i = 0; i < row; i += kLanes<float>)
      store<float>(out + i, lerp<float>(image + sample.low * row + i, image + sample.high * row + i, sample.weight));
  }
};

}  // namespace

void resize_concat_conv_forward(const Image* maps, const void* const* weights, int64_t count, const float* bias, const Image& y,
                                const Parallel& parallel) {
  const int64_t C = y.channels, padded = whole_panels(C);
  with_dense_type(y.dtype, [&]<class T>() {
    std::deque<Coarse> coarse;
    for (int64_t i = 1; i < count; ++i) {
      const Image& x = maps[i];
      coarse.emplace_back(x, padded);
      float* product = coarse.back().product;
      const Packed<T> packed(static_cast<const T*>(weights[i]), x.channels, C);
      const int64_t pixels = x.images * x.height * x.width;
      const int64_t blocks = ceil_div(pixels, kPixels);
      parallel(blocks, [&](Share& items) {
        const Weights<T> part = prepared(packed, blocks <= parallel.threads);
        for (const int64_t block : items) {
          const int64_t first = block * kPixels;
          const T* in = static_cast<const T*>(x.data) + first * x.channels;
          matmul_sum<T>({in, x.channels, std::min(kPixels, pixels - first), x.channels}, part, product + first * padded, padded,
                        false);
        }
      });
    }
    const Packed<T> packed(static_cast<const T*>(weights[0]), maps[0].channels, C);
    std::vector<Sample<float>> across;  // the columns of every map
    for (const Coarse& map : coarse) {
      const auto own = samples<float>(map.width, y.width);
      across.insert(across.end(), own.begin(), own.end());
    }
    parallel(y.images * y.height, [&](Share& items) {
      const Weights<T> part = prepared(packed, false);
      int64_t size = 0;
      for (const Coarse& map : coarse) size += map.row;
      Buffer<float> resized(size);
      for (const int64_t item : items) {
        const int64_t n = item / y.height, row = item % y.height;
        float* at = resized;
        for (const Coarse& map : coarse) {
          map.resize_row(n, row, y.height, at);
          at += map.row;
        }
        const T* in = static_cast<const T*>(maps[0].data) + item * y.width * maps[0].channels;
        T* out = static_cast<T*>(y.data) + item * y.width * C;
        matmul<T>({in, maps[0].channels, y.width, maps[0].channels}, part,
                  [&](int64_t m, auto rows, int64_t c, int lanes, auto& z) {
                    constexpr int count = rows;
                    const Vector<float> b = load_lanes(bias + c, lanes);
                    SEGNEXT_UNROLL
                    for (int i = 0; i < count; ++i) {
                      z[i] += b;
                      const float* map_row = resized + c;
                      const Sample<float>* sample = across.data() + m + i;
                      for (const Coarse& map : coarse) {
                        z[i] += lerp<float>(map_row + sample->low * padded, map_row + sample->high * padded, sample->weight);
                        map_row += map.row;
                        sample += y.width;
                      }
                      store_lanes(out + (m + i) * C + c, z[i], lanes);
                    }
                  });
      }
    });
  });
}

}  // namespace segnext
