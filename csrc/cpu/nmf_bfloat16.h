// nmf of bfloat16 with products of bfloat16. x is a product's left side for x^T B, and its rows in pairs are the right side for
// (x C)^T = C^T x. The factors stay in float32: each enters a product as the sum of two bfloat16, the value and what rounding
// took from it, which leaves an error of 2^-17, or is rounded. The first product is never rounded, since it is the softmax's
// logits, whose absolute error counts.
#pragma once
#include "cpu/nmf_tiles.h"

namespace segnext {

class NmfOfBFloat16 : public NmfOnTiles<NmfOfBFloat16> {
  friend class NmfOnTiles<NmfOfBFloat16>;

 public:
  // Dot products have twice the rate of float32, so they only pay for rounded factors.
  static bool serves(const Matrices& x, int64_t rank, bool rounded) {
    constexpr bool kTiles = kDepthStep<BFloat16> > 2;
    return NmfOnTiles::serves(x) && (kTiles || parts_of(NmfShape<float>(x, rank), rounded) == 1);
  }

  NmfOfBFloat16(const Matrices& x, int64_t rank, int64_t steps, bool rounded, const Parallel& parallel)
      : NmfOnTiles(x, rank, steps, Keep::kNothing, nullptr, parallel),
        parts_(parts_of(s_, rounded)),
        depth_(filled<BFloat16>((parts_ == 1 ? 1 : 3) * s_.padded)),
        pairs_(x.batch * s_.N * s_.D),
        bases_(x.batch * s_.D * 2 * s_.padded),
        transposed_(x.batch * s_.D * depth_) {
    pair_rows();
  }

 private:
  // How many bfloat16 a factor is in a product: two where one would leave half a panel empty.
  static int parts_of(const NmfShape<float>& s, bool rounded) { return rounded && s.padded % kPanel == 0 ? 1 : 2; }

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

  int64_t part_rows() const { return s_.chunk; }

