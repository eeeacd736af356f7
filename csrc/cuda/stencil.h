// A K x K depthwise convolution of planes in shared memory, and its transposition: a thread computes R rows of 4 columns.
#pragma once
#include "cuda/rows.h"

namespace segnext::cuda {

inline constexpr int kRing = 2 * kRows;  // rows of planes that a stencil reads: the next kRows and those before
inline constexpr int kTaskColumns = 4;

// Calls f(j, v) for the K + R - 1 rows that the outputs' windows cover; v[i] is column col - K / 2 + i. Columns are read from
// col - kLead on, which is a multiple of 4 in the planes; row is the ring's.
template <int K, int kLead, int R, class F>
__device__ __forceinline__ void for_window(const Planes& in, int channel, int row, int col, const F& f) {
  constexpr int kVectors = ceil_div(kLead + kTaskColumns + K / 2, 4);
#pragma unroll
  for (int j = 0; j < K + R - 1; ++j) {
    const float* from = in(channel, (row + j) & (kRing - 1), col - kLead);
    float v[4 * kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const auto part = read<4>(from + 4 * i);
#pragma unroll
      for (int k = 0; k < 4; ++k) v[4 * i + k] = part[k];
    }
    f(j, v + kLead - K / 2);
  }
}

// The first N floats from `from` on, 16 bytes at a time.
template <int N>
__device__ __forceinline__ void read_floats(const float* from, float (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const auto part = read<4>(from + i);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (i + k < N) to[i + k] = part[k];
    }
  }
}

// out[o][c] = the last of `taps` + sum over i, t of taps[i][t] * in[row + o + i][col - K / 2 + c + t]
template <int K, int kLead, int R>
__device__ __forceinline__ void convolve(const Planes& in, const float* taps, int channel, int row, int col,
                                         float (&out)[R][kTaskColumns]) {
  float w[K * K + 1];
  read_floats(taps, w);
#pragma unroll
  for (int o = 0; o < R; ++o) {
#pragma unroll
    for (int c = 0; c < kTaskColumns; ++c) out[o][c] = w[K * K];
  }
  for_window<K, kLead, R>(in, channel, row, col, [&](int j, const float* v) {
#pragma unroll
    for (int o = 0; o < R; ++o) {
      const int i = j - o;
      if (i < 0 || i >= K) continue;
#pragma unroll
      for (int t = 0; t < K; ++t) {
#pragma unroll
        for (int c = 0; c < kTaskColumns; ++c) out[o][c] += w[i * K + t] * v[c + t];
      }
    }
  });
}

// The transposition: out[o][c] = sum over i, t of taps[K-1-i][K-1-t] * dz[row + o + i][col - K / 2 + c + t], and
// sums[K-1-i][K-1-t] += x[o][c] * dz[...], the gradient of the taps. x is the first row's, the next `pitch` further.
template <int K, int kLead, int R>
__device__ __forceinline__ void convolve_back(const Planes& dz, const float* taps, int channel, int row, int col,
                                              const float* x, int pitch, float (&out)[R][kTaskColumns],
                                              float (&sums)[K * K + 1]) {
  float w[K * K + 1];
  read_floats(taps, w);
#pragma unroll
  for (int o = 0; o < R; ++o) {
#pragma unroll
    for (int c = 0; c < kTaskColumns; ++c) out[o][c] = 0;
  }
  for_window<K, kLead, R>(dz, channel, row, col, [&](int j, const float* v) {
#pragma unroll
    for (int o = 0; o < R; ++o) {
      const int i = j - o;
      if (i < 0 || i >= K) continue;
      const auto own = read<4>(x + o * pitch);  // again for every row of the window: registers are scarce
#pragma unroll
      for (int t = 0; t < K; ++t) {
        const int tap = (K - 1 - i) * K + K - 1 - t;
#pragma unroll
        for (int c = 0; c < kTaskColumns; ++c) {
          out[o][c] += w[tap] * v[c + t];
          sums[tap] += own[c] * v[c + t];
        }
      }
      if (i != K / 2) continue;
#pragma unroll
      for (int c = 0; c < kTaskColumns; ++c) sums[K * K] += v[c + K / 2];
    }
  });
}

}  // namespace segnext::cuda
