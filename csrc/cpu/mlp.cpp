// mlp: y = x + W2 GELU(depthwise 3x3 (W1 x + b1) + bd) + b2 in channels_last, or the layer norm of that, without the widened
// activations ever being held.
//
// An item is a row of an image. A thread goes down them in steps of a few rows; in each step the widened channels pass through
// the cache a chunk at a time:
//
//   x (rows + 2) --W1--> wide (chunk) --depthwise, GELU--> narrow (chunk) --W2--> sum (rows), added up over the chunks
//
// The last two widened rows of every chunk stay for the next step; where a thread begins anew it computes two more.
#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/activation.h"
#include "cpu/kernels.h"
#include "cpu/matmul.h"
#include "cpu/stencil.h"

namespace segnext {
namespace {

constexpr int kK = 3;
constexpr int kTaps = kK * kK + 1;  // the bias comes last
constexpr int64_t kChunk = 128;
constexpr int64_t kCache = 768 * 1024;  // bytes of one step

// out <- the layer norm of a pixel z, whose lanes past the last channel are zero
template <class T>
void normalise(const LayerNorm& norm, float* z, int64_t channels, T* out) {
  constexpr int L = kLanes<float>;
  const auto mean_of = [&](Vector<float> sum) {
    float total = 0;
    for (int i = 0; i < L; ++i) total += sum[i];
    return total / static_cast<float>(channels);
  };
  Vector<float> sum = {}, squares = {};
  for_lanes(channels, [&](int64_t c, int) { sum += load<float>(z + c); });
  const float mean = mean_of(sum);
  for_lanes(channels, [&](int64_t c, int lanes) {
    store_lanes(z + c, load<float>(z + c) - mean, lanes);
    squares += load<float>(z + c) * load<float>(z + c);
  });
  const float scale = 1 / std::sqrt(mean_of(squares) + norm.epsilon);
  for_lanes(channels, [&](int64_t c, int lanes) {
    const Vector<float> factor = scale * load_lanes(norm.weight + c, lanes);
    store_lanes(out + c, load<float>(z + c) * factor + load_lanes(norm.bias + c, lanes), lanes);
  });
}

template <class T>
class Walk {
  static constexpr int L = kLanes<float>, kGroups = kChunk / L;

 public:
  // For steps of `step` rows at most; `keep`: whether prepared weights serve more than one of them.
  Walk(const Image& x, const MlpWeights& w, const Image& y, int64_t step, bool keep)
      : x_(x),
        w_(w),
        y_(y),
        C_(x.channels),
        W_(x.width),
        chunks_(ceil_div(w.hidden, kChunk)),
        sum_row_(whole_panels(C_)),
        step_(step),
        row_((W_ + 2) * L),
        slots_(step_ + 2 * (chunks_ + 1)),
        wide_(kGroups * slots_ * row_),
        narrow_(step_ * W_, kChunk),
        sum_((step_ * W_ + 15) * sum_row_),
        taps_(chunks_ * kGroups * kTaps * L),
        bias1_(chunks_ * kChunk),
        kept_(chunks_),
        free_(step_ + 2 * chunks_),
        slot_(step_ + 2),
        place_((step_ + 2) * W_),
        fc1_(static_cast<const T*>(w.fc1.data), C_, w.hidden),
        fc2_(static_cast<const T*>(w.fc2.data), w.hidden, C_),
        keep_(keep),
        weights_(chunks_) {
    for (int64_t i = 0; i < kGroups * slots_; ++i) {  // the pixels beside the rows stay zero
      std::memset(wide_ + i * row_, 0, sizeof(float) * L);
      std::memset(wide_ + (i + 1) * row_ - L, 0, sizeof(float) * L);
    }
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) kept_[chunk] = step_ + 2 * chunk;
    std::memset(bias1_, 0, sizeof(float) * chunks_ * kChunk);
    std::memcpy(bias1_, w.fc1.bias, sizeof(float) * w.hidden);
    const int64_t groups = ceil_div(w.hidden, L);
    std::memset(taps_, 0, sizeof(float) * chunks_ * kGroups * kTaps * L);
    load_row<float>(filter_row(const_cast<float*>(w.depthwise), Dtype::kFloat32, w.hidden, kTaps - 1), 0, 0, 0, taps_, groups,
                    kTaps * L);
    load_row<float>(filter_row(const_cast<float*>(w.depthwise_bias), Dtype::kFloat32, w.hidden, 1), 0, 0, 0,
                    taps_ + (kTaps - 1) * L, groups, kTaps * L);
  }

