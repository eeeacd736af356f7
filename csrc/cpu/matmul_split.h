// Products of float32 pixels with packed float32 weights on the processor's bfloat16 tiles (AMX). Part of matmul.h.
//
// A float is the sum of three bfloat16, a = a1 + a2 + a3, exactly: each is what is left, rounded to the 8 bits that it holds.
// Of the nine products of two such sums the six largest are made and summed in float32,
//
//   a b = a1 b1 + (a1 b2 + a2 b1) + (a1 b3 + a2 b2 + a3 b1), to 2^-23 |a b|,
//
// which is what float32 arithmetic loses too, in less than half its time: the tiles multiply sixteen times as fast. What is not
// finite comes out as NaN, as do magnitudes from 3.39e38 on; parts below 1.2e-38 count as zero.
#pragma once
#include <algorithm>

#include "cpu/matmul_amx.h"

namespace segnext {

using amx::kParts, amx::kTileSize;

// Pairs (even[i], odd[i]) of the three parts of two vectors, as tiles hold them.
SEGNEXT_INLINE void split_pairs(Vector<float> even, Vector<float> odd, BFloat16* out, int64_t part) {
  typedef VectorN<uint32_t, kLanes<float>> U;
  SEGNEXT_UNROLL
  for (int i = 0; i < kParts; ++i) {
    const uint32_t half = i + 1 < kParts ? 0x8000 : 0;  // nothing is left of the last part
    const U e = (bit_cast<U>(even) + half) & 0xffff0000u, o = (bit_cast<U>(odd) + half) & 0xffff0000u, pairs = e >> 16 | o;
    std::memcpy(out + i * part, &pairs, sizeof pairs);
    even -= bit_cast<Vector<float>>(e);
    odd -= bit_cast<Vector<float>>(o);
  }
}

// Pixels in tiles [16 pixels each][depth / 32][kParts][16][32]. In each 32 channels, channel i is followed by channel i + 16.
class SplitPixels {
  static constexpr int L = kLanes<float>;

 public:
  static constexpr int kVectors = 2;  // of channels that are stored together

  // Room for pixels to be stored, those past the last one zero.
  SplitPixels(int64_t most, int64_t depth)
      : count(most),
        depth(depth),
        block_(ceil_div(depth, amx::kDepth) * kParts * kTileSize),
        data_(ceil_div(most, amx::kRows) * block_) {
    std::memset(data_ + most / amx::kRows * block_, 0, sizeof(BFloat16) * (most % amx::kRows > 0 ? block_ : 0));
  }
  SplitPixels(const float* data, int64_t row, int64_t count, int64_t depth, bool = false) : SplitPixels(count, depth) {
    for (int64_t m = 0; m < count; ++m, data += row) {
      BFloat16* out = at(m, 0);
      int64_t c = 0;
      for (; c + 2 * L <= depth; c += 2 * L, out += kParts * kTileSize) {
        __builtin_prefetch(data + row + c);  // rows may lie on pages of their own, which the processor does not foresee
        __builtin_prefetch(data + row + c + L);
        split_pairs(load<float>(data + c), load<float>(data + c + L), out, kTileSize);
      }
      if (c == depth) continue;
      auto rest = [&](int64_t k) { return load_some<float>(data + k, static_cast<int>(std::clamp<int64_t>(depth - k, 0, L))); };
      split_pairs(rest(c), rest(c + L), out, kTileSize);
    }
  }

  // Channels [c, c + 32) of Tile pixels from m on
  template <int Tile>
  SEGNEXT_INLINE void store(int64_t m, int64_t c, const Vector<float> (&z)[kVectors][Tile]) {
    SEGNEXT_UNROLL
    for (int i = 0; i < Tile; ++i) split_pairs(z[0][i], z[1][i], at(m + i, c), kTileSize);
  }
  // The first of the stored pixels and channels.
  const SplitPixels& first(int64_t pixels, int64_t channels) {
    count = pixels;
    depth = channels;
    return *this;
  }

  int64_t count, depth;
  const BFloat16* block(int64_t m) const { return data_ + m / amx::kRows * block_; }
  int64_t block_size() const { return block_; }

 private:
  BFloat16* at(int64_t m, int64_t c) {
    return data_ + m / amx::kRows * block_ + c / amx::kDepth * kParts * kTileSize + m % amx::kRows * amx::kDepth;
  }

  int64_t block_;
  Buffer<BFloat16> data_;
};

// Weights in tiles [panels][depth / 32][kParts][2 halves of a panel][16][16][2], in the order of SplitPixels: all at once, or,
// for a single product, every panel when it is asked for and until the next one is.
class SplitWeights {
 public:
  explicit SplitWeights(const Packed<float>& w, bool once = false)
      : columns(w.columns),
        w_(w),
        once_(once),
        panel_(ceil_div(w.depth, amx::kDepth) * kParts * 2 * kTileSize),
        data_((once ? 1 : ceil_div(w.columns, kPanel)) * panel_) {
    for (int64_t first = 0; first < (once ? 0 : columns); first += kPanel) split(first, data_ + first / kPanel * panel_);
  }
  const int64_t columns;
  // Of the columns from `first` on
  const BFloat16* panel(int64_t first) const {
    if (!once_) return data_ + first / kPanel * panel_;
    split(first, data_);
    return data_;
  }

