// The taps of msca_strips in shared memory, and its row and column filters.
//
// A thread owns kOwn neighbouring columns of one channel. The row filters read a row of `a` from shared memory through a window
// in registers; their results go straight into the sums of the 21 output rows that the column filters reach, which stay in
// registers too. So the column filters, 39 of the 103 multiply-adds, touch no memory but the taps.
#pragma once
#include "cuda/stencil.h"

namespace segnext::cuda {

inline constexpr int kOwn = 2;       // neighbouring columns of one channel that a thread owns
inline constexpr int kTaskRows = 2;  // of a thread's task for the 5x5 filter

// As an H100 is fastest.
template <bool kLast>
inline constexpr Few kFew = {kLast ? 3.0 : 2.0, 32};

// One channel's taps: the 5x5 filter and its bias, the column filters' biases as one sum, then the row and the column filters
// in the order in which they are used, position by position: the taps of 21, of 11, of 7 there.
inline constexpr int kPositions = 2 * kReach + 1;
inline constexpr int kStripsTaps = 39;                                       // 7 + 11 + 21
inline constexpr int kChannelTaps = 25 + 1 + 2 * (kStripsTaps + kBranches);  // elements of all tensors for a channel
inline constexpr int kColumnBias = 26, kRowTaps = 28, kColumnTaps = 68, kRowBias = 108;
inline constexpr int kTapStride = 116;  // a multiple of 4; eight channels' taps lie in different banks

__host__ __device__ constexpr int within(int value, int most) { return value < 0 ? 0 : value > most ? most : value; }
// Where the taps of a position begin, and whether a branch (0: 7, 1: 11, 2: 21 taps) has one there.
__host__ __device__ constexpr int first_tap(int position) {
  return position + within(position - 5, 11) + within(position - 7, 7);
}
__host__ __device__ constexpr int branch_taps(int branch) { return branch == 0 ? 7 : branch == 1 ? 11 : 21; }
__host__ __device__ constexpr bool has_tap(int branch, int position) {
  const int half = branch_taps(branch) / 2;
  return position >= kReach - half && position <= kReach + half;
}

// Where a branch's tap lies among the taps of its kind, and how many a tensor has of a channel.
__host__ __device__ constexpr int tap_place(int branch, int tap) {
  const int position = tap + kReach - branch_taps(branch) / 2;
  int place = first_tap(position);
  for (int longer = kBranches - 1; longer > branch; --longer) place += has_tap(longer, position);
  return place;
}
__host__ __device__ constexpr int tensor_taps(int tensor) {
  return tensor == 0 ? 25 : tensor % 2 == 1 ? 1 : branch_taps((tensor - 2) / 4);
}

// Calls f(branch, position, place) for all taps of a kind in their order.
template <class F>
__device__ __forceinline__ void for_places(const F& f) {
#pragma unroll
  for (int position = 0; position < kPositions; ++position) {
    int place = first_tap(position);
#pragma unroll
    for (int branch = kBranches - 1; branch >= 0; --branch) {
      if (has_tap(branch, position)) f(branch, position, place++);
    }
  }
}

// The same with f(branch, position, tap, place); each tap is read once, four at a time.
template <class F>
__device__ __forceinline__ void for_taps(const float* taps, const F& f) {
  Vec<float, 4> four = {};
  for_places([&](int branch, int position, int place) {
    if (place % 4 == 0) four = read<4>(taps + place);
    f(branch, position, four[place % 4], place);
  });
}

// taps [tile channels][kTapStride] <- the filters, zero for channels beyond the image's; with kFlip as the transposition takes
// the row and column filters.
template <class T, bool kFlip>
__device__ void load_taps(const StripFilters& filters, const Tiling& t, const Tile& tile, float* taps) {
  for (int i = threadIdx.x; i < t.tile_channels * kTapStride; i += blockDim.x) taps[i] = 0;
  __syncthreads();
  for (int tensor = 0; tensor < kStripTensors; ++tensor) {
    const int branch = (tensor - 2) / 4, kind = (tensor - 2) % 4;  // row, bias, column, bias
    const int count = tensor_taps(tensor);
    const int64_t first = static_cast<int64_t>(tile.channel) * count;
    for (int i = threadIdx.x; i < tile.channels * count; i += blockDim.x) {
      const int channel = i / count, tap = i - channel * count;
      const float value = read_tap<T>(filters.tensors[tensor], filters.dtype, first + i);
      float* to = taps + channel * kTapStride;
      if (tensor < 2) {
        to[tensor == 0 ? tap : 25] = value;
      } else if (kind == 1) {
        to[kRowBias + branch] = value;
      } else if (kind == 3) {
        to[kColumnBias] += value;  // by the same thread for every branch
      } else {
        to[(kind == 0 ? kRowTaps : kColumnTaps) + tap_place(branch, kFlip ? count - 1 - tap : tap)] = value;
      }
    }
  }
}

using Branches = float[kBranches][kRows][kOwn];

// Output rows that kRows rows of h reach; the first is kReach above theirs.
inline constexpr int kSumRows = kRows + 2 * kReach;
using Sums = float[kSumRows][kOwn];

// h += the row filters on kRows rows of a, sums += a itself; `row` is the first row's element kReach columns left of the
// thread's own.
__device__ __forceinline__ void filter_rows(const float* row, int pitch, const float* taps, Branches& h, Sums& sums) {
  float v[kRows][kPositions - 1 + kOwn];
  for_taps(taps, [&](int branch, int position, float tap, int) {
    if (branch == kBranches - 1) {  // the longest branch comes first at every position, and brings the columns that are new
#pragma unroll
      for (int first = 0; first < kPositions - 1 + kOwn; first += kOwn) {
        if (first != position + 1 && (first != 0 || position != 0)) continue;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const auto part = read<kOwn>(row + r * pitch + first);
#pragma unroll
          for (int p = 0; p < kOwn; ++p) v[r][first + p] = part[p];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int p = 0; p < kOwn; ++p) {
        if (branch == kBranches - 1 && position == kReach) sums[kReach + r][p] += v[r][p + position];
        h[branch][r][p] += tap * v[r][p + position];
      }
    }
  });
}

// sums += the column filters on h
__device__ __forceinline__ void filter_columns(const Branches& h, const float* taps, Sums& sums) {
  for_taps(taps, [&](int branch, int position, float tap, int) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int p = 0; p < kOwn; ++p) sums[r + 2 * kReach - position][p] += tap * h[branch][r][p];
    }
  });
}

