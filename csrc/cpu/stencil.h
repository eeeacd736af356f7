// The K x K depthwise stencil on staged rows [width][kLanes], forward and the gradient of its taps. Rows are padded by K / 2
// zero pixels on both sides.
#pragma once
#include "cpu/image.h"

namespace segnext {

// Runs body(w, tile) over [0, width): tiles of the integral constant `Tile` pixels, the last one moved back to end at the
// edge; images narrower than a tile go pixel by pixel. The body may therefore see a pixel twice.
template <int Tile, class F>
SEGNEXT_INLINE void for_tiles(int64_t width, const F& body) {
  if (width < Tile) {
    for (int64_t w = 0; w < width; ++w) body(w, std::integral_constant<int, 1>{});
    return;
  }
  for (int64_t w = 0; w < width; w += Tile) body(w + Tile <= width ? w : width - Tile, std::integral_constant<int, Tile>{});
}

inline constexpr int kTile = 8;

// acc[i] = start + sum over s, t of taps[s][t] * rows[s][w + i + t - K / 2]
template <class A, int K, int Tile>
SEGNEXT_INLINE void depthwise_tile(const A* const (&rows)[K], const A* taps, Vector<A> start, int64_t w,
                                   Vector<A> (&acc)[Tile]) {
  constexpr int L = kLanes<A>;
  SEGNEXT_UNROLL
  for (int i = 0; i < Tile; ++i) acc[i] = start;
  for (int s = 0; s < K; ++s) {
    Vector<A> tap[K];
    SEGNEXT_UNROLL
    for (int t = 0; t < K; ++t) tap[t] = load<A>(taps + (s * K + t) * L);
    const A* row = rows[s] + (w - K / 2) * L;
    SEGNEXT_UNROLL
    for (int i = 0; i < Tile + K - 1; ++i) {
      const Vector<A> v = load<A>(row + i * L);
      SEGNEXT_UNROLL
      for (int t = 0; t < K; ++t) {
        if (i - t >= 0 && i - t < Tile) acc[i - t] += tap[t] * v;
      }
    }
  }
}

// out [width] = start + the stencil of rows
template <class A, int K>
void depthwise(const A* const (&rows)[K], const A* taps, Vector<A> start, int64_t width, A* out) {
  for_tiles<kTile>(width, [&](int64_t w, auto size) {
    constexpr int tile = size;
    Vector<A> acc[tile];
    depthwise_tile<A, K, tile>(rows, taps, start, w, acc);
    SEGNEXT_UNROLL
    for (int i = 0; i < tile; ++i) store<A>(out + (w + i) * kLanes<A>, acc[i]);
  });
}

// total[i] += sums[i]
template <class A, int N>
SEGNEXT_INLINE void add_to(A* total, const Vector<A> (&sums)[N]) {
  SEGNEXT_UNROLL
  for (int i = 0; i < N; ++i) store<A>(total + i * kLanes<A>, load<A>(total + i * kLanes<A>) + sums[i]);
}

// grad[s][t] += sum over w of out[w] * rows[s][w + t - K / 2]
template <class A, int K>
SEGNEXT_NOINLINE void depthwise_grad(const A* out, const A* const (&rows)[K], int64_t width, A* grad) {
  constexpr int L = kLanes<A>;
  constexpr int kRows = kRegisters == 32 ? K : 12 / K;  // filter rows whose taps fit in registers together
  auto some_rows = [&](int first, auto size) {
    constexpr int count = size;
    Vector<A> acc[count * K] = {};
    for (int64_t w = 0; w < width; ++w) {
      const Vector<A> g = load<A>(out + w * L);
      SEGNEXT_UNROLL
      for (int s = 0; s < count; ++s) {
        SEGNEXT_UNROLL
        for (int t = 0; t < K; ++t) acc[s * K + t] += g * load<A>(rows[first + s] + (w + t - K / 2) * L);
      }
    }
    add_to<A>(grad + first * K * L, acc);
  };
  for (int s = 0; s + kRows <= K; s += kRows) some_rows(s, std::integral_constant<int, kRows>{});
  if constexpr (K % kRows != 0) some_rows(K - K % kRows, std::integral_constant<int, K % kRows>{});
}

// total += sum over w of row[w]
template <class A>
void add_row_sum(const A* row, int64_t width, A* total) {
  Vector<A> sum = {};
  for (int64_t w = 0; w < width; ++w) sum += load<A>(row + w * kLanes<A>);
  store<A>(total, load<A>(total) + sum);
}

// total [taps][kLanes] = the sum of a group's partial sums [count][groups][taps][kLanes], in order
template <class A>
void sum_partial(const A* partial, int64_t count, int64_t groups, int taps, int64_t group, A* total) {
  const int64_t size = taps * kLanes<A>;
  std::memset(total, 0, sizeof(A) * size);
  for (int64_t part = 0; part < count; ++part) {
    const A* from = partial + (part * groups + group) * size;
    for (int64_t i = 0; i < size; i += kLanes<A>) store<A>(total + i, load<A>(total + i) + load<A>(from + i));
  }
}

// The taps turned by 180 degrees, for the transposed convolution.
template <class A>
void reverse_taps(const A* taps, int count, A* reversed) {
  for (int t = 0; t < count; ++t) store<A>(reversed + (count - 1 - t) * kLanes<A>, load<A>(taps + t * kLanes<A>));
}

}  // namespace segnext