 private:
  void split(int64_t first, BFloat16* out) const {
    const float* panel = w_.data + first / kPanel * w_.panel_size;
    for (int64_t k = 0; k < w_.depth; k += amx::kDepth, out += kParts * 2 * kTileSize) {
      for (int64_t i = 0; i < 2 * amx::kRows; ++i) {
        const int64_t row = k + i % amx::kRows, half = i / amx::kRows * amx::kColumns;
        auto vector = [&](int64_t row) { return row < w_.depth ? load<float>(panel + row * kPanel + half) : Vector<float>{}; };
        split_pairs(vector(row), vector(row + amx::kRows), out + i * amx::kDepth, 2 * kTileSize);
      }
    }
  }

  const Packed<float> w_;
  const bool once_;
  const int64_t panel_;
  const Buffer<BFloat16> data_;
};

inline constexpr int64_t kSplitPart = 128;  // of a product's depth, whose share of a panel stays in the first cache

// out (+)= blocks of pixels from m on * a panel, channels from k on, the first of kSplitPart. Sums begin at
// `start` (null: zero) and go on from `out`.
template <int Blocks, int Halves = 2>
SEGNEXT_INLINE void multiply_split(const SplitPixels& a, int64_t m, const BFloat16* panel, int64_t k,
                                   const float* const (&start)[4], int64_t start_row, float* const (&out)[4], int64_t out_row) {
  const int64_t depth = std::min(kSplitPart, a.depth - k), from = k / amx::kDepth * kParts * kTileSize;
  const BFloat16* left = a.block(m) + from;
  panel += 2 * from;
  if (k == 0) return amx::multiply_parts<Blocks, Halves>(left, a.block_size(), panel, depth, start, start_row, out, out_row);
  amx::multiply_parts<Blocks, Halves>(left, a.block_size(), panel, depth, {out[0], out[1], out[2], out[3]}, out_row, out,
                                      out_row);
}

// sum [rows rounded up to 16][16 Halves] (+)= pixels [begin, begin + rows) * a panel, `begin` a multiple of 16
template <int Halves = 2>
void sum_panel_split(const SplitPixels& a, int64_t begin, int64_t rows, const BFloat16* panel, float* sum, int64_t sum_row,
                     bool add) {
  for (int64_t k = 0; k < a.depth; k += kSplitPart) {
    for_blocks(round_up(rows, amx::kRows), [&](int64_t m, auto blocks) {
      float *at = sum + m * sum_row, *next = at + (blocks - 1) * amx::kRows * sum_row;
      float* const out[] = {at, at + amx::kColumns, next, next + amx::kColumns};
      const float* const start[] = {add ? at : nullptr, out[1], next, out[3]};
      multiply_split<blocks, Halves>(a, begin + m, panel, k, start, sum_row, out, sum_row);
    });
  }
}

// As for_product_tiles.
template <class F>
SEGNEXT_INLINE void for_split_products(const SplitPixels& a, const SplitWeights& w, const F& f) {
  constexpr int64_t kMost = 128;  // pixels whose sums stay in the first cache
  const amx::Tiles tiles;
  alignas(64) float sums[kMost * kPanel];
  const int64_t group = a.depth > kSplitPart ? kMost : 2 * amx::kRows;
  for (int64_t begin = 0; begin < a.count; begin += group) {
    const int64_t rows = std::min(group, a.count - begin);
    for (int64_t first = 0; first < w.columns; first += kPanel) {
      sum_panel_split(a, begin, rows, w.panel(first), sums, kPanel, false);
      for_sum_tiles(sums, rows, [&](int64_t m, auto tile, auto& acc) { f(begin + m, tile, first, acc); });
    }
  }
}

// sum [rows rounded up to 16][columns rounded up to panels] (+)= a * w
inline void matmul_sum_split(const SplitPixels& a, const SplitWeights& w, float* sum, int64_t sum_row, bool add) {
  const amx::Tiles tiles;
  for (int64_t first = 0; first < w.columns; first += kPanel)
    sum_panel_split(a, 0, a.count, w.panel(first), sum + first, sum_row, add);
}

// out + place[m] + (c / 16) group <- bias + a * w in vectors of 16 columns c; rows in multiples of 16 that lie side by side
inline void matmul_place_split(const SplitPixels& a, const SplitWeights& w, const float* bias, const int64_t* place,
                               int64_t group, float* out) {
  const amx::Tiles tiles;
  for (int64_t first = 0; first < w.columns; first += kPanel) {
    const BFloat16* panel = w.panel(first);
    float* groups = out + first / amx::kColumns * group;
    const float *low = bias + first, *high = low + amx::kColumns;
    for (int64_t k = 0; k < a.depth; k += kSplitPart) {
      for_blocks(a.count, [&](int64_t m, auto blocks) {
        float *at = groups + place[m], *next = groups + place[m + (blocks - 1) * amx::kRows];
        float* const to[] = {at, at + group, next, next + group};
        multiply_split<blocks>(a, m, panel, k, {low, high, low, high}, 0, to, amx::kColumns);
      });
    }
  }
}

}  // namespace segnext
