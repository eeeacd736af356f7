// Small matrix products whose right side and result are rows of vectors, as the factors of the NMF are.
#pragma once
#include "cpu/image.h"

namespace segnext {

// Element (m, k) lies at data[m * row + k * column].
template <class A>
struct Strided {
  const A* data;
  int64_t row, column;
};

// out [M][NV vectors] (+)= left [M][K] * right [K][NV vectors], summed over k in order.
template <class A, int M, int NV>
SEGNEXT_INLINE void gemm_tile(Strided<A> left, int64_t depth, const A* right, int64_t right_row, A* out, int64_t out_row,
                              bool add) {
  constexpr int L = kLanes<A>;
  Vector<A> acc[M][NV];
  SEGNEXT_UNROLL
  for (int m = 0; m < M; ++m) {
    SEGNEXT_UNROLL
    for (int v = 0; v < NV; ++v) acc[m][v] = add ? load<A>(out + m * out_row + v * L) : Vector<A>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector<A> r[NV];
    SEGNEXT_UNROLL
    for (int v = 0; v < NV; ++v) r[v] = load<A>(right + k * right_row + v * L);
    const A* l = left.data + k * left.column;
    SEGNEXT_UNROLL
    for (int m = 0; m < M; ++m) {
      const A value = l[m * left.row];
      SEGNEXT_UNROLL
      for (int v = 0; v < NV; ++v) acc[m][v] += value * r[v];
    }
  }
  SEGNEXT_UNROLL
  for (int m = 0; m < M; ++m) {
    SEGNEXT_UNROLL
    for (int v = 0; v < NV; ++v) store<A>(out + m * out_row + v * L, acc[m][v]);
  }
}

template <class A, int NV>
void gemm_columns(Strided<A> left, int64_t rows, int64_t depth, const A* right, int64_t right_row, A* out, int64_t out_row,
                  bool add) {
  constexpr int kFull = (kRegisters == 32 ? 24 : 12) / NV;  // what the registers hold beside the operands
  auto next = [&](auto size) {
    constexpr int count = size;
    gemm_tile<A, count, NV>(left, depth, right, right_row, out, out_row, add);
    left.data += count * left.row;
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
    gemm_columns<A, count>(left, rows, depth, right, right_row, out, out_row, add);
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
