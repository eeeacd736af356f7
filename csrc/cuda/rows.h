// How rows of a block's tile move between memory and shared memory, where every channel is a plane of floats, whatever the
// image's layout and dtype are: what the layouts differ in ends here.
#pragma once
#include "cuda/tile.h"

namespace segnext::cuda {

// From channel to channel in planes that are moved: an odd multiple of 4, so that four channels' columns lie in other banks
// than the next four's. In planes of which each thread reads two columns: half of the banks further.
__host__ __device__ constexpr int plane_stride(int rows, int pitch) { return round_up(rows * pitch - 4, 8) + 4; }
__host__ __device__ constexpr int own_stride(int rows, int pitch) { return round_up(rows * pitch - 16, 32) + 16; }

// Channels of some rows in shared memory.
struct Planes {
  float* data;
  int pitch, stride, column;  // from row to row, from channel to channel; the image's column at index 0
  __device__ float* operator()(int channel, int row, int col) const {
    return data + channel * stride + row * pitch + col - column;
  }
  __device__ Planes from_row(int row) const { return {data + row * pitch, pitch, stride, column}; }
};

__device__ inline void clear(const Planes& planes, int channels) {
  for (int i = threadIdx.x; i < channels * planes.stride; i += blockDim.x) planes.data[i] = 0;
}

// kRows rows of a tile, columns [first, last) as far as they lie in the image, on their way between memory and planes. Each
// thread moves units of 16 bytes, or of one element where memory is not aligned.
template <class T, bool kLast>
class RowMover {
 public:
  static constexpr int kUnit = 16 / sizeof(T);

  // staging: 16-byte aligned, staging_bytes() of it.
  __device__ RowMover(const Tiling& tiling, const Tile& tile, int first, int last, void* staging)
      : t_(tiling),
        tile_(tile),
        first_(kLast ? max(first, 0) : max(first, 0) / unit() * unit()),
        line_(kLast ? (min(last, t_.width) - first_) * (t_.tile_channels / unit())
                    : ceil_div(min(last, t_.width) - first_, unit())),
        staging_(static_cast<T*>(staging)),
        start_(threadIdx.x, line_),
        step_(blockDim.x, line_) {}

  __host__ __device__ static int staging_bytes(const Tiling& t, int columns) {
    return round_up(columns + kUnit, kUnit) * kRows * t.tile_channels * static_cast<int>(sizeof(T));
  }

  // Starts to copy the image's rows from `row` on.
  __device__ void fetch(const void* image, int row) const {
    if (!t_.vectors) return;
    const T* base = this->base(image);
    for_units([&](int channel, int r, int col, int number) {
      if (inside(row + r) && channel < tile_.channels) {
        copy_async(staging_ + number * kUnit, base + offset(channel, row + r, col));
      }
    });
  }

  // Writes the rows from `row` on, fetched before, to the first kRows rows of `planes`; zeros where there is no such row.
  // kAlign floats of a plane are written at once.
  template <int kAlign>
  __device__ void put(const void* image, int row, const Planes& planes) const {
    if (!t_.vectors) {
      const T* base = this->base(image);
      for_units([&](int channel, int r, int col, int) {
        if (channel >= tile_.channels) return;
        const float value = inside(row + r) ? to_float(read<1>(base + offset(channel, row + r, col))[0]) : 0.0f;
        write<1>(planes(channel, r, col), {value});
      });
      return;
    }
    wait_async();
    for_units([&](int channel, int r, int col, int number) {
      if (channel >= tile_.channels) return;
      Vec<T, kUnit> values = {};
      if (inside(row + r)) values = read<kUnit>(staging_ + number * kUnit);
      if constexpr (kLast) {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) write<1>(planes(channel + i, r, col), {to_float(values[i])});
      } else {
#pragma unroll
        for (int i = 0; i < kUnit; i += kAlign) {
          const int at = col + i - planes.column;
          if (at < 0 || at + kAlign > planes.pitch) continue;
          Vec<float, kAlign> part;
#pragma unroll
          for (int j = 0; j < kAlign; ++j) part[j] = to_float(values[i + j]);
          write<kAlign>(planes(channel, r, col + i), part);
        }
      }
    });
  }

  // Stores the first kRows rows of `planes` to the image's rows from `row` on, as far as rows and columns are the tile's. For
  // channels_last; otherwise threads store what they have computed.
  __device__ void store(void* image, int row, const Planes& planes) const {
    static_assert(kLast);
    if (!t_.vectors) return store_units<1>(base(image), row, planes);
    store_units<kUnit>(base(image), row, planes);
  }

 private:
  template <class F>
  __device__ void for_units(const F& f) const {
    int number = threadIdx.x;
    for (Walk walk = start_; walk.line() < (kLast ? kRows : kRows * tile_.channels);
         walk.advance(step_, line_), number += blockDim.x) {
      if constexpr (kLast) {
        const int element = walk.at() * unit();
        f(element & (t_.tile_channels - 1), walk.line(), first_ + (element >> t_.log_channels), number);
      } else {
        f(walk.line() / kRows, walk.line() % kRows, first_ + walk.at() * unit(), number);
      }
    }
  }

  template <int V>
  __device__ void store_units(T* base, int row, const Planes& planes) const {
    for_units([&](int channel, int r, int col, int) {
      if (channel >= tile_.channels || row + r < tile_.row || row + r >= tile_.end_row) return;
      if (col < tile_.column || col >= tile_.column + t_.tile_columns) return;
      Vec<T, V> values;
#pragma unroll
      for (int i = 0; i < V; ++i) round_to(read<1>(planes(channel + i, r, col))[0], values[i]);
      write<V>(base + offset(channel, row + r, col), values);
    });
  }

  __device__ int unit() const { return t_.vectors ? kUnit : 1; }
  __device__ bool inside(int row) const { return row >= 0 && row < t_.height; }
  // Where the tile's first channel lies in an image tensor, and, from there, an element of the tile.
  __device__ T* base(const void* image) const {
    const int64_t plane = static_cast<int64_t>(t_.height) * t_.width;
    return static_cast<T*>(const_cast<void*>(image)) +
           (kLast ? tile_.image * plane * t_.channels + tile_.channel : plane_of(t_, tile_) * plane);
  }
  __device__ int64_t offset(int channel, int row, int col) const {
    if constexpr (kLast) return (static_cast<int64_t>(row) * t_.width + col) * t_.channels + channel;
    return (static_cast<int64_t>(channel) * t_.height + row) * t_.width + col;
  }

  const Tiling& t_;
  const Tile& tile_;
  int first_, line_;  // the first column; units in a line: of a channel's row, in channels_last of a row
  T* staging_;
  Walk start_, step_;
};

// Stores neighbouring columns of one row from registers: N at once where rows are aligned, else those that lie in the image.
template <int N, class T>
__device__ void store_columns(T* row, int col, int width, bool vectors, const float (&values)[N]) {
  Vec<T, N> rounded;
#pragma unroll
  for (int i = 0; i < N; ++i) round_to(values[i], rounded[i]);
  if (vectors && col + N <= width) return write<N>(row + col, rounded);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (col + i < width) write<1>(row + col + i, {rounded[i]});
  }
}

}  // namespace segnext::cuda
