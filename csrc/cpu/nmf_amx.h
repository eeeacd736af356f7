// nmf of bfloat16 on the processor's matrix tiles, forward. x is a product's left side for x^T B, and its rows in pairs are the
// right side for (x C)^T = C^T x. The factors stay in float32: each enters a product as the sum of two bfloat16, the value and
// what rounding took from it, which leaves an error of 2^-17.
#pragma once
#include "cpu/matmul.h"
#include "cpu/nmf.h"

namespace segnext {

class NmfOnTiles : public Nmf<float> {
  using Base = Nmf<float>;

 public:
  static bool serves(const Matrices& x) {
    return x.dtype == Dtype::kBFloat16 && x.transposed && x.rows % kPanel == 0 && x.columns % amx::kDepth == 0;
  }

  NmfOnTiles(const Matrices& x, const void* bases, int64_t rank, int64_t steps, const Parallel& parallel)
      : Base(x, bases, rank, steps, false, parallel),
        depth_(filled<BFloat16>(3 * s_.padded)),
        pairs_(x.batch * s_.N * s_.D),
        bases_(x.batch * s_.D * 2 * s_.padded),
        transposed_(x.batch * s_.D * depth_) {
    for_chunks([&](int64_t, int64_t image, int64_t first, int64_t count) { pair_rows(image, first, count); });
  }

  void run(const Matrices& y) {
    pack_bases(0);
    for (int64_t step = 0; step < steps_; ++step) {
      update_coefficients(step);
      update_bases(step, [&](int64_t image, int64_t first, int64_t rows, float* sums) -> const float* {
        Buffer<float> whole(s_.padded * rows);
        sum_products(image, first, rows, whole);
        transpose_rows<float>(whole, rows, s_.padded, rows, sums, s_.padded);
        return sums;
      });
      pack_bases(step + 1);
    }
    pack_transposed();
    update_coefficients(steps_, &y);
  }

 private:
  // value [kLanes] as two bfloat16
  struct Split {
    VectorN<uint16_t, L> high, low;
    explicit Split(Vector<float> value) : high(narrow<L>(value, BFloat16{})) {
      low = narrow<L>(value - widen<L>(high, BFloat16{}), BFloat16{});
    }
  };
  static void store_bits(BFloat16* to, VectorN<uint16_t, L> bits) { std::memcpy(to, &bits, sizeof bits); }

  const BFloat16* x_row(int64_t image, int64_t row) const {
    return static_cast<const BFloat16*>(x_.data) + (image * s_.N + row) * s_.D;
  }
  BFloat16* pairs(int64_t image) const { return pairs_ + image * s_.N * s_.D; }

