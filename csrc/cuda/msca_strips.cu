// msca_strips forward: one pass over x, a block marching down the rows of its channels. README.md has the count behind it.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/strips.h"

namespace segnext::cuda {
namespace {

constexpr int kHalo = kReach + 2;  // columns of x that are read on either side
constexpr int kXPad = Conv5x5Tasks::kInputPad, kAPad = Conv5x5Tasks::kPad;

// In shared memory: the taps, the ring of x, kRows rows of a and of y, what is on its way from memory.
struct Arrays {
  Layout layout;
  int x_pitch, a_pitch, taps, x, a, y, staging;
  __host__ __device__ Arrays(const Tiling& t, int patch_floats, int staging_bytes, float* memory)
      : layout(memory),
        x_pitch(Conv5x5Tasks::input_pitch(t)),
        a_pitch(t.tile_columns + 2 * kAPad),
        taps(layout.take(t.tile_channels * kTapStride)),
        x(layout.take(t.tile_channels * plane_stride(kRing, x_pitch))),
        a(layout.take(t.tile_channels * own_stride(kRows, a_pitch))),
        y(layout.take(t.channels_last ? t.tile_channels * plane_stride(kRows, t.tile_columns) : patch_floats)),
        staging(layout.take(staging_bytes / 4)) {}
};

template <class T, bool kLast>
__host__ __device__ Arrays arrays(const Tiling& t, float* memory) {
  return {t, Patch<T, kRows, kOwn>::floats(t), RowMover<T, kLast>::staging_bytes(t, t.tile_columns + 2 * kHalo), memory};
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kRoomy = false;
#else
constexpr bool kRoomy = true;
#endif

// channels_last: 64 columns of a sector's channels. 16 warps on a multiprocessor, which bounds the registers; 12 where nvcc
// would spill for more.
template <class T, bool kLast>
constexpr int kMostThreads = kLast ? 64 / kOwn * 32 / sizeof(T) : 128;
template <class T, bool kLast>
constexpr int kBlocksTogether = (kLast || kRoomy ? 512 : 384) / kMostThreads<T, kLast>;

template <class T, bool kLast>
__global__ void __launch_bounds__((kMostThreads<T, kLast>), (kBlocksTogether<T, kLast>))
    strips(const Tiling t, const void* x, const __grid_constant__ StripFilters filters, void* y) {
  SEGNEXT_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const Arrays at = arrays<T, kLast>(t, shared);
  Tile tile(t);
  const int end = tile.column + t.tile_columns;
  const Planes xs = {shared + at.x, at.x_pitch, plane_stride(kRing, at.x_pitch), tile.column - kXPad};
  const Planes as = {shared + at.a, at.a_pitch, own_stride(kRows, at.a_pitch), tile.column - kAPad};
  const Planes ys = {shared + at.y, t.tile_columns, plane_stride(kRows, t.tile_columns), tile.column};

  clear(xs, t.tile_channels);
  clear(as, t.tile_channels);
  load_taps<T, false>(filters, t, tile, shared + at.taps);
  __syncthreads();

  // The thread's own columns.
  const int own = threadIdx.x / t.per_channel, col = tile.column + (threadIdx.x - own * t.per_channel) * kOwn;
  const bool active = own < tile.channels;
  const float* taps = shared + at.taps + (active ? own : 0) * kTapStride;
  const Conv5x5Tasks tasks(t, tile);
  const RowMover<T, kLast> rows(t, tile, tile.column - kHalo, end + kHalo, shared + at.staging);

  for (bool more = true; more; more = tile.next_image(t)) {
    Sums sums;
#pragma unroll
    for (int i = 0; i < kSumRows; ++i) {
#pragma unroll
      for (int p = 0; p < kOwn; ++p) sums[i][p] = taps[kColumnBias];
    }
    // Rows row ... row + 3 of a lie in the middle of x's rows row - 2 ... row + 5, the ring.
    int row = tile.row == 0 ? -2 : tile.row - kReach;
    const int last = min(tile.end_row + kReach, t.height) - 1;
    rows.fetch(x, row - 2);
    rows.template put<2>(x, row - 2, xs.from_row(0));
    rows.fetch(x, row + 2);
    for (int parity = 0; row - kReach < tile.end_row; row += kRows, parity ^= 1) {
      if (row <= last) {
        rows.template put<2>(x, row + 2, xs.from_row((parity ^ 1) * kRows));
        __syncthreads();
        if (row + kRows <= last) rows.fetch(x, row + 2 + kRows);
        tasks.run(xs, as, shared + at.taps, row, parity);
        __syncthreads();
        if (active) {
          Branches h;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const bool inside = row + r >= 0 && row + r < t.height;
#pragma unroll
            for (int b = 0; b < kBranches; ++b) {
#pragma unroll
              for (int p = 0; p < kOwn; ++p) h[b][r][p] = inside ? taps[kRowBias + b] : 0.0f;
            }
          }
          filter_rows(as(own, 0, col - kReach), as.pitch, taps + kRowTaps, h, sums);
          filter_columns(h, taps + kColumnTaps, sums);
        }
      } else {
        __syncthreads();  // the rows before are stored
      }
      const int done = row - kReach;  // its first kRows rows of sums are complete
      if constexpr (kLast) {
        if (active) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            Vec<float, kOwn> values;
#pragma unroll
            for (int p = 0; p < kOwn; ++p) values[p] = sums[r][p];
            write<kOwn>(ys(own, r, col), values);
          }
        }
        __syncthreads();
        rows.store(y, done, ys);
      } else {
        store_rows<T, kRows>(y, t, tile, own, done, col, active && col < t.width, sums, shared + at.y);
      }
      advance(sums, taps[kColumnBias]);
    }
  }
}

template <class T, bool kLast>
void forward(const Image& x, const StripFilters& filters, const Image& y, cudaStream_t stream) {
  const auto bytes = [](const Tiling& t) { return arrays<T, kLast>(t, nullptr).layout.bytes(); };
  Tiling t = cut(x, kHalo, kOwn, 0, 2, kChannelTaps, kFew<kLast>, kMostThreads<T, kLast>, shared_memory_limit(), bytes);
  t.vectors = aligned(x) && aligned(y);
  launch(strips<T, kLast>, t.blocks, t.threads, bytes(t), stream, t, x.data, filters, y.data);
}

}  // namespace

void msca_strips_forward(const Image& x, const StripFilters& filters, const Image& y, cudaStream_t stream) {
  with_kernel(x, [&]<class T, bool kLast>() { forward<T, kLast>(x, filters, y, stream); });
}

}  // namespace segnext::cuda
