// Small matrix products whose right side and result are rows of vectors, as the factors of the NMF are.
#pragma once
#include <algorithm>

#include "cpu/image.h"

namespace segnext {

// The left side of a product. Element (m, k) lies at data[m * row + k * column]; one of the two is 1.
template <class A>
struct Strided {
  const A* data;
  int64_t row, column;
};

enum class Along { kRows, kDepth };  // what lies side by side in the left side's memory

// Keeps the compiler from computing addresses beforehand, in more registers than there are.
template <class A>
SEGNEXT_INLINE void step_by(const A*& place, int64_t elements) {
  place += elements;
  __asm__("" : "+r"(place));
}

// out [M][NV vectors] (+)= left [M][depth] * right [depth][NV vectors], summed over the depth in order. `stride` is what lies
// between the left side's rows, or between their elements where the rows lie side by side.
template <Along kAlong, class A, int M, int NV>
SEGNEXT_INLINE void gemm_tile(const A* left, int64_t stride, int64_t depth, const A* right, int64_t right_row, A* out,
                              int64_t out_row, bool add) {
  constexpr int L = kLanes<A>;
  constexpr bool kFetch = NV == 1 && M * sizeof(A) >= 64;  // where every multiply-add reads another element of the left side
  constexpr int kTogether = kAlong == Along::kRows ? 1 : std::max(1, (kRegisters == 32 ? 4 : 2) / NV);  // elements of a row
  Vector<A> acc[M][NV];
  SEGNEXT_UNROLL
  for (int m = 0; m < M; ++m) {
    SEGNEXT_UNROLL
    for (int v = 0; v < NV; ++v) acc[m][v] = add ? load<A>(out + m * out_row + v * L) : Vector<A>{};
  }
  const A* after = left + M * stride;  // the next rows, as many elements of them at a time as are read of these
  auto next = [&](auto elements) {
    constexpr int count = elements;
    Vector<A> r[count][NV];
    SEGNEXT_UNROLL
    for (int i = 0; i < count; ++i) {
      SEGNEXT_UNROLL
      for (int v = 0; v < NV; ++v) r[i][v] = load<A>(right + i * right_row + v * L);
    }
    const A* l = left;
    if constexpr (kAlong == Along::kRows && kFetch) __builtin_prefetch(left + 8 * stride);
    if constexpr (kAlong == Along::kDepth && kFetch) {
      SEGNEXT_UNROLL
      for (int i = 0; i < M * count; i += L) __builtin_prefetch(after + i);
      after += M * count;
    }
    SEGNEXT_UNROLL
    for (int m = 0; m < M; ++m) {
      SEGNEXT_UNROLL
      for (int i = 0; i < count; ++i) {
        const A value = l[kAlong == Along::kRows ? m : i];
        SEGNEXT_UNROLL
        for (int v = 0; v < NV; ++v) acc[m][v] += value * r[i][v];
      }
      if constexpr (kAlong == Along::kDepth) step_by(l, stride);
    }
    left += kAlong == Along::kRows ? stride : count;
    right += count * right_row;
  };
  int64_t k = 0;
  for (; k + kTogether <= depth; k += kTogether) next(std::integral_constant<int, kTogether>{});
  if constexpr (kTogether > 1) {
    for (; k < depth; ++k) next(std::integral_constant<int, 1>{});
  }
  SEGNEXT_UNROLL
  for (int m = 0; m < M; ++m) {
    SEGNEXT_UNROLL
    for (int v = 0; v < NV; ++v) store<A>(out + m * out_row + v * L, acc[m][v]);
  }
}

// Rows whose sums, of so many vectors each, the registers hold beside the operands, but no more than divides the usual sizes
// where that is no slower.
constexpr int rows_together(int64_t vectors) {
  return static_cast<int>(kRegisters == 16 ? 12 / vectors : vectors == 1 ? 16 : 24 / vectors);
}

template <Along kAlong, class A, int NV>
void gemm_columns(const A* left, int64_t stride, int64_t rows, int64_t depth, const A* right, int64_t right_row, A* out,
                  int64_t out_row, bool add) {
  constexpr int kFull = rows_together(NV);
  auto next = [&](auto size) {
    constexpr int count = size;
    gemm_tile<kAlong, A, count, NV>(left, stride, depth, right, right_row, out, out_row, add);
    left += count * (kAlong == Along::kRows ? 1 : stride);
    out += count * out_row;
    rows -= count;
  };
  while (rows >= kFull) next(std::integral_constant<int, kFull>{});
  if constexpr (kFull > 4) {
    while (rows >= 4) next(std::integral_constant<int, 4>{});
  }
  while (rows > 0) next(std::integral_constant<int, 1>{});
}

// out [rows][vectors] (+)= left [rows][depth] * right [depth][vectors]; the row strides count elements.
template <class A>
void gemm(Strided<A> left, int64_t rows, int64_t depth, const A* right, int64_t right_row, int64_t vectors, A* out,
          int64_t out_row, bool add) {
  auto next = [&](auto size) {
    constexpr int count = size;
    if (left.column == 1) {
      gemm_columns<Along::kDepth, A, count>(left.data, left.row, rows, depth, right, right_row, out, out_row, add);
    } else {
      gemm_columns<Along::kRows, A, count>(left.data, left.column, rows, depth, right, right_row, out, out_row, add);
    }
    right += count * kLanes<A>;
    out += count * kLanes<A>;
    vectors -= count;
  };
  while (vectors >= 4) next(std::integral_constant<int, 4>{});
  while (vectors >= 2) next(std::integral_constant<int, 2>{});
  while (vectors >= 1) next(std::integral_constant<int, 1>{});
}

// out [columns][rows rounded up to vectors] <- in [rows][columns rounded up to vectors]; rows past the last become zero.
template <class A>
void transpose_rows(const A* in, int64_t in_row, int64_t rows, int64_t columns, A* out, int64_t out_row) {
  constexpr int L = kLanes<A>;
  for (int64_t r = 0; r < rows; r += L) {
    for (int64_t c = 0; c < columns; c += L) {
      Vector<A> block[L];
      for (int i = 0; i < L; ++i) block[i] = r + i < rows ? load<A>(in + (r + i) * in_row + c) : Vector<A>{};
      transpose<A>(block);
      for (int i = 0; i < L && c + i < columns; ++i) store<A>(out + (c + i) * out_row + r, block[i]);
    }
  }
}

}  // namespace segnext
