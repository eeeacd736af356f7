// dwconv_gelu: a 3x3 depthwise convolution, its bias and GELU in one pass; backward computes the convolution again.
#include "cuda/gelu.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/stencil.h"
#include "cuda/sums.h"

namespace segnext::cuda {
namespace {

constexpr int kTaps = 10;       // of a channel: the filter and the bias
constexpr int kTapStride = 12;  // in shared memory
constexpr int kPad = 4;         // columns beside a tile's in shared memory, of which one counts forward and two backward
constexpr int kMostThreads = 256;

// Floats before the ring of x, which backward reads and which do not count.
__host__ __device__ constexpr int before(bool backward) { return backward ? 4 : 0; }

// In shared memory, for forward: the taps, the ring of x, kRows rows of y in channels_last, what is on its way from memory.
// Backward has the ring of dz too, and rows of the output's gradient.
struct Arrays {
  Layout layout;
  int taps, x, dz, rows, patch, staging, grad_staging;
  __host__ __device__ Arrays(const Tiling& t, bool backward, int patch_floats, int staging_bytes, float* memory)
      : layout(memory),
        taps(layout.take(t.tile_channels * kTapStride)),
        x(layout.take(t.tile_channels * plane_stride(kRing, t.tile_columns + 2 * kPad) + before(backward)) + before(backward)),
        dz(layout.take(backward ? t.tile_channels * plane_stride(kRing, t.tile_columns + 2 * kPad) : 0)),
        rows(layout.take(backward || t.channels_last ? t.tile_channels * plane_stride(kRows, t.tile_columns + 2 * kPad) : 0)),
        patch(layout.take(patch_floats)),
        staging(layout.take(staging_bytes / 4)),
        grad_staging(layout.take(backward ? staging_bytes / 4 : 0)) {}
};

template <class T, bool kLast>
__host__ __device__ Arrays arrays(const Tiling& t, bool backward, float* memory) {
  const int patch_floats = kLast ? 0 : Patch<T, kRows, kTaskColumns>::floats(t);
  return {t, backward, patch_floats, RowMover<T, kLast>::staging_bytes(t, t.tile_columns + 4), memory};
}

template <class T>
__device__ void load_taps(const DepthwiseFilter& filter, const Tile& tile, float* taps) {
  for (int i = threadIdx.x; i < tile.channels * kTaps; i += blockDim.x) {
    const int channel = i / kTaps, tap = i - channel * kTaps;
    const int64_t c = tile.channel + channel;
    const bool weight = tap < kTaps - 1;
    taps[channel * kTapStride + tap] =
        read_tap<T>(weight ? filter.weight : filter.bias, filter.dtype, weight ? c * (kTaps - 1) + tap : c);
  }
}

// What a thread owns: four columns of one channel.
struct Own {
  int channel, column;
  __device__ Own(const Tiling& t, const Tile& tile)
      : channel(threadIdx.x / t.per_channel), column(tile.column + (threadIdx.x - channel * t.per_channel) * kTaskColumns) {}
};

template <class T, bool kLast>
__global__ void __launch_bounds__(kMostThreads)
    convolution(const Tiling t, const void* x, const DepthwiseFilter filter, void* y) {
  SEGNEXT_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const Arrays at = arrays<T, kLast>(t, false, shared);
  const Tile tile(t);
  const int end = tile.column + t.tile_columns, pitch = t.tile_columns + 2 * kPad;
  const RowMover<T, kLast> rows(t, tile, tile.column - 1, end + 1, shared + at.staging);
  const Planes xs = {shared + at.x, pitch, plane_stride(kRing, pitch), tile.column - kPad};
  const Planes ys = {shared + at.rows, pitch, plane_stride(kRows, pitch), tile.column - kPad};
  clear(xs, t.tile_channels);
  load_taps<T>(filter, tile, shared + at.taps);
  __syncthreads();

  const Own own(t, tile);
  const bool active = own.channel < tile.channels && own.column < t.width;
  // Rows row ... row + 3 of y lie in the middle of x's rows row - 2 ... row + 5, the ring.
  rows.fetch(x, tile.row - 2);
  rows.template put<4>(x, tile.row - 2, xs.from_row(0));
  rows.fetch(x, tile.row + 2);
  for (int row = tile.row, parity = 0; row < tile.end_row; row += kRows, parity ^= 1) {
    rows.template put<4>(x, row + 2, xs.from_row((parity ^ 1) * kRows));
    __syncthreads();
    if (row + kRows < tile.end_row) rows.fetch(x, row + 2 + kRows);
    float z[kRows][kTaskColumns];
    if constexpr (!kLast) clear<T>(z);
    if (active) {
      convolve<3, kPad>(xs, shared + at.taps + own.channel * kTapStride, own.channel, 1 + parity * kRows, own.column, z);
#pragma unroll
      for (int o = 0; o < kRows; ++o) {
#pragma unroll
        for (int c = 0; c < kTaskColumns; ++c) z[o][c] = gelu(z[o][c]);
        if constexpr (kLast) write<4>(ys(own.channel, o, own.column), {z[o][0], z[o][1], z[o][2], z[o][3]});
      }
    }
    if constexpr (!kLast) {
      store_rows<T, kRows>(y, t, tile, own.channel, row, own.column, active, z, shared + at.patch);
    }
    __syncthreads();
    if constexpr (kLast) rows.store(y, row, ys);
  }
}

// dz = grad_out gelu'(z); dx is its transposed convolution, and what the filter gets is summed on the way.
template <class T, bool kLast>
__global__ void __launch_bounds__(kLast ? kMostThreads : 128, kLast ? 2 : 3)
    gradients(const Tiling t, const void* grad_out, const void* x, const DepthwiseFilter filter, void* grad_x, float* partial) {
  SEGNEXT_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const Arrays at = arrays<T, kLast>(t, true, shared);
  const Tile tile(t);
  const int end = tile.column + t.tile_columns, pitch = t.tile_columns + 2 * kPad;
  const RowMover<T, kLast> rows(t, tile, tile.column - 2, end + 2, shared + at.staging);
  const RowMover<T, kLast> grads(t, tile, tile.column - 1, end + 1, shared + at.grad_staging);
  // The gradient of z at the outermost of its columns beside the tile, which nobody reads, meets what lies beside a row of x.
  const Planes xs = {shared + at.x, pitch, plane_stride(kRing, pitch), tile.column - kPad};
  const Planes dzs = {shared + at.dz, pitch, plane_stride(kRing, pitch), tile.column - kPad};
  const Planes gs = {shared + at.rows, pitch, plane_stride(kRows, pitch), tile.column - kPad};
  clear(xs, t.tile_channels);
  clear(dzs, t.tile_channels);
  clear(gs, t.tile_channels);
  load_taps<T>(filter, tile, shared + at.taps);
  __syncthreads();

  const Own own(t, tile);
  const bool active = own.channel < tile.channels && own.column < t.width;
  const float* own_taps = shared + at.taps + (active ? own.channel : 0) * kTapStride;
  float sums[kTaps] = {};
  // Groups of 4 columns of dz that lie in the image, for each channel.
  const int first_group = tile.column == 0 ? kPad / 4 : 0;
  const int groups = ceil_div(min(t.width - tile.column + kPad, pitch), 4) - first_group;
  const Walk first_task(threadIdx.x, groups), task_step(blockDim.x, groups);
  // Rows row ... row + 3 of dz lie in the middle of x's rows row - 2 ... row + 5, and rows row - 2 ... row + 1 of dx in the
  // middle of dz's rows row - 4 ... row + 3.
  int row = tile.row - 2;
  rows.fetch(x, row - 2);
  rows.template put<4>(x, row - 2, xs.from_row(0));
  rows.fetch(x, row + 2);
  grads.fetch(grad_out, row);
  for (int parity = 0; row - 2 < tile.end_row; row += kRows, parity ^= 1) {
    rows.template put<4>(x, row + 2, xs.from_row((parity ^ 1) * kRows));
    grads.template put<4>(grad_out, row, gs);
    __syncthreads();
    if (row + kRows - 2 < tile.end_row) {
      rows.fetch(x, row + 2 + kRows);
      grads.fetch(grad_out, row + kRows);
    }
    for (Walk task = first_task; task.line() < tile.channels; task.advance(task_step, groups)) {
      const int channel = task.line();
      const int first = tile.column - kPad + 4 * (first_group + task.at());
      float z[kRows][kTaskColumns];
      convolve<3, kPad>(xs, shared + at.taps + channel * kTapStride, channel, 1 + parity * kRows, first, z);
#pragma unroll
      for (int o = 0; o < kRows; ++o) {
        auto dz = read<4>(gs(channel, o, first));  // zero outside the image
#pragma unroll
        for (int c = 0; c < kTaskColumns; ++c) dz[c] *= gelu_slope(z[o][c]);
        write<4>(dzs(channel, o + parity * kRows, first), dz);
      }
    }
    __syncthreads();
    const int done = row - 2;
    const bool owes = active && done >= tile.row;
    float dx[kRows][kTaskColumns];
    if constexpr (!kLast) clear<T>(dx);
    if (owes) {
      const float* own_x = xs(own.channel, parity * kRows, own.column);
      convolve_back<3, kPad>(dzs, own_taps, own.channel, 1 + (parity ^ 1) * kRows, own.column, own_x, xs.pitch, dx, sums);
      if constexpr (kLast) {
#pragma unroll
        for (int o = 0; o < kRows; ++o) {
          Vec<float, 4> values;  // gs stays zero beside the image
#pragma unroll
          for (int c = 0; c < kTaskColumns; ++c) values[c] = own.column + c < t.width ? dx[o][c] : 0.0f;
          write<4>(gs(own.channel, o, own.column), values);
        }
      }
    }
    if constexpr (!kLast) {
      if (grad_x != nullptr) {
        store_rows<T, kRows>(grad_x, t, tile, own.channel, done, own.column, owes, dx, shared + at.patch);
      }
    }
    __syncthreads();
    if constexpr (kLast) {
      if (grad_x != nullptr) grads.store(grad_x, done, gs);
      __syncthreads();
    }
  }
  if (partial != nullptr) add_up(sums, t, tile, shared + at.x, partial);
}

template <class T>
__global__ void reduce(const float* partial, int64_t parts, int channels, const DepthwiseFilter grads) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= channels * kTaps) return;
  const float sum = sum_parts(partial + i, static_cast<int64_t>(channels) * kTaps, parts);
  const int channel = i / kTaps, tap = i % kTaps;
  T* to = tap < kTaps - 1 ? static_cast<T*>(grads.weight) + channel * (kTaps - 1) + tap : static_cast<T*>(grads.bias) + channel;
  Vec<T, 1> rounded;
  round_to(sum, rounded[0]);
  write<1>(to, rounded);
}

