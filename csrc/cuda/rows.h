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
    return (kLast ? columns : round_up(columns + kUnit, kUnit)) * kRows * t.tile_channels * static_cast<int>(sizeof(T));
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
  __device__ uint64_t offset(int channel, int row, int col) const {
    const auto pixel = static_cast<unsigned>(row * t_.width + col);
    if constexpr (kLast) return static_cast<uint64_t>(pixel) * static_cast<unsigned>(t_.channels) + channel;
    return static_cast<uint64_t>(static_cast<unsigned>(channel)) * static_cast<unsigned>(t_.height * t_.width) + pixel;
  }

  const Tiling& t_;
  const Tile& tile_;
  int first_, line_;  // the first column; units in a line: of a channel's row, in channels_last of a row
  T* staging_;
  Walk start_, step_;
};

// How rows leave the registers of the threads that have computed them, each R rows of C columns, for contiguous tensors.
// Threads side by side exchange theirs through shared memory of their warp, so that each stores 16 bytes at a time: kTogether
// of them have as many columns as that, and each takes kTake of the rows.
template <class T, int R, int C>
struct Patch {
  static constexpr int kUnit = 16 / sizeof(T);
  static constexpr int kTogether = most(kUnit / C, 1), kTake = R / kTogether;
  // The eight lanes that read 16 bytes each in a cycle read all banks.
  static constexpr int kPitch = 32 * C + 128 / static_cast<int>(sizeof(T)) / (kTogether * kTake);
  static constexpr int kElements = R * kPitch;  // of a warp
  static_assert(R % kTogether == 0 && C <= kUnit);

  __host__ __device__ static int floats(const Tiling& t) {
    if (kTogether == 1 && t.vectors) return 0;
    return ceil_div(t.tile_channels * t.per_channel, 32) * kElements * static_cast<int>(sizeof(T)) / 4;
  }
};

// What threads hold that exchange values without having computed any; with nothing to exchange they are not looked at.
template <class T, int R, int C>
__device__ __forceinline__ void clear(float (&values)[R][C]) {
  if constexpr (Patch<T, R, C>::kTogether > 1) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int c = 0; c < C; ++c) values[r][c] = 0;
    }
  }
}

// Stores R rows from `row` on, as far as they are the tile's, to a channel of the tile. All threads of a warp come here, and
// store if they are `active`, for which their first column must be the image's; a barrier lies between this and the next time.
template <class T, int R, int C, int N>
__device__ __forceinline__ void store_rows(void* image, const Tiling& t, const Tile& tile, int channel, int row, int col,
                                           bool active, const float (&values)[N][C], float* shared) {
  using P = Patch<T, R, C>;
  const int lane = threadIdx.x % 32, place = lane % P::kTogether;
  T* patch = reinterpret_cast<T*>(shared) + threadIdx.x / 32 * P::kElements;
  T* plane = static_cast<T*>(image) + (plane_of(t, tile) + channel) * (t.height * t.width);
  const auto owned = [&](int r) { return row + r >= tile.row && row + r < tile.end_row; };
  const auto rounded = [&](int r) {
    Vec<T, C> part;
#pragma unroll
    for (int c = 0; c < C; ++c) round_to(values[r][c], part[c]);
    return part;
  };
  if constexpr (P::kTogether == 1) {
    if (!active) return;
    if (t.vectors) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (owned(r)) write<C>(plane + (row + r) * t.width + col, rounded(r));
      }
      return;
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) write<C>(patch + r * P::kPitch + lane * C, rounded(r));  // a branch would cost registers
  if (t.vectors) {
    __syncwarp();
    const int first = col - place * C;
    if (!active) return;
#pragma unroll
    for (int i = 0; i < P::kTake; ++i) {
      const int r = place * P::kTake + i;
      if (!owned(r)) continue;
      copy_unit(plane + (row + r) * t.width + first, patch + r * P::kPitch + (lane - place) * C);
    }
  } else if (active) {
#pragma unroll 1
    for (int i = 0; i < R * C; ++i) {
      const int r = i / C, c = i % C;
      if (!owned(r) || col + c >= t.width) continue;
      write<1>(plane + (row + r) * t.width + col + c, read<1>(patch + r * P::kPitch + lane * C + c));
    }
  }
}

}  // namespace segnext::cuda