  // y <- rows [row, row + rows) of image n
  void step(int64_t n, int64_t row, int64_t rows) {
    const bool begins = row == 0 || n * x_.height + row != next_;
    const int64_t begin = std::max<int64_t>(begins ? row - 1 : row + 1, 0);
    const int64_t end = std::max(begin, std::min(row + rows + 1, x_.height));
    const T* pixels = static_cast<const T*>(x_.data) + (n * x_.height + begin) * W_ * C_;
    const Left<T> in{pixels, C_, (end - begin) * W_, C_};
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      if (!weights_[chunk]) weights_[chunk].emplace(fc1_, fc2_, chunk);
      widen(in, row, rows, begin, chunk, begins);
      depthwise_gelu(rows, chunk);
      std::swap(kept_[chunk], free_);
      const ChunkWeights& w = *weights_[chunk];
      matmul_sum<T>(narrow_.first(rows * W_, w.last - w.first), w.fc2, sum_, sum_row_, chunk > 0);
      if (!keep_) weights_[chunk].reset();
    }
    finish((n * x_.height + row) * W_, rows * W_);
    next_ = n * x_.height + row + rows;
  }

 private:
  struct ChunkWeights {
    const int64_t first, last;
    const Weights<T> fc1, fc2;
    ChunkWeights(const Packed<T>& fc1, const Packed<T>& fc2, int64_t chunk)
        : first(chunk * kChunk),
          last(std::min(first + kChunk, fc1.columns)),
          fc1(fc1.from_column(first, last)),
          fc2(fc2.rows(first, last)) {}
  };

  // The row-th of the rows that a step widens, row - 1 to row + rows of the image.
  float* wide(int64_t group, int64_t row) const { return wide_ + (group * slots_ + slot_[row]) * row_; }

  // wide <- rows row - 1 to row + rows of a chunk: those of `in`, which begin at one of them, and the two that are there
  // already where the rows follow those of the step before. The last two go where the next step will find them.
  void widen(const Left<T>& in, int64_t row, int64_t rows, int64_t begin, int64_t chunk, bool begins) {
    for (int64_t r = 0; r < rows + 2; ++r) slot_[r] = !begins && r < 2 ? kept_[chunk] + r : r < rows ? r : free_ + r - rows;
    for (int64_t g = 0; g < kGroups; ++g) {
      if (begins && row == 0) std::memset(wide(g, 0), 0, sizeof(float) * row_);
      if (!begins && rows == 1) std::memcpy(wide_ + (g * slots_ + free_) * row_, wide(g, 1), sizeof(float) * row_);
      if (row + rows == x_.height) std::memset(wide(g, rows + 1), 0, sizeof(float) * row_);
    }
    int64_t* place = place_;
    for (int64_t r = begin - row + 1, end = r + in.count / W_; r < end; ++r) {
      for (int64_t w = 0; w < W_; ++w) *place++ = slot_[r] * row_ + (w + 1) * L;
    }
    matmul_place<T>(in, weights_[chunk]->fc1, bias1_ + chunk * kChunk, place_, W_, slots_ * row_, wide_);
  }