template <class T, bool kLast>
Tiling cut_for(const Image& x, bool backward) {
  const auto bytes = [&](const Tiling& t) { return arrays<T, kLast>(t, backward, nullptr).layout.bytes(); };
  return cut(x, backward ? 2 : 1, kTaskColumns, 0, backward ? 3 : 2, 0, {1.5, 64}, kMostThreads, shared_memory_limit(), bytes);
}

}  // namespace

void dwconv_gelu_forward(const Image& x, const DepthwiseFilter& filter, const Image& y, cudaStream_t stream) {
  with_kernel(x, [&]<class T, bool kLast>() {
    Tiling t = cut_for<T, kLast>(x, false);
    t.vectors = aligned(x) && aligned(y);
    launch(convolution<T, kLast>, t.blocks, t.threads, arrays<T, kLast>(t, false, nullptr).layout.bytes(), stream, t, x.data,
           filter, y.data);
  });
}

int64_t dwconv_gelu_backward_scratch(const Image& x) {
  int64_t floats = 0;
  with_kernel(x, [&]<class T, bool kLast>() { floats = parts_of(cut_for<T, kLast>(x, true)) * x.channels * kTaps; });
  return floats;
}

void dwconv_gelu_backward(const Image& grad_out, const Image& x, const DepthwiseFilter& filter, const Image& grad_x,
                          const DepthwiseFilter* grads, float* scratch, cudaStream_t stream) {
  with_kernel(x, [&]<class T, bool kLast>() {
    Tiling t = cut_for<T, kLast>(x, true);
    t.vectors = aligned(x) && aligned(grad_out) && (grad_x.data == nullptr || aligned(grad_x));
    launch(gradients<T, kLast>, t.blocks, t.threads, arrays<T, kLast>(t, true, nullptr).layout.bytes(), stream, t,
           grad_out.data, x.data, filter, grad_x.data, grads == nullptr ? nullptr : scratch);
    if (grads == nullptr) return;
    const int outputs = static_cast<int>(x.channels) * kTaps;
    with_storage(grads->dtype, [&]<class S>() {
      launch(reduce<S>, ceil_div(outputs, 128), 128, 0, stream, static_cast<const float*>(scratch), parts_of(t),
             static_cast<int>(x.channels), *grads);
    });
  });
}

}  // namespace segnext::cuda
