// Products of bfloat16 pixels with packed weights on the processor's matrix tiles, 32 pixels by a panel at a time. Part of
// matmul.h.
//
// A pixel's sums are made in one way wherever it lies: the last few pixels, too few for a tile, are multiplied in a copy filled
// up with zeros.
#pragma once
#include "cpu/amx.h"

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

// As for_product_tiles.
template <class F>
SEGNEXT_INLINE void for_product_blocks(const Pixels<BFloat16>& a, const Packed<BFloat16>& w, const F& f) {
  const Operands<BFloat16> operands(a, w);
  const LastRows last(operands, a.count);
  const amx::Tiles tiles;
  alignas(64) float sums[2 * amx::kRows * kPanel];
  for (int64_t first = 0; first < w.columns; first += kPanel) {
    const BFloat16* panel = operands.panel(first / kPanel);
    auto multiply = [&](int64_t begin, int64_t rows, auto blocks, const BFloat16* left, int64_t left_row) {
      float* const out[] = {sums, sums + amx::kColumns, sums + amx::kRows * kPanel, sums + amx::kRows * kPanel + amx::kColumns};
      amx::multiply<blocks>(left, left_row, panel, operands.depth(), {}, 0, out, kPanel);
      for_row_tiles(rows, [&](int64_t m, auto tile) {
        constexpr int count = tile;
        Vector<float> acc[kTileVectors][count];
        SEGNEXT_UNROLL
        for (int i = 0; i < count; ++i) {
          SEGNEXT_UNROLL
          for (int v = 0; v < kTileVectors; ++v) acc[v][i] = load<float>(sums + (m + i) * kPanel + v * kLanes<float>);
        }
        f(begin + m, tile, first, acc);
      });
    };
    for_blocks(a.count, [&](int64_t m, auto blocks) {
      multiply(m, blocks * amx::kRows, blocks, operands.left() + m * operands.row(), operands.row());
    });
    if (last.rows > 0) multiply(last.first, last.rows, std::integral_constant<int, 1>{}, last.data(), operands.depth());
  }
}

// sum [rows][columns rounded up to panels] (+)= a * w
inline void matmul_sum_blocks(const Pixels<BFloat16>& a, const Packed<BFloat16>& w, float* sum, int64_t sum_row, bool add) {
  const Operands<BFloat16> operands(a, w);
  const LastRows last(operands, a.count);
  const amx::Tiles tiles;
  alignas(64) float sums[amx::kRows * kPanel] = {};
  for (int64_t first = 0; first < w.columns; first += kPanel) {
    const BFloat16* panel = operands.panel(first / kPanel);
    auto multiply = [&](auto blocks, const BFloat16* left, int64_t left_row, float* to, int64_t row) {
      float* const out[] = {to, to + amx::kColumns, to + amx::kRows * row, to + amx::kRows * row + amx::kColumns};
      const float* const start[] = {add ? out[0] : nullptr, out[1], out[2], out[3]};
      amx::multiply<blocks>(left, left_row, panel, operands.depth(), start, row, out, row);
    };
    for_blocks(a.count, [&](int64_t m, auto blocks) {
      multiply(blocks, operands.left() + m * operands.row(), operands.row(), sum + m * sum_row + first, sum_row);
    });
    if (last.rows == 0) continue;
    float* to = sum + last.first * sum_row + first;
    if (add) {
      for (int64_t m = 0; m < last.rows; ++m) std::memcpy(sums + m * kPanel, to + m * sum_row, sizeof(float) * kPanel);
    }
    multiply(std::integral_constant<int, 1>{}, last.data(), operands.depth(), sums, kPanel);
    for (int64_t m = 0; m < last.rows; ++m) std::memcpy(to + m * sum_row, sums + m * kPanel, sizeof(float) * kPanel);
  }
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
