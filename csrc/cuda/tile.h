// How an image is cut into blocks, and how rows of a block's tile move between memory and shared memory.
//
// A block owns some channels, some columns and some rows of one image and marches down the rows, kRows at a time. In shared
// memory every channel is a plane of floats, whatever the image's layout and dtype are: what the layouts differ in ends here.
#pragma once
#include <algorithm>
#include <stdexcept>

#include "arguments.h"
#include "cuda/memory.h"

namespace segnext::cuda {

inline constexpr int kRows = 4;
inline constexpr int kOwn = 2;  // neighbouring columns of one channel that a thread owns
// Work is cut for 128 multiprocessors with 12 warps each, whatever the device at hand has.
inline constexpr int kMultiprocessors = 128, kWarps = 12 * kMultiprocessors;

struct Tiling {
  int images, channels, height, width;
  int tile_channels, tile_columns, part_rows;  // of a block; tile_channels = 1 << log_channels
  int log_channels, groups, column_tiles, row_parts;
  int block_images;                  // that a block does one after another
  int border, per_channel, threads;  // columns of neighbouring tiles that threads own too; threads for a channel
  bool channels_last, vectors;       // vectors: rows (or pixels, in channels_last) begin at multiples of 16 bytes
  unsigned blocks;
};

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }
__host__ __device__ constexpr int most(int a, int b) { return a > b ? a : b; }

inline int element_size(const Image& x) { return x.dtype == Dtype::kFloat32 ? 4 : 2; }

