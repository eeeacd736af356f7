// nmf of float32 on the processor's matrix tiles, in the three bfloat16 of matmul_split.h. A part of x is split once a step, as
// a product's left side for x^T B; its tiles, paired along the other dimension, are then the right side for (x C)^T = C^T x.
#pragma once
#include <deque>

#include "cpu/nmf_tiles.h"

namespace segnext {

class NmfOfFloat32 : public NmfOnTiles<NmfOfFloat32> {
  friend class NmfOnTiles<NmfOfFloat32>;

 public:
  using NmfOnTiles::NmfOnTiles;

 private:
  int64_t part_rows() const { return std::clamp<int64_t>((1 << 16) / s_.D / amx::kDepth, 1, 8) * amx::kDepth; }

  // panels [panels of the columns][depth][32] of every image, filled by f(image, panels), as operands
  template <class F>
  void pack(std::deque<SplitWeights>& operands, int64_t depth, int64_t columns, const F& f) {
    operands.clear();
    const int64_t size = whole_panels(columns) * depth;
    Buffer<float> panels(size);
    for (int64_t image = 0; image < x_.batch; ++image) {
      std::memset(panels, 0, sizeof(float) * size);
      f(image, panels);
      operands.emplace_back(Packed<float>(panels, depth, columns));
    }
  }
  void pack_bases(int64_t step) {
    pack(bases_, s_.D, s_.padded, [&](int64_t image, float* panels) {
      for (int64_t d = 0; d < s_.D; ++d) {
        for (int64_t r = 0; r < s_.padded; r += L)
          store<float>(panels + (r / kPanel * s_.D + d) * kPanel + r % kPanel,
                       load<float>(bases(step, image) + d * s_.padded + r));
      }
    });
  }
  void pack_transposed() {
    pack(transposed_, s_.padded, s_.D, [&](int64_t image, float* panels) {
      for (int64_t d = 0; d < s_.D; d += kPanel)
        transpose_rows<float>(left(image) + d * s_.padded, s_.padded, kPanel, s_.padded, panels + d * s_.padded, kPanel);
    });
  }

  class Part {
   public:
    Part(const NmfOfFloat32& nmf, int64_t image, int64_t first, int64_t count)
        : D_(nmf.s_.D),
          R_(nmf.s_.padded),
          count_(count),
          row_((image * nmf.s_.N + first) * D_),
          nmf_(nmf),
          image_(image),
          x_(static_cast<const float*>(nmf.x_.data) + row_, D_, count, D_) {}

    void project(float* num) const {
      const amx::Tiles tiles;
      for (int64_t r = 0; r < R_; r += kPanel) {
        const BFloat16* panel = nmf_.bases_[image_].panel(r);
        if (r + kPanel <= R_) {
          sum_panel_split<2>(x_, 0, count_, panel, num + r, R_, false);
        } else {
          sum_panel_split<1>(x_, 0, count_, panel, num + r, R_, false);
        }
      }
    }

    void add_products(const float* c, float* sums, bool add) const {
      Buffer<float> transposed(R_ * count_);
      transpose_rows<float>(c, R_, count_, R_, transposed, count_);
      const SplitPixels left(transposed, count_, R_, count_);
      Buffer<BFloat16> panel(count_ * kPanel * kParts);
      const amx::Tiles tiles;
      for (int64_t d = 0; d < D_; d += kPanel) {
        pair_tiles(d, panel);
        sum_panel_split(left, 0, R_, panel, sums + d, D_, add);
      }
    }

    void multiply(const float* c, const Matrices& y) const {
      float* out = static_cast<float*>(y.data) + row_;
      matmul<float>({c, R_, count_, R_}, nmf_.transposed_[image_],
                    [&](int64_t m, auto rows, int64_t d, int lanes, const auto& z) {
                      constexpr int n = rows;
                      SEGNEXT_UNROLL
                      for (int i = 0; i < n; ++i) store_lanes(out + (m + i) * D_ + d, z[i], lanes);
                    });
    }

   private:
    // panel [count / 32][kParts][2 halves][16 pairs of rows n and n + 16][16 columns from d on][2]
    void pair_tiles(int64_t d, BFloat16* panel) const {
      typedef VectorN<uint32_t, L> U;
      for (int64_t n = 0; n < count_; n += amx::kDepth) {
        const int64_t from = d / amx::kDepth * kParts * kTileSize;
        const BFloat16 *low = x_.block(n) + from, *high = x_.block(n + amx::kRows) + from;
        for (int part = 0; part < kParts; ++part, panel += 2 * kTileSize) {
          for (int64_t i = 0; i < amx::kRows; ++i) {
            U a, b;
            std::memcpy(&a, low + part * kTileSize + i * amx::kDepth, sizeof a);
            std::memcpy(&b, high + part * kTileSize + i * amx::kDepth, sizeof b);
            const U first = (a & 0xffff) | b << 16, second = a >> 16 | (b & 0xffff0000u);
            std::memcpy(panel + i * amx::kDepth, &first, sizeof first);
            std::memcpy(panel + kTileSize + i * amx::kDepth, &second, sizeof second);
          }
        }
      }
    }

    const int64_t D_, R_, count_, row_;
    const NmfOfFloat32& nmf_;
    const int64_t image_;
    const SplitPixels x_;
  };

  std::deque<SplitWeights> bases_, transposed_;  // B and its transpose of every image
};

}  // namespace segnext
