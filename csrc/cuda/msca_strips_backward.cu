// msca_strips backward in two passes. With a = W5 x + b5, h_k = H_k a + bh_k and g the output's gradient:
//
//   inputs: da = g + sum_k V_k^T H_k^T g,  dx = W5^T da,  dW5 = sum da x (shifted),  db5 = sum da
//   taps:   u_k = V_k^T g,  dH_k[t] = sum u_k[r, w] a[r, w + t - k/2],  dbh_k = sum u_k
//           dV_k[t] = sum h_k[r, w] g[r - t + k/2, w],  dbv_k = sum g
//
// Both march like forward does: `inputs` with the transposed filters on g, `taps` with g's rows in the registers where forward
// has its sums. README.md says why two passes.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/strips.h"
#include "cuda/sums.h"

namespace segnext::cuda {
namespace {

template <bool kLast>
constexpr int kMostInputThreads =
    kLast ? 288 : 256;  // channels_last: 16 channels of 32 columns and of the neighbours' that dx needs
constexpr int kMostTapThreads = 256;
constexpr int kDaPad = 2;  // columns of da beside a tile's that dx needs
constexpr int kXPad = StemTasks::kInputPad, kAPad = StemTasks::kPad;
constexpr int kInputSums = 26;  // dW5, db5
constexpr int kRowSums = 0, kColumnSums = kStripsTaps, kRowBiasSums = 2 * kStripsTaps, kGradSum = kRowBiasSums + kBranches;
constexpr int kTapSums = kGradSum + 1;  // dH and dV in the order of the taps, dbh, dbv

struct InputArrays {
  Layout layout;
  int g_pitch, da_pitch, taps, g, da, x, g_staging, x_staging;
  __host__ __device__ InputArrays(const Tiling& t, int g_bytes, int x_bytes, float* memory)
      : layout(memory),
        g_pitch(t.tile_columns + 2 * (t.border + kReach)),
        da_pitch(t.tile_columns + 2 * kDaPad),
        taps(layout.take(t.tile_channels * kTapStride)),
        g(layout.take(t.tile_channels * plane_stride(kRows, g_pitch))),
        da(layout.take(most(t.tile_channels * plane_stride(kRing, da_pitch), sums_floats(t)))),
        x(layout.take(t.tile_channels * plane_stride(kRows, t.tile_columns))),
        g_staging(layout.take(g_bytes / 4)),
        x_staging(layout.take(x_bytes / 4)) {}
};

struct TapArrays {
  Layout layout;
  int x_pitch, a_pitch, taps, x, a, g, x_staging, g_staging;
  __host__ __device__ TapArrays(const Tiling& t, int x_bytes, int g_bytes, float* memory)
      : layout(memory),
        x_pitch(StemTasks::input_pitch(t)),
        a_pitch(t.tile_columns + 2 * kAPad),
        taps(layout.take(t.tile_channels * kTapStride)),
        x(layout.take(most(t.tile_channels * plane_stride(kRing, x_pitch), sums_floats(t)))),
        a(layout.take(t.tile_channels * own_stride(kRows, a_pitch))),
        g(layout.take(t.tile_channels * plane_stride(kRows, t.tile_columns))),
        x_staging(layout.take(x_bytes / 4)),
        g_staging(layout.take(g_bytes / 4)) {}
};

template <class T, bool kLast>
__host__ __device__ InputArrays input_arrays(const Tiling& t, float* memory) {
  using Mover = RowMover<T, kLast>;
  return {t, Mover::staging_bytes(t, t.tile_columns + 2 * (t.border + kReach)), Mover::staging_bytes(t, t.tile_columns),
          memory};
}
template <class T, bool kLast>
__host__ __device__ TapArrays tap_arrays(const Tiling& t, float* memory) {
  using Mover = RowMover<T, kLast>;
  return {t, Mover::staging_bytes(t, t.tile_columns + 2 * (kReach + 2)), Mover::staging_bytes(t, t.tile_columns), memory};
}

template <class T, bool kLast>
__global__ void __launch_bounds__(kMostInputThreads<kLast>)
    inputs(const Tiling t, const void* grad_out, const void* x, const __grid_constant__ StripFilters filters, void* grad_x,
           float* partial) {
  SEGNEXT_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const InputArrays at = input_arrays<T, kLast>(t, shared);
  Tile tile(t);
  const int end = tile.column + t.tile_columns, first_col = tile.column - t.border;
  const Planes gs = {shared + at.g, at.g_pitch, plane_stride(kRows, at.g_pitch), first_col - kReach};
  const Planes das = {shared + at.da, at.da_pitch, plane_stride(kRing, at.da_pitch), tile.column - kDaPad};
  const Planes xs = {shared + at.x, t.tile_columns, plane_stride(kRows, t.tile_columns), tile.column};
  clear(gs, t.tile_channels);
  clear(das, t.tile_channels);
  clear(xs, t.tile_channels);
  load_taps<T, true>(filters, t, tile, shared + at.taps);

  const int own = threadIdx.x / t.per_channel, place = threadIdx.x - own * t.per_channel, col = first_col + place * kOwn;
  const bool active = own < tile.channels;
  const float* taps = shared + at.taps + (active ? own : 0) * kTapStride;
  const RowMover<T, kLast> grads(t, tile, first_col - kReach, end + t.border + kReach, shared + at.g_staging);
  const RowMover<T, kLast> rows(t, tile, tile.column, end, shared + at.x_staging);
  // The thread's task: a pair of rows, four columns of dx.
  const int groups = t.tile_columns / kTaskColumns, pair = place / groups * kTaskRows;
  const int task_col = tile.column + place % groups * kTaskColumns;
  const bool owes = active && place < 2 * groups;
  float sums[kInputSums] = {};

  for (bool more = true; more; more = tile.next_image(t)) {
    // Rows row ... row + 3 of g complete rows row - 10 ... row - 7 of da, and those rows row - 12 ... row - 9 of dx.
    constexpr int kBehind = kReach + 2;
    Sums da = {};
    int row = tile.row == 0 ? 0 : tile.row - kBehind;
    const int last = min(tile.end_row + kBehind, t.height) - 1;
    grads.fetch(grad_out, row);
    for (int parity = 0; row - kBehind < tile.end_row; row += kRows, parity ^= 1) {
      if (row <= last) {
        grads.template put<2>(grad_out, row, gs);
        __syncthreads();
        if (row + kRows <= last) grads.fetch(grad_out, row + kRows);
        if (active) {
          Branches h = {};
          filter_rows(gs(own, 0, col - kReach), gs.pitch, taps + kRowTaps, h, da);
          filter_columns(h, taps + kColumnTaps, da);
        }
      } else {
        __syncthreads();  // the tasks before have read da, and their rows are stored
      }
      if (active) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const bool inside = row - kReach + r >= 0 && row - kReach + r < t.height;
          Vec<float, kOwn> values;
#pragma unroll
          for (int p = 0; p < kOwn; ++p) values[p] = inside && col + p >= 0 && col + p < t.width ? da[r][p] : 0.0f;
          write<kOwn>(das(own, r + parity * kRows, col), values);
        }
      }
      advance(da, 0.0f);
      const int done = row - kBehind;
      if (done >= tile.row) rows.template put<4>(x, done, xs);
      __syncthreads();
      if (done + kRows >= tile.row && done + kRows < tile.end_row) rows.fetch(x, done + kRows);
      if (done < tile.row) continue;
      if (owes) {
        float dx[kTaskRows][kTaskColumns];
        convolve_back<5, kDaPad>(das, taps, own, pair + (parity ^ 1) * kRows, task_col, xs(own, pair, task_col), xs.pitch, dx,
                                 sums);
#pragma unroll
        for (int o = 0; o < kTaskRows; ++o) {
          const int out = done + pair + o;
          if constexpr (kLast) {
            Vec<float, 4> values;  // x stays zero beside the image
#pragma unroll
            for (int c = 0; c < kTaskColumns; ++c) values[c] = task_col + c < t.width ? dx[o][c] : 0.0f;
            write<4>(xs(own, pair + o, task_col), values);
          } else if (grad_x != nullptr && out < tile.end_row) {
            T* plane = static_cast<T*>(grad_x) + (plane_of(t, tile) + own) * t.height * t.width;
            store_columns(plane + static_cast<int64_t>(out) * t.width, task_col, t.width, t.vectors, dx[o]);
          }
        }
      }
      if constexpr (kLast) {
        __syncthreads();
        if (grad_x != nullptr) rows.store(grad_x, done, xs);
      }
    }
  }
  if (partial != nullptr) add_up(sums, t, tile, shared + at.da, partial);
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
__global__ void __launch_bounds__(kMostTapThreads)
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
  const StemTasks tasks(t, tile);
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

// One thread for each tap and bias of a channel.
template <class T>
__global__ void reduce(const float* input_sums, int64_t input_parts, const float* tap_sums, int64_t tap_parts, int channels,
                       const __grid_constant__ StripFilters grads) {
  const int tensor = blockIdx.y;
  const int branch = (tensor - 2) / 4, kind = (tensor - 2) % 4;  // row, bias, column, bias
  const int count = tensor_taps(tensor);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= channels * count) return;
  const int channel = i / count, tap = i - channel * count;
  float sum = 0;
  if (tensor < 2) {
    const float* from = input_sums + static_cast<int64_t>(channel) * kInputSums + (tensor == 0 ? tap : 25);
    sum = sum_parts(from, static_cast<int64_t>(channels) * kInputSums, input_parts);
  } else {
    const int place = kind == 1 ? kRowBiasSums + branch : kind == 3 ? kGradSum : tap_place(branch, tap);
    const float* from = tap_sums + static_cast<int64_t>(channel) * kTapSums + place + (kind == 2 ? kColumnSums : kRowSums);
    sum = sum_parts(from, static_cast<int64_t>(channels) * kTapSums, tap_parts);
  }
  Vec<T, 1> rounded;
  round_to(sum, rounded[0]);
  write<1>(static_cast<T*>(grads.tensors[tensor]) + i, rounded);
}