inline bool aligned(const Image& x) {
  const int64_t run = x.channels_last ? x.channels : x.width;
  return run * element_size(x) % 16 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// Cuts x for a kernel that reads `reach` pixels around its outputs and where a thread owns kOwn columns of a channel, of those
// `border` columns of the neighbouring tiles too. bytes(tiling) of shared memory may be at most `limit`. A block moves
// `moved` elements for each pixel and `extra` for each channel: where planes are so small that these weigh, it does several
// images.
template <class F>
Tiling cut(const Image& x, int reach, int border, int moved, int extra, double most_read, int most_threads, int limit,
           const F& bytes) {
  Tiling t = {};
  if (std::max({x.images, x.height, x.width}) > 1 << 30 || x.channels > 1 << 24) {
    throw std::runtime_error("segnext_kernels: the CUDA kernels take images of up to 2^30 by 2^30 and 2^24 channels");
  }
  t.images = static_cast<int>(x.images);
  t.channels = static_cast<int>(x.channels);
  t.height = static_cast<int>(x.height);
  t.width = static_cast<int>(x.width);
  t.channels_last = x.channels_last;
  if (x.images * x.channels * x.height * x.width == 0) return t;  // no blocks
  const auto shape = [&](int most_columns, int least_channels) {
    t.column_tiles = ceil_div(t.width, most_columns);
    t.tile_columns = t.column_tiles == 1 ? round_up(t.width, 4) : round_up(ceil_div(t.width, t.column_tiles), 8);
    t.column_tiles = ceil_div(t.width, t.tile_columns);
    t.border = t.column_tiles == 1 ? 0 : border;
    t.per_channel = (t.tile_columns + 2 * t.border) / kOwn;
    t.tile_channels = least_channels;
    while (2 * t.tile_channels * t.per_channel <= 128 && t.tile_channels < t.channels) {
      t.tile_channels *= 2;
      if (bytes(t) <= limit) continue;
      t.tile_channels /= 2;
      break;
    }
    t.threads = round_up(t.tile_channels * t.per_channel, 32);
    return t.threads <= most_threads && bytes(t) <= limit;
  };
  // In channels_last the channels of a sector, which memory moves together, and few columns; else a channel and many.
  int columns = x.channels_last ? 64 : 256, channels = x.channels_last ? 32 / element_size(x) : 1;
  const int least = x.channels_last ? 16 / element_size(x) : 1;  // a unit of memory
  while (!shape(columns, channels)) {
    (columns > 32 ? columns : channels) /= 2;
    if (channels < least) throw std::runtime_error("segnext_kernels: a block has too little shared memory on this device");
  }
  while (1 << t.log_channels < t.tile_channels) ++t.log_channels;
  t.groups = ceil_div(t.channels, t.tile_channels);
  // More parts of rows fill the device, at the price of rows that are read twice: up to a quarter more than must be read where
  // six warps run on every multiprocessor anyway, else up to `most_read` times as much.
  const double columns_read = 1 + 2.0 * reach * (t.column_tiles - 1) / t.width;
  const int64_t warps = x.images * t.groups * t.column_tiles * (t.threads / 32);
  const double allowed = warps >= kWarps / 2 ? 1.25 : most_read;
  const int most_parts = 1 + static_cast<int>(std::max(allowed / columns_read - 1, 0.0) * t.height / (2 * reach));
  const int64_t parts = std::min<int64_t>({(kWarps + warps - 1) / warps, most_parts, ceil_div(t.height, 2 * kRows)});
  t.part_rows = round_up(ceil_div(t.height, static_cast<int>(parts)), kRows);
  t.row_parts = ceil_div(t.height, t.part_rows);
  int64_t blocks = x.images * t.groups * t.column_tiles * t.row_parts;
  const int64_t plane = x.height * x.width * moved, worth = (8 * extra + plane - 1) / plane;
  t.block_images = static_cast<int>(std::max<int64_t>(std::min({worth, blocks / kMultiprocessors, x.images}), 1));
  blocks = (x.images + t.block_images - 1) / t.block_images * t.groups * t.column_tiles * t.row_parts;
  if (blocks > INT32_MAX) throw std::runtime_error("segnext_kernels: the tensor is too large for one launch");
  t.blocks = static_cast<unsigned>(blocks);
  return t;
}

// What one block owns: of `image` and those after it that it does too, `channels` from `channel`, rows [row, end_row), columns
// from `column`.
struct Tile {
  int image, channel, channels, column, row, end_row;

  __device__ explicit Tile(const Tiling& t) {
    unsigned rest = blockIdx.x;
    channel = static_cast<int>(rest % t.groups) * t.tile_channels;
    rest /= t.groups;
    column = static_cast<int>(rest % t.column_tiles) * t.tile_columns;
    rest /= t.column_tiles;
    row = static_cast<int>(rest % t.row_parts) * t.part_rows;
    image = static_cast<int>(rest / t.row_parts) * t.block_images;
    channels = min(t.tile_channels, t.channels - channel);
    end_row = min(row + t.part_rows, t.height);
  }
  // Goes on to the block's next image, if it has one.
  __device__ bool next_image(const Tiling& t) { return ++image % t.block_images != 0 && image < t.images; }
};

// The number of an image's plane that holds the tile's first channel.
__device__ __forceinline__ int64_t plane_of(const Tiling& t, const Tile& tile) {
  return static_cast<int64_t>(tile.image) * t.channels + tile.channel;
}

// Places in lines of `size`, taken by threads in turn, without a division for each. Both fit in 16 bits: one register.
class Walk {
 public:
  __device__ Walk(int place, int size) : packed_(static_cast<unsigned>(place / size) << 16 | place % size) {}
  __device__ int line() const { return packed_ >> 16; }
  __device__ int at() const { return packed_ & 0xFFFF; }
  __device__ void advance(Walk step, int size) {
    packed_ += step.packed_;
    if (at() >= size) packed_ += 0x10000 - size;
  }

 private:
  unsigned packed_;
};

// Arrays one after another in shared memory, in floats; when run on the host, with guarded gaps between them.
class Layout {
 public:
  __host__ __device__ explicit Layout(float* memory) : memory_(memory) {}
  __host__ __device__ int take(int count) {
    const int at = floats_;
    floats_ += round_up(count, 4) + kGap;
#ifdef SEGNEXT_HOST_RUN
    if (memory_ != nullptr) host_run::guard(memory_ + floats_ - kGap, kGap * sizeof(float));
#endif
    return at;
  }
  __host__ __device__ int bytes() const { return floats_ * static_cast<int>(sizeof(float)); }

 private:
#ifdef SEGNEXT_HOST_RUN
  static constexpr int kGap = 64;
#else
  static constexpr int kGap = 0;
#endif
  float* memory_;
  int floats_ = 0;
};

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