  void depthwise_gelu(int64_t rows, int64_t chunk) {
    constexpr int kTogether = Stored<T>::kVectors;
    for (int64_t g = 0; g < kGroups && chunk * kChunk + g * L < w_.hidden; g += kTogether) {
      const float* taps = taps_ + (chunk * kGroups + g) * kTaps * L;
      for (int64_t r = 0; r < rows; ++r) {
        for_tiles<kTile>(W_, [&](int64_t w, auto size) {
          constexpr int tile = size;
          Vector<float> z[kTogether][tile];
          SEGNEXT_UNROLL
          for (int i = 0; i < kTogether; ++i) {
            const float* window[kK] = {wide(g + i, r) + L, wide(g + i, r + 1) + L, wide(g + i, r + 2) + L};
            const float* filter = taps + i * kTaps * L;
            depthwise_tile<float, kK, tile>(window, filter, load<float>(filter + (kTaps - 1) * L), w, z[i]);
            gelu<T>(z[i]);
          }
          narrow_.store(r * W_ + w, g * L, z);
        });
      }
    }
  }

  // y <- sum + bias + x, normalised if it shall be
  void finish(int64_t pixel, int64_t count) {
    const T* in = static_cast<const T*>(x_.data) + pixel * C_;
    T* out = static_cast<T*>(y_.data) + pixel * C_;
    for (int64_t m = 0; m < count; ++m, in += C_, out += C_) {
      float* sum = sum_ + m * sum_row_;
      for_lanes(C_, [&](int64_t c, int lanes) {
        const Vector<float> z = load<float>(sum + c) + load_lanes(w_.fc2.bias + c, lanes) + load_lanes(in + c, lanes);
        w_.norm.weight == nullptr ? store_lanes(out + c, z, lanes) : store<float>(sum + c, z);
      });
      if (w_.norm.weight != nullptr) normalise(w_.norm, sum, C_, out);
    }
  }

  const Image& x_;
  const MlpWeights& w_;
  const Image& y_;
  const int64_t C_, W_, chunks_, sum_row_, step_, row_, slots_;
  Buffer<float> wide_;  // [kGroups][slots][W + 2][L]: a step's rows, two rows for every chunk, and two more
  Stored<T> narrow_;
  Buffer<float> sum_, taps_, bias1_;
  std::vector<int64_t> kept_;  // the slots of the last two rows of a chunk, and the two that are free
  int64_t free_;
  Buffer<int64_t> slot_, place_;  // of a step's row in wide, and of a pixel in its group
  const Packed<T> fc1_, fc2_;
  const bool keep_;
  int64_t next_ = 0;  // the row after those that were computed last, counted through all images
  std::vector<std::optional<ChunkWeights>> weights_;
};

}  // namespace

void mlp_forward(const Image& x, const MlpWeights& w, const Image& y, const Parallel& parallel) {
  constexpr int64_t kLeastRows = 4;
  const int64_t rows = x.images * x.height;
  if (rows == 0 || x.width == 0) return;
  const int64_t share = std::max(ceil_div(rows, parallel.threads), std::min(kLeastRows, rows));
  with_dense_type(x.dtype, [&]<class T>() {
    const int64_t row_bytes = x.width * ((whole_panels(x.channels) + kChunk) * sizeof(float) + kChunk * sizeof(Operand<T>));
    const int64_t fits = std::clamp<int64_t>(kCache / row_bytes, 1, x.height);
    const int64_t steps = ceil_div(share, fits), step = ceil_div(share, steps);  // of a share, as long as each other
    parallel({rows, kLeastRows}, [&](Share& items) {
      Walk<T> walk(x, w, y, step, steps > 1);
      for (Range range = items.next(step); !range.empty(); range = items.next(step)) {
        for (int64_t at = range.begin; at < range.end;) {
          const int64_t n = at / x.height, row = at % x.height, count = std::min(range.end - at, x.height - row);
          walk.step(n, row, count);
          at += count;
        }
      }
    });
  });
}

}  // namespace segnext