template <class T, bool kLast>
Tiling cut_inputs(const Image& x) {
  const auto bytes = [](const Tiling& t) { return input_arrays<T, kLast>(t, nullptr).layout.bytes(); };
  return cut(x, kReach + 2, kDaPad, 3, kChannelTaps + 4 * kInputSums, 1.5, kMostInputThreads<kLast>, shared_memory_limit(),
             bytes);
}
template <class T, bool kLast>
Tiling cut_taps(const Image& x) {
  const auto bytes = [](const Tiling& t) { return tap_arrays<T, kLast>(t, nullptr).layout.bytes(); };
  return cut(x, kReach + 2, 0, 2, kChannelTaps + 4 * kTapSums, 1.5, kMostTapThreads, shared_memory_limit(), bytes);
}

}  // namespace

int64_t msca_strips_backward_scratch(const Image& x) {
  int64_t floats = 0;
  with_kernel(x, [&](auto* type, auto last) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr bool kLast = last;
    floats = x.channels * (parts_of(cut_inputs<T, kLast>(x)) * kInputSums + parts_of(cut_taps<T, kLast>(x)) * kTapSums);
  });
  return floats;
}

void msca_strips_backward(const Image& grad_out, const Image& x, const StripFilters& filters, const Image& grad_x,
                          const StripFilters* grads, float* scratch, cudaStream_t stream) {
  with_kernel(x, [&](auto* type, auto last) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr bool kLast = last;
    const bool vectors = aligned(x) && aligned(grad_out) && (grad_x.data == nullptr || aligned(grad_x));
    Tiling t = cut_inputs<T, kLast>(x);
    t.vectors = vectors;
    const int64_t input_parts = parts_of(t);
    launch(inputs<T, kLast>, t.blocks, t.threads, input_arrays<T, kLast>(t, nullptr).layout.bytes(), stream, t, grad_out.data,
           x.data, filters, grad_x.data, grads == nullptr ? nullptr : scratch);
    if (grads == nullptr) return;
    float* tap_sums = scratch + input_parts * x.channels * kInputSums;
    t = cut_taps<T, kLast>(x);
    t.vectors = vectors;
    launch(taps<T, kLast>, t.blocks, t.threads, tap_arrays<T, kLast>(t, nullptr).layout.bytes(), stream, t, grad_out.data,
           x.data, filters, tap_sums);
    launch(reduce<T>, dim3(ceil_div(t.channels * 25, 128), kStripTensors), 128, 0, stream, static_cast<const float*>(scratch),
           input_parts, static_cast<const float*>(tap_sums), parts_of(t), t.channels, *grads);
  });
}

}  // namespace segnext::cuda