// Takes kRows rows off the top and lets as many in below.
__device__ __forceinline__ void advance(Sums& sums, float fresh) {
#pragma unroll
  for (int i = 0; i < kSumRows; ++i) {
#pragma unroll
    for (int p = 0; p < kOwn; ++p) sums[i][p] = i + kRows < kSumRows ? sums[i + kRows < kSumRows ? i + kRows : 0][p] : fresh;
  }
}

// The 5x5 filter's tasks of a block: groups of 4 columns of a that lie in the image, two pairs of rows for each channel.
class Conv5x5Tasks {
 public:
  static constexpr int kPad = kReach + 2;       // columns of a beside a tile's in shared memory, and
  static constexpr int kInputPad = kReach + 4;  // of x, so that windows and groups begin at multiples of 16 bytes

  // Where a row has four groups, two rows further lie in the other half of the banks.
  __host__ __device__ static int input_pitch(const Tiling& t) {
    const int pitch = t.tile_columns + 2 * kInputPad;
    return t.tile_columns <= 16 ? round_up(pitch - 8, 16) + 8 : pitch;
  }

  __device__ Conv5x5Tasks(const Tiling& t, const Tile& tile)
      : t_(t),
        tile_(tile),
        groups_(ceil_div(min(t.width - tile.column, t.tile_columns + kPad) + kPad, 4) - first_group()),
        first_(threadIdx.x, groups_),
        step_(blockDim.x, groups_) {}

  // a's rows row ... row + 3, zero outside the image, from the ring of x's rows row - 2 ... row + 5, which begins at `parity`.
  __device__ void run(const Planes& xs, const Planes& as, const float* taps, int row, int parity) const {
    for (Walk task = first_; task.line() < 2 * tile_.channels; task.advance(step_, groups_)) {
      const int channel = task.line() / 2, pair = task.line() % 2 * kTaskRows;
      const int first = tile_.column - kPad + 4 * (first_group() + task.at());
      float a[kTaskRows][kTaskColumns];
      convolve<5, 2>(xs, taps + channel * kTapStride, channel, pair + parity * kRows, first, a);
#pragma unroll
      for (int o = 0; o < kTaskRows; ++o) {
        const bool inside = row + pair + o >= 0 && row + pair + o < t_.height;
        Vec<float, 4> values;
#pragma unroll
        for (int c = 0; c < kTaskColumns; ++c) values[c] = inside && first + c >= 0 && first + c < t_.width ? a[o][c] : 0.0f;
        write<4>(as(channel, pair + o, first), values);
      }
    }
  }

 private:
  __device__ int first_group() const { return tile_.column == 0 ? kPad / 4 : 0; }

  const Tiling& t_;
  const Tile& tile_;
  int groups_;
  Walk first_, step_;
};

}  // namespace segnext::cuda
