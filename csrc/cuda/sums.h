// Sums over a block's pixels and then over the blocks, always in the same order.
#pragma once
#include "cuda/tile.h"

namespace segnext::cuda {

inline constexpr int kSumsTogether = 8;
__host__ __device__ inline int sums_floats(const Tiling& t) { return kSumsTogether * (t.tile_channels * t.per_channel + 1); }

// partial [block's part of the images][channel][N] <- the sums of a channel's threads. `shared`: sums_floats(t), free to use.
template <int N>
__device__ void add_up(const float (&sums)[N], const Tiling& t, const Tile& tile, float* shared, float* partial) {
  const int own = threadIdx.x / t.per_channel, pitch = t.tile_channels * t.per_channel + 1;
  float* to = partial + (static_cast<int64_t>(blockIdx.x / t.groups) * t.channels + tile.channel) * N;
#pragma unroll
  for (int first = 0; first < N; first += kSumsTogether) {
    constexpr int kTogether = kSumsTogether;
    __syncthreads();
    if (own < tile.channels) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (first + i < N) write<1>(shared + i * pitch + threadIdx.x, {sums[first + i < N ? first + i : 0]});
      }
    }
    __syncthreads();
    for (int job = threadIdx.x; job < tile.channels * kTogether; job += blockDim.x) {
      const int channel = job / kTogether, i = job % kTogether;
      if (first + i >= N) continue;
      float sum = 0;
      for (int k = 0; k < t.per_channel; ++k) sum += read<1>(shared + i * pitch + channel * t.per_channel + k)[0];
      write<1>(to + channel * N + first + i, {sum});
    }
  }
}

// One sum over the parts of all images; `from` is the first part's, the next lies `step` further.
__device__ inline float sum_parts(const float* from, int64_t step, int64_t parts) {
  float sum = 0;
  for (int64_t i = 0; i < parts; ++i) sum += read<1>(from + i * step)[0];
  return sum;
}

inline int64_t parts_of(const Tiling& t) { return t.groups == 0 ? 0 : t.blocks / t.groups; }

}  // namespace segnext::cuda