  // pairs [panels][N / 2][32][2] <- rows of x^T
  void pair_rows() {
    parallel_(x_.batch * s_.N / 2, [&](Share& items) {
      for (const int64_t i : items) {
        const int64_t image = i / (s_.N / 2), n = i % (s_.N / 2) * 2;
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
    });
  }

  // Calls f(image, d, r, B[d][r ...], B[d + 1][r ...]) for every other row d and every vector of the rank, with B = of(image).
  template <class B, class F>
  void for_base_pairs(const B& of, const F& f) {
    parallel_(x_.batch * s_.D / 2, [&](Share& items) {
      for (const int64_t i : items) {
        const int64_t image = i / (s_.D / 2), d = i % (s_.D / 2) * 2;
        const float* row = of(image) + d * s_.padded;
        for (int64_t r = 0; r < s_.padded; r += L) f(image, d, r, load<float>(row + r), load<float>(row + s_.padded + r));
      }
    });
  }

  // bases_ [panels][D / 2][32][2], the columns of B's high parts and then those of its low parts, if any
  void pack_bases(int64_t step) {
    packed_parts_ = step == 0 ? 2 : parts_;
    const auto of = [&](int64_t image) { return bases(step, image); };
    for_base_pairs(of, [&](int64_t image, int64_t d, int64_t r, Vector<float> even, Vector<float> odd) {
      const Split a(even), b(odd);
      auto put = [&](int64_t column, VectorN<uint16_t, L> even, VectorN<uint16_t, L> odd) {
        const auto bits = pair<L>(even, odd);
        BFloat16* panels = bases_ + image * s_.D * packed_parts_ * s_.padded;
        std::memcpy(panels + (column / kPanel * s_.D + d) * kPanel + column % kPanel * 2, &bits, sizeof bits);
      };
      put(r, a.high, b.high);
      if (packed_parts_ == 2) put(s_.padded + r, a.low, b.low);
    });
  }

  // transposed_ [panels][depth_ / 2][32][2], rows of B^T: the high parts and, for two parts, these again and the low parts
  void pack_transposed() {
    std::memset(transposed_, 0, sizeof(BFloat16) * x_.batch * s_.D * depth_);
    const auto of = [&](int64_t image) { return left(image); };
    for_base_pairs(of, [&](int64_t image, int64_t d, int64_t r, Vector<float> even, Vector<float> odd) {
      const Split rows[] = {Split(even), Split(odd)};
      for (int i = 0; i < 2; ++i) {
        const int64_t column = d + i;
        BFloat16* panel = transposed_ + (image * s_.D + column / kPanel * kPanel) * depth_ + column % kPanel * 2;
        for (int lane = 0; lane < L; ++lane) {
          auto put = [&](int64_t k, uint16_t bits) { panel[k / 2 * 2 * kPanel + k % 2] = {bits}; };
          put(r + lane, rows[i].high[lane]);
          if (parts_ == 1) continue;
          put(s_.padded + r + lane, rows[i].high[lane]);
          put(2 * s_.padded + r + lane, rows[i].low[lane]);
        }
      }
    });
  }

  class Part {
   public:
    Part(const NmfOfBFloat16& nmf, int64_t image, int64_t first, int64_t count)
        : nmf_(nmf), D_(nmf.s_.D), R_(nmf.s_.padded), image_(image), first_(first), count_(count) {}

    void project(float* num) const {
      const int64_t columns = nmf_.packed_parts_ * R_;
      const Packed<BFloat16> b(nmf_.bases_ + image_ * D_ * columns, D_, columns);
      const Pixels<BFloat16> x{nmf_.x_row(image_, first_), D_, count_, D_};
      if (columns == R_) return matmul_sum<BFloat16>(x, b, num, R_, false);
      Buffer<float> both(count_ * 2 * R_);
      matmul_sum<BFloat16>(x, b, both, 2 * R_, false);
      for (int64_t n = 0; n < count_; ++n) {
        for (int64_t r = 0; r < R_; r += L) {
          const float* from = both + n * 2 * R_ + r;
          store<float>(num + n * R_ + r, load<float>(from) + load<float>(from + R_));
        }
      }
    }

    void add_products(const float* c, float* sums, bool add) const {
      Buffer<float> transposed(R_ * count_);
      const bool both = nmf_.parts_ == 2;
      Buffer<BFloat16> high(R_ * count_), low(both ? R_ * count_ : 0);
      transpose_rows<float>(c, R_, count_, R_, transposed, count_);
      for (int64_t i = 0; i < R_ * count_; i += L) {
        const Split split(load<float>(transposed + i));
        store_bits(high + i, split.high);
        if (both) store_bits(low + i, split.low);
      }
      const Packed<BFloat16> x = Packed<BFloat16>(nmf_.pairs(image_), nmf_.s_.N, D_).rows(first_, first_ + count_);
      matmul_sum<BFloat16>({high, count_, R_, count_}, x, sums, D_, add);
      if (both) matmul_sum<BFloat16>({low, count_, R_, count_}, x, sums, D_, true);
    }

    // C B^T = (high + low) B_high + high B_low, or the product of the high parts
    void multiply(const float* c, const Matrices& y) const {
      const int64_t depth = nmf_.depth_;
      Buffer<BFloat16> left(count_ * depth);
      std::memset(left, 0, sizeof(BFloat16) * count_ * depth);
      for (int64_t n = 0; n < count_; ++n) {
        for (int64_t r = 0; r < R_; r += L) {
          const Split split(load<float>(c + n * R_ + r));
          BFloat16* to = left + n * depth + r;
          store_bits(to, split.high);
          if (nmf_.parts_ == 1) continue;
          store_bits(to + R_, split.low);
          store_bits(to + 2 * R_, split.high);
        }
      }
      BFloat16* out = static_cast<BFloat16*>(y.data) + (image_ * nmf_.s_.N + first_) * D_;
      const Packed<BFloat16> b(nmf_.transposed_ + image_ * D_ * depth, depth, D_);
      matmul<BFloat16>({left, depth, count_, depth}, b, [&](int64_t m, auto rows, int64_t d, int lanes, const auto& z) {
        constexpr int n = rows;
        SEGNEXT_UNROLL
        for (int i = 0; i < n; ++i) store_lanes(out + (m + i) * D_ + d, z[i], lanes);
      });
    }

   private:
    const NmfOfBFloat16& nmf_;
    const int64_t D_, R_, image_, first_, count_;
  };

  const int parts_;       // of a factor in all products but the first
  int packed_parts_ = 2;  // of the bases that are packed
  const int64_t depth_;
  Buffer<BFloat16> pairs_, bases_, transposed_;
};

}  // namespace segnext
