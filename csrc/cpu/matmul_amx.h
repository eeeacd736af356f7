// Products of bfloat16 pixels with packed weights on the processor's matrix tiles, 32 pixels by a panel at a time. Part of
// matmul.h.
//
// A pixel's sums are made in one way wherever it lies: the last few pixels, too few for a tile, are multiplied in a copy filled
// up with zeros.
#pragma once
#include <algorithm>

#include "cpu/amx.h"
#include "cpu/matmul_tiles.h"

namespace segnext {

// Calls f(first row, blocks of 16 rows as an integral constant) for rows [0, count), without those past the last full block.
template <class F>
SEGNEXT_INLINE void for_blocks(int64_t count, const F& f) {
  int64_t m = 0;
  for (; m + 2 * amx::kRows <= count; m += 2 * amx::kRows) f(m, std::integral_constant<int, 2>{});
  if (m + amx::kRows <= count) f(m, std::integral_constant<int, 1>{});
}

// The rows past the last full block, filled up with zeros to a block.
class LastRows {
 public:
  LastRows(const Operands<BFloat16>& operands, int64_t count)
      : first(count / amx::kRows * amx::kRows), rows(count - first), data_(rows > 0 ? amx::kRows * operands.depth() : 0) {
    if (rows == 0) return;
    std::memset(data_, 0, sizeof(BFloat16) * amx::kRows * operands.depth());
    for (int64_t m = 0; m < rows; ++m) {
      std::memcpy(data_ + m * operands.depth(), operands.left() + (first + m) * operands.row(),
                  sizeof(BFloat16) * operands.depth());
    }
  }
  const int64_t first, rows;
  const BFloat16* data() const { return data_; }

 private:
  Buffer<BFloat16> data_;
};

inline constexpr int64_t kPart = 256;  // of a product's depth

// sum [count][32] (+)= rows [begin, begin + count) of the left side * a panel, `begin` a multiple of 16. Deep products are made
// in parts whose share of the panel stays in the first cache.
inline void multiply_panel(const Operands<BFloat16>& operands, const LastRows& last, int64_t begin, int64_t count,
                           const BFloat16* panel, float* sum, int64_t sum_row, bool add) {
  const bool rest = begin + count > last.first;
  float* last_sum = sum + (last.first - begin) * sum_row;
  alignas(64) float filled_up[amx::kRows * kPanel];
  for (int64_t m = 0; rest && add && m < last.rows; ++m)
    std::memcpy(filled_up + m * kPanel, last_sum + m * sum_row, sizeof(float) * kPanel);
  for (int64_t k = 0; k < operands.depth(); k += kPart) {
    auto multiply = [&](auto blocks, const BFloat16* left, int64_t left_row, float* to, int64_t row) {
      float* const out[] = {to, to + amx::kColumns, to + amx::kRows * row, to + amx::kRows * row + amx::kColumns};
      const float* const start[] = {add || k > 0 ? out[0] : nullptr, out[1], out[2], out[3]};
      const int64_t depth = std::min(kPart, operands.depth() - k);
      amx::multiply<blocks>(left + k, left_row, panel + k * kPanel, depth, start, row, out, row);
    };
    for_blocks(count, [&](int64_t m, auto blocks) {
      multiply(blocks, operands.left() + (begin + m) * operands.row(), operands.row(), sum + m * sum_row, sum_row);
    });
    if (rest) multiply(std::integral_constant<int, 1>{}, last.data(), operands.depth(), filled_up, kPanel);
  }
  for (int64_t m = 0; rest && m < last.rows; ++m)
    std::memcpy(last_sum + m * sum_row, filled_up + m * kPanel, sizeof(float) * kPanel);
}

// Calls f(first row, number of rows as an integral constant, sums [kTileVectors][rows]) for tiles of sums [rows][32].
template <class F>
SEGNEXT_INLINE void for_sum_tiles(const float* sums, int64_t rows, const F& f) {
  for_row_tiles(rows, [&](int64_t m, auto tile) {
    constexpr int count = tile;
    Vector<float> acc[kTileVectors][count];
    SEGNEXT_UNROLL
    for (int i = 0; i < count; ++i) {
      SEGNEXT_UNROLL
      for (int v = 0; v < kTileVectors; ++v) acc[v][i] = load<float>(sums + (m + i) * kPanel + v * kLanes<float>);
    }
    f(m, tile, acc);
  });
}

// As for_product_tiles.
template <class F>
SEGNEXT_INLINE void for_product_blocks(const Pixels<BFloat16>& a, const Packed<BFloat16>& w, const F& f) {
  constexpr int64_t kMost = 128;  // rows whose sums stay in the first cache
  const Operands<BFloat16> operands(a, w);
  const int64_t group = operands.depth() > kPart ? kMost : 2 * amx::kRows;
  const LastRows last(operands, a.count);
  const amx::Tiles tiles;
  alignas(64) float sums[kMost * kPanel];
  for (int64_t begin = 0; begin < a.count; begin += group) {
    const int64_t rows = std::min(group, a.count - begin);
    for (int64_t first = 0; first < w.columns; first += kPanel) {
      multiply_panel(operands, last, begin, rows, operands.panel(first / kPanel), sums, kPanel, false);
      for_sum_tiles(sums, rows, [&](int64_t m, auto tile, auto& acc) { f(begin + m, tile, first, acc); });
    }
  }
}

// sum [rows][columns rounded up to panels] (+)= a * w
inline void matmul_sum_blocks(const Pixels<BFloat16>& a, const Packed<BFloat16>& w, float* sum, int64_t sum_row, bool add) {
  const Operands<BFloat16> operands(a, w);
  const LastRows last(operands, a.count);
  const amx::Tiles tiles;
  for (int64_t first = 0; first < w.columns; first += kPanel)
    multiply_panel(operands, last, 0, a.count, operands.panel(first / kPanel), sum + first, sum_row, add);
}

// out + place[m] + (c / 16) group <- bias + a * w in vectors of 16 columns c; rows in multiples of 16 that lie side by side
inline void matmul_place_blocks(const Pixels<BFloat16>& a, const Packed<BFloat16>& w, const float* bias, const int64_t* place,
                                int64_t group, float* out) {
  const Operands<BFloat16> operands(a, w);
  const amx::Tiles tiles;
  for (int64_t first = 0; first < w.columns; first += kPanel) {
    const BFloat16* panel = operands.panel(first / kPanel);
    float* groups = out + first / amx::kColumns * group;
    const float *low = bias + first, *high = low + amx::kColumns;
    for_blocks(a.count, [&](int64_t m, auto blocks) {
      const float* const start[] = {low, high, low, high};
      float *at = groups + place[m], *next = groups + place[m + (blocks - 1) * amx::kRows];
      float* const to[] = {at, at + group, next, next + group};
      amx::multiply<blocks>(operands.left() + m * operands.row(), operands.row(), panel, operands.depth(), start, 0, to,
                            amx::kColumns);
    });
  }
}

}  // namespace segnext
