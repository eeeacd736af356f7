// The first pass of msca_strips backward: da, dx, and the gradients of the 5x5 filter. msca_strips_backward.h has the
// equations.
#include "cuda/launch.h"
#include "cuda/msca_strips_backward.h"
#include "cuda/sums.h"

namespace segnext::cuda {
namespace {

template <bool kLast>
constexpr int kMostInputThreads =
    kLast ? 288 : 256;     // channels_last: 16 channels of 32 columns and of the neighbours' that dx needs
constexpr int kDaPad = 2;  // columns of da beside a tile's that dx needs

struct InputArrays {
  Layout layout;
  int g_pitch, da_pitch, taps, g, da, x, dx, g_staging, x_staging;
  __host__ __device__ InputArrays(const Tiling& t, int dx_floats, int g_bytes, int x_bytes, float* memory)
      : layout(memory),
        g_pitch(t.tile_columns + 2 * (t.border + kReach)),
        da_pitch(t.tile_columns + 2 * kDaPad),
        taps(layout.take(t.tile_channels * kTapStride)),
        g(layout.take(t.tile_channels * plane_stride(kRows, g_pitch))),
        da(layout.take(most(t.tile_channels * plane_stride(kRing, da_pitch), sums_floats(t)))),
        x(layout.take(t.tile_channels * plane_stride(kRows, t.tile_columns))),
        dx(layout.take(dx_floats)),
        g_staging(layout.take(g_bytes / 4)),
        x_staging(layout.take(x_bytes / 4)) {}
};

template <class T, bool kLast>
__host__ __device__ InputArrays input_arrays(const Tiling& t, float* memory) {
  using Mover = RowMover<T, kLast>;
  const int dx_floats = kLast ? 0 : Patch<T, kTaskRows, kTaskColumns>::floats(t);  // channels_last: in x's place
  return {t, dx_floats, Mover::staging_bytes(t, t.tile_columns + 2 * (t.border + kReach)),
          Mover::staging_bytes(t, t.tile_columns), memory};
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
  const bool owes = active && place < 2 * groups && task_col < t.width;
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
      float dx[kTaskRows][kTaskColumns];
      if constexpr (!kLast) clear<T>(dx);
      if (owes) {
        convolve_back<5, kDaPad>(das, taps, own, pair + (parity ^ 1) * kRows, task_col, xs(own, pair, task_col), xs.pitch, dx,
                                 sums);
        if constexpr (kLast) {
#pragma unroll
          for (int o = 0; o < kTaskRows; ++o) {
            Vec<float, 4> values;  // x stays zero beside the image
#pragma unroll
            for (int c = 0; c < kTaskColumns; ++c) values[c] = task_col + c < t.width ? dx[o][c] : 0.0f;
            write<4>(xs(own, pair + o, task_col), values);
          }
        }
      }
      if constexpr (kLast) __syncthreads();
      if (grad_x == nullptr) continue;
      if constexpr (kLast) {
        rows.store(grad_x, done, xs);
      } else {
        store_rows<T, kTaskRows>(grad_x, t, tile, own, done + pair, task_col, owes, dx, shared + at.dx);
      }
    }
  }
  if (partial != nullptr) add_up(sums, t, tile, shared + at.da, partial);
}

template <class T, bool kLast>
Tiling cut_inputs(const Image& x) {
  const auto bytes = [](const Tiling& t) { return input_arrays<T, kLast>(t, nullptr).layout.bytes(); };
  return cut(x, kReach + 2, kOwn, kDaPad, 3, kChannelTaps + 4 * kInputSums, kFew<kLast>, kMostInputThreads<kLast>,
             shared_memory_limit(), bytes);
}

}  // namespace

int64_t input_parts(const Image& x) {
  int64_t parts = 0;
  with_kernel(x, [&]<class T, bool kLast>() { parts = parts_of(cut_inputs<T, kLast>(x)); });
  return parts;
}

void backward_inputs(const Image& grad_out, const Image& x, const StripFilters& filters, const Image& grad_x, float* partial,
                     cudaStream_t stream) {
  with_kernel(x, [&]<class T, bool kLast>() {
    Tiling t = cut_inputs<T, kLast>(x);
    t.vectors = aligned(x) && aligned(grad_out) && (grad_x.data == nullptr || aligned(grad_x));
    launch(inputs<T, kLast>, t.blocks, t.threads, input_arrays<T, kLast>(t, nullptr).layout.bytes(), stream, t, grad_out.data,
           x.data, filters, grad_x.data, partial);
  });
}

}  // namespace segnext::cuda
