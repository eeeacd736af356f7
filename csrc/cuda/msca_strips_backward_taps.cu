// The second pass of msca_strips backward: the gradients of the row and column filters. msca_strips_backward.h has the
// equations.
#include "cuda/launch.h"
#include "cuda/msca_strips_backward.h"
#include "cuda/sums.h"

namespace segnext::cuda {
namespace {

constexpr int kMostThreads = 256;
constexpr int kXPad = Conv5x5Tasks::kInputPad, kAPad = Conv5x5Tasks::kPad;

struct TapArrays {
  Layout layout;
  int x_pitch, a_pitch, taps, x, a, g, x_staging, g_staging;
  __host__ __device__ TapArrays(const Tiling& t, int x_bytes, int g_bytes, float* memory)
      : layout(memory),
        x_pitch(Conv5x5Tasks::input_pitch(t)),
        a_pitch(t.tile_columns + 2 * kAPad),
        taps(layout.take(t.tile_channels * kTapStride)),
        x(layout.take(most(t.tile_channels * plane_stride(kRing, x_pitch), sums_floats(t)))),
        a(layout.take(t.tile_channels * own_stride(kRows, a_pitch))),
        g(layout.take(t.tile_channels * plane_stride(kRows, t.tile_columns))),
        x_staging(layout.take(x_bytes / 4)),
        g_staging(layout.take(g_bytes / 4)) {}
};

template <class T, bool kLast>
__host__ __device__ TapArrays tap_arrays(const Tiling& t, float* memory) {
  using Mover = RowMover<T, kLast>;
  return {t, Mover::staging_bytes(t, t.tile_columns + 2 * (kReach + 2)), Mover::staging_bytes(t, t.tile_columns), memory};
}

// With `row` at a's element kReach columns left of the thread's own: sums += what row r of the step has for the taps.
__device__ __forceinline__ void add_products(const float* row, const float* taps, int r, const Sums& g,
                                             float (&sums)[kTapSums]) {
  constexpr int kWindow = kPositions - 1 + kOwn;
  float a[kWindow], h[kBranches][kOwn], u[kBranches][kOwn] = {};
#pragma unroll
  for (int i = 0; i < kWindow; i += kOwn) {
    const auto part = read<kOwn>(row + i);
#pragma unroll
    for (int p = 0; p < kOwn; ++p) a[i + p] = part[p];
  }
#pragma unroll
  for (int b = 0; b < kBranches; ++b) {
#pragma unroll
    for (int p = 0; p < kOwn; ++p) h[b][p] = taps[kRowBias + b];
  }
  for_taps(taps + kRowTaps, [&](int branch, int position, float tap, int) {
#pragma unroll
    for (int p = 0; p < kOwn; ++p) h[branch][p] += tap * a[p + position];
  });
  for_taps(taps + kColumnTaps, [&](int branch, int position, float tap, int place) {
#pragma unroll
    for (int p = 0; p < kOwn; ++p) {
      const float grad = g[r + 2 * kReach - position][p];
      u[branch][p] += tap * grad;
      sums[kColumnSums + place] += h[branch][p] * grad;
    }
  });
  for_places([&](int branch, int position, int place) {
#pragma unroll
    for (int p = 0; p < kOwn; ++p) sums[kRowSums + place] += u[branch][p] * a[p + position];
  });
#pragma unroll
  for (int p = 0; p < kOwn; ++p) {
#pragma unroll
    for (int b = 0; b < kBranches; ++b) sums[kRowBiasSums + b] += u[b][p];
    sums[kGradSum] += g[r + kReach][p];
  }
}

template <class T, bool kLast>
__global__ void __launch_bounds__(kMostThreads)
    taps(const Tiling t, const void* grad_out, const void* x, const __grid_constant__ StripFilters filters, float* partial) {
  SEGNEXT_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const TapArrays at = tap_arrays<T, kLast>(t, shared);
  Tile tile(t);
  const int end = tile.column + t.tile_columns;
  const Planes xs = {shared + at.x, at.x_pitch, plane_stride(kRing, at.x_pitch), tile.column - kXPad};
  const Planes as = {shared + at.a, at.a_pitch, own_stride(kRows, at.a_pitch), tile.column - kAPad};
  const Planes gs = {shared + at.g, t.tile_columns, plane_stride(kRows, t.tile_columns), tile.column};
  clear(xs, t.tile_channels);
  clear(as, t.tile_channels);
  clear(gs, t.tile_channels);
  load_taps<T, false>(filters, t, tile, shared + at.taps);

  const int own = threadIdx.x / t.per_channel, col = tile.column + (threadIdx.x - own * t.per_channel) * kOwn;
  const bool active = own < tile.channels;
  const float* own_taps = shared + at.taps + (active ? own : 0) * kTapStride;
  float sums[kTapSums] = {};
  const RowMover<T, kLast> rows(t, tile, tile.column - kReach - 2, end + kReach + 2, shared + at.x_staging);
  const RowMover<T, kLast> grads(t, tile, tile.column, end, shared + at.g_staging);
  const Conv5x5Tasks tasks(t, tile);
  for (bool more = true; more; more = tile.next_image(t)) {
    Sums g = {};  // rows row - 10 ... row + 13 of the output's gradient in the thread's columns
    int row = tile.row - 2 * kReach;
    grads.fetch(grad_out, row + kReach);
    for (int parity = 0; row < tile.end_row; row += kRows) {
      grads.template put<4>(grad_out, row + kReach, gs);
      if (row == tile.row) {
        rows.fetch(x, row - 2);
        rows.template put<2>(x, row - 2, xs.from_row(0));
        rows.fetch(x, row + 2);
      }
      if (row >= tile.row) rows.template put<2>(x, row + 2, xs.from_row((parity ^ 1) * kRows));
      __syncthreads();
      if (row + kRows < tile.end_row) grads.fetch(grad_out, row + kReach + kRows);
      advance(g, 0.0f);
      if (active) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const auto values = read<kOwn>(gs(own, r, col));
#pragma unroll
          for (int p = 0; p < kOwn; ++p) g[2 * kReach + r][p] = values[p];
        }
      }
      if (row < tile.row) {
        __syncthreads();
        continue;
      }
      if (row + kRows < tile.end_row) rows.fetch(x, row + 2 + kRows);
      tasks.run(xs, as, shared + at.taps, row, parity);
      parity ^= 1;
      __syncthreads();
      if (!active) continue;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (row + r < tile.end_row) add_products(as(own, r, col - kReach), own_taps, r, g, sums);
      }
    }
  }
  add_up(sums, t, tile, shared + at.x, partial);
}

template <class T, bool kLast>
Tiling cut_taps(const Image& x) {
  const auto bytes = [](const Tiling& t) { return tap_arrays<T, kLast>(t, nullptr).layout.bytes(); };
  return cut(x, kReach + 2, kOwn, 0, 2, kChannelTaps + 4 * kTapSums, kFew<kLast>, kMostThreads, shared_memory_limit(), bytes);
}

}  // namespace

int64_t tap_parts(const Image& x) {
  int64_t parts = 0;
  with_kernel(x, [&]<class T, bool kLast>() { parts = parts_of(cut_taps<T, kLast>(x)); });
  return parts;
}

void backward_taps(const Image& grad_out, const Image& x, const StripFilters& filters, float* partial, cudaStream_t stream) {
  with_kernel(x, [&]<class T, bool kLast>() {
    Tiling t = cut_taps<T, kLast>(x);
    t.vectors = aligned(x) && aligned(grad_out);
    launch(taps<T, kLast>, t.blocks, t.threads, tap_arrays<T, kLast>(t, nullptr).layout.bytes(), stream, t, grad_out.data,
           x.data, filters, partial);
  });
}

}  // namespace segnext::cuda
