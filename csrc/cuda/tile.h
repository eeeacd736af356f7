// How an image is cut into blocks. A block owns some channels, some columns and some rows of one image, or of several one after
// another, and marches down the rows, kRows at a time.
#pragma once
#include <algorithm>
#include <stdexcept>

#include "arguments.h"
#include "cuda/memory.h"

namespace segnext::cuda {

inline constexpr int kRows = 4;
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

// What is allowed where few blocks leave multiprocessors empty: how many times as much as must be read may be, and the columns
// of a tile in channels_last.
struct Few {
  double most_read;
  int columns;
};

// Cuts x for a kernel that reads `reach` pixels around its outputs and where a thread owns `own` neighbouring columns of a
// channel, of those `border` columns of the neighbouring tiles too. bytes(tiling) of shared memory may be at most `limit`. A
// block moves `moved` elements for each pixel and `extra` for each channel: where planes are so small that these weigh, it does
// several images.
template <class F>
Tiling cut(const Image& x, int reach, int own, int border, int moved, int extra, Few few, int most_threads, int limit,
           const F& bytes) {
  Tiling t = {};
  if (std::max({x.images, x.height, x.width}) > 1 << 30 || x.height * x.width > 1 << 30 || x.channels > 1 << 24) {
    throw std::runtime_error("segnext_kernels: the CUDA kernels take images of up to 2^30 pixels and 2^24 channels");
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
    t.per_channel = (t.tile_columns + 2 * t.border) / own;
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
  const auto arrange = [&](int columns) {
    int channels = x.channels_last ? 32 / element_size(x) : 1;
    const int least = x.channels_last ? 16 / element_size(x) : 1;  // a unit of memory
    while (!shape(columns, channels)) {
      (columns > 32 ? columns : channels) /= 2;
      if (channels < least) throw std::runtime_error("segnext_kernels: a block has too little shared memory on this device");
    }
    t.groups = ceil_div(t.channels, t.tile_channels);
    return x.images * t.groups * t.column_tiles * (t.threads / 32);
  };
  int64_t warps = arrange(x.channels_last ? 64 : 256);
  if (x.channels_last && warps < kWarps / 2) warps = arrange(few.columns);
  while (1 << t.log_channels < t.tile_channels) ++t.log_channels;
  // More parts of rows fill the device, at the price of rows that are read twice: up to a quarter more than must be read where
  // every multiprocessor has a block and six warps anyway.
  const double columns_read = 1 + 2.0 * reach * (t.column_tiles - 1) / t.width;
  const bool full = x.images * t.groups * t.column_tiles >= kMultiprocessors && warps >= kWarps / 2;
  const double allowed = full ? 1.25 : few.most_read;
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

}  // namespace segnext::cuda