  // f(item, image, first row of x^T, rows)
  template <class F>
  void for_chunks(const F& f) {
    parallel_(x_.batch * s_.chunks, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item % s_.chunks * s_.chunk;
        f(item, item / s_.chunks, first, std::min(s_.chunk, s_.N - first));
      }
    });
  }

  // pairs [panels][N / 2][32][2] <- rows of x^T
  void pair_rows(int64_t image, int64_t first, int64_t count) {
    for (int64_t n = first; n < first + count; n += 2) {
      const BFloat16 *even = x_row(image, n), *odd = even + s_.D;
      for (int64_t d = 0; d < s_.D; d += L) {
        BFloat16* to = pairs(image) + (d / kPanel * s_.N + n) * kPanel + d % kPanel * 2;
        VectorN<uint16_t, L> a, b;
        std::memcpy(&a, even + d, sizeof a);
        std::memcpy(&b, odd + d, sizeof b);
        const auto bits = pair<L>(a, b);
        std::memcpy(to, &bits, sizeof bits);
      }
    }
  }

  // Calls f(image, d, r, B[d][r ...], B[d + 1][r ...]) for every other row d and every vector of the rank.
  template <class F>
  void for_base_pairs(int64_t step, const F& f) {
    parallel_(x_.batch * s_.D / 2, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / (s_.D / 2), d = i % (s_.D / 2) * 2;
        const float* row = bases(step, image) + d * s_.padded;
        for (int64_t r = 0; r < s_.padded; r += L) f(image, d, r, load<float>(row + r), load<float>(row + s_.padded + r));
      }
    });
  }

  // bases_ [panels][D / 2][32][2], the columns of B's high parts and then those of its low parts
  void pack_bases(int64_t step) {
    for_base_pairs(step, [&](int64_t image, int64_t d, int64_t r, Vector<float> even, Vector<float> odd) {
      const Split a(even), b(odd);
      auto put = [&](int64_t column, VectorN<uint16_t, L> even, VectorN<uint16_t, L> odd) {
        const auto bits = pair<L>(even, odd);
        BFloat16* panels = bases_ + image * s_.D * 2 * s_.padded;
        std::memcpy(panels + (column / kPanel * s_.D + d) * kPanel + column % kPanel * 2, &bits, sizeof bits);
      };
      put(r, a.high, b.high);
      put(s_.padded + r, a.low, b.low);
    });
  }

  // transposed_ [panels][depth_ / 2][32][2], rows of B^T: the high parts, these again, the low parts
  void pack_transposed() {
    std::memset(transposed_, 0, sizeof(BFloat16) * x_.batch * s_.D * depth_);
    for_base_pairs(steps_, [&](int64_t image, int64_t d, int64_t r, Vector<float> even, Vector<float> odd) {
      const Split rows[] = {Split(even), Split(odd)};
      for (int i = 0; i < 2; ++i) {
        const int64_t column = d + i;
        BFloat16* panel = transposed_ + (image * s_.D + column / kPanel * kPanel) * depth_ + column % kPanel * 2;
        for (int lane = 0; lane < L; ++lane) {
          auto put = [&](int64_t k, uint16_t bits) { panel[k / 2 * 2 * kPanel + k % 2] = {bits}; };
          put(r + lane, rows[i].high[lane]);
          put(s_.padded + r + lane, rows[i].high[lane]);
          put(2 * s_.padded + r + lane, rows[i].low[lane]);
        }
      }
    });
  }

  // As the base's; with y, the last update, whose product with B is written.
  void update_coefficients(int64_t step, const Matrices* y = nullptr) {
    for_chunks([&](int64_t item, int64_t image, int64_t first, int64_t count) {
      const int64_t R = s_.padded;
      Buffer<float> num(count * 2 * R), den(count * R);
      float* c = coefficients(step, image, first);
      const Packed<BFloat16> b(bases_ + image * s_.D * 2 * R, s_.D, 2 * R);
      matmul_sum<BFloat16>({x_row(image, first), s_.D, count, s_.D}, b, num, 2 * R, false);
      for (int64_t n = 0; n < count; ++n) {  // in place: what is written lies before what is still to be read
        for (int64_t r = 0; r < R; r += L) {
          const float* from = num + n * 2 * R + r;
          store<float>(num + n * R + r, load<float>(from) + load<float>(from + R));
        }
      }
      if (step == 0) {
        std::memcpy(c, num, sizeof(float) * count * R);
        softmax_rows<float>(s_, c, count);
      }
      gemm<float>({c, R, 1}, count, s_.rank, bb(image), R, s_.vectors, den, R, false);
      scale(c, num, den, count * R, c, nullptr);
      if (y != nullptr) return multiply(c, image, first, count, *y);
      add_to_cc(c, c, count, item, false);
      add_products(c, image, first, count, item);
    });
  }

  // The chunk's share of C^T x: [padded][D]
  void add_products(const float* c, int64_t image, int64_t first, int64_t count, int64_t item) {
    const int64_t R = s_.padded;
    Buffer<float> transposed(R * count);
    Buffer<BFloat16> high(R * count), low(R * count);
    transpose_rows<float>(c, R, count, R, transposed, count);
    for (int64_t i = 0; i < R * count; i += L) {
      const Split split(load<float>(transposed + i));
      store_bits(high + i, split.high);
      store_bits(low + i, split.low);
    }
    const Packed<BFloat16> x = Packed<BFloat16>(pairs(image), s_.N, s_.D).rows(first, first + count);
    float* sums = xc_ + item * s_.D * R;
    matmul_sum<BFloat16>({high, count, R, count}, x, sums, s_.D, false);
    matmul_sum<BFloat16>({low, count, R, count}, x, sums, s_.D, true);
  }

  // out [padded][rows] <- the sum over the chunks of rows of x C, transposed
  void sum_products(int64_t image, int64_t first, int64_t rows, float* out) const {
    for (int64_t r = 0; r < s_.padded; ++r) {
      for (int64_t d = 0; d < rows; d += L) {
        const float* from = xc_ + image * s_.chunks * s_.D * s_.padded + r * s_.D + first + d;
        Vector<float> sum = load<float>(from);
        for (int64_t part = 1; part < s_.chunks; ++part) sum += load<float>(from + part * s_.D * s_.padded);
        store<float>(out + r * rows + d, sum);
      }
    }
  }

  // y^T rows <- C B^T = (high + low) B_high + high B_low
  void multiply(const float* c, int64_t image, int64_t first, int64_t count, const Matrices& y) {
    const int64_t R = s_.padded;
    Buffer<BFloat16> left(count * depth_);
    std::memset(left, 0, sizeof(BFloat16) * count * depth_);
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t r = 0; r < R; r += L) {
        const Split split(load<float>(c + n * R + r));
        BFloat16* to = left + n * depth_ + r;
        store_bits(to, split.high);
        store_bits(to + R, split.low);
        store_bits(to + 2 * R, split.high);
      }
    }
    BFloat16* out = static_cast<BFloat16*>(y.data) + (image * s_.N + first) * s_.D;
    const Packed<BFloat16> b(transposed_ + image * s_.D * depth_, depth_, s_.D);
    matmul<BFloat16>({left, depth_, count, depth_}, b, [&](int64_t m, auto rows, int64_t d, int lanes, const auto& z) {
      constexpr int n = rows;
      SEGNEXT_UNROLL
      for (int i = 0; i < n; ++i) store_lanes(out + (m + i) * s_.D + d, z[i], lanes);
    });
  }

  const int64_t depth_;
  Buffer<BFloat16> pairs_, bases_, transposed_;
};

}  // namespace segnext
