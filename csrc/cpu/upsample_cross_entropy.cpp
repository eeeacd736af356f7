// upsample_cross_entropy: the mean cross-entropy of bilinearly upsampled logits, which exist a tile at a time.
//
// Backward computes the upsampled logits and their softmax again, and gathers its gradient for the two rows of logits around a
// gap in cache before it goes to these rows' columns. Items write to rows of their own, which are then summed in order.
#include <cmath>
#include <stdexcept>
#include <string>

#include "cpu/upsample.h"

namespace segnext {
namespace {

// The classes and weights at one output row of a tile; ignored pixels, and lanes past the last column, have weight 0.
template <class A>
struct LaneTargets {
  int64_t label[kLanes<A>] = {};
  A weight[kLanes<A>] = {};
};

// What an item adds up.
struct Sums {
  double loss = 0, weight = 0;
  bool in_range = true;

  void add(const Sums& other) {
    loss += other.loss;
    weight += other.weight;
    in_range = in_range && other.in_range;
  }
};

template <class A>
LaneTargets<A> lane_targets(const Targets& targets, int64_t classes, const UpsampledTile<A>& tile, int64_t row, Sums& sums) {
  const int64_t* from = targets.labels + (tile.image * targets.height + row) * targets.width + tile.column;
  LaneTargets<A> found;
  for (int lane = 0; lane < tile.lanes; ++lane) {
    const int64_t label = from[lane];
    if (label == targets.ignored) continue;
    if (label < 0 || label >= classes) {
      sums.in_range = false;
      continue;
    }
    found.label[lane] = label;
    found.weight[lane] = targets.weights == nullptr ? 1 : static_cast<const A*>(targets.weights)[label];
    sums.weight += found.weight[lane];
  }
  return found;
}

// The largest of the classes' upsampled logits at one row of a tile.
template <class A>
SEGNEXT_INLINE Vector<A> largest(const UpsampledTile<A>& tile, A weight, int64_t classes) {
  constexpr int L = kLanes<A>, kChains = 4;
  Vector<A> most[kChains];
  SEGNEXT_UNROLL
  for (int i = 0; i < kChains; ++i) most[i] = load<A>(tile.upper) + weight * load<A>(tile.step);
  auto take = [&](int64_t c, int chain) {
    const Vector<A> z = load<A>(tile.upper + c * L) + weight * load<A>(tile.step + c * L);
    most[chain] = z > most[chain] ? z : most[chain];
  };
  int64_t c = 0;
  for (; c + kChains <= classes; c += kChains) {
    SEGNEXT_UNROLL
    for (int i = 0; i < kChains; ++i) take(c + i, i);
  }
  for (; c < classes; ++c) take(c, 0);
  SEGNEXT_UNROLL
  for (int i = 1; i < kChains; ++i) most[0] = most[i] > most[0] ? most[i] : most[0];
  return most[0];
}

// Calls f(c * kLanes, exp(z - most)) for the classes' upsampled logits z and returns the sum of these.
template <class A, class F>
SEGNEXT_INLINE Vector<A> exponentials(const UpsampledTile<A>& tile, A weight, int64_t classes, Vector<A> most, const F& f) {
  constexpr int L = kLanes<A>;
  Vector<A> sum = {};
  for (int64_t at = 0; at < classes * L; at += L) {
    const Vector<A> z = load<A>(tile.upper + at) + weight * load<A>(tile.step + at);
    const Vector<A> e = exp_negative(z - most);
    f(at, e);
    sum += e;
  }
  return sum;
}

template <class A>
void add_losses(const Upsampling<A>& up, const Targets& targets, const UpsampledTile<A>& tile, Sums& sums) {
  constexpr int L = kLanes<A>;
  for (int64_t row = tile.first_row; row < tile.last_row; ++row) {
    const A weight = up.rows[row].weight;
    const Vector<A> most = largest(tile, weight, up.logits.channels);
    const Vector<A> sum = exponentials(tile, weight, up.logits.channels, most, [](int64_t, Vector<A>) {});
    const LaneTargets<A> target = lane_targets(targets, up.logits.channels, tile, row, sums);
    for (int lane = 0; lane < tile.lanes; ++lane) {
      if (target.weight[lane] == 0) continue;
      const int64_t at = target.label[lane] * L + lane;
      const A z = tile.upper[at] + weight * tile.step[at];
      sums.loss += static_cast<double>(target.weight[lane] * (most[lane] - z + std::log(sum[lane])));
    }
  }
}

// upper, lower [classes][kLanes] <- the gradient of the sum of losses for the tile's two resized rows; exps is scratch memory.
template <class A>
void tile_gradient(const Upsampling<A>& up, const Targets& targets, const UpsampledTile<A>& tile, Sums& sums, A* exps, A* upper,
                   A* lower) {
  constexpr int L = kLanes<A>;
  const int64_t classes = up.logits.channels;
  std::memset(upper, 0, sizeof(A) * up.groups * L * L);
  std::memset(lower, 0, sizeof(A) * up.groups * L * L);
  for (int64_t row = tile.first_row; row < tile.last_row; ++row) {
    const A weight = up.rows[row].weight;
    const Vector<A> most = largest(tile, weight, classes);
    const Vector<A> sum = exponentials(tile, weight, classes, most, [&](int64_t at, Vector<A> e) { store<A>(exps + at, e); });
    const LaneTargets<A> target = lane_targets(targets, classes, tile, row, sums);
    for (int lane = 0; lane < tile.lanes; ++lane) {
      if (target.weight[lane] != 0) exps[target.label[lane] * L + lane] -= sum[lane];
    }
    const Vector<A> scale = load<A>(target.weight) / sum;
    for (int64_t at = 0; at < classes * L; at += L) {
      const Vector<A> g = load<A>(exps + at) * scale;
      store<A>(upper + at, load<A>(upper + at) + g);
      store<A>(lower + at, load<A>(lower + at) + weight * g);
    }
  }
  for (int64_t at = 0; at < classes * L; at += L) store<A>(upper + at, load<A>(upper + at) - load<A>(lower + at));
}

// row [groups][width][kLanes] += the transpose of the horizontal resizing of gradient [classes][kLanes]
template <class A>
void add_columns(const Upsampling<A>& up, int64_t column, const A* gradient, A* row) {
  constexpr int L = kLanes<A>;
  for (int64_t g = 0; g < up.groups; ++g, gradient += L * L, row += up.logits.width * L) {
    Vector<A> block[L];
    for (int i = 0; i < L; ++i) block[i] = load<A>(gradient + i * L);
    transpose<A>(block);
    for (int i = 0; i < L; ++i) {
      const Sample<A>& s = up.columns[column + i];
      const Vector<A> high = s.weight * block[i];
      store<A>(row + s.low * L, load<A>(row + s.low * L) + (block[i] - high));
      store<A>(row + s.high * L, load<A>(row + s.high * L) + high);
    }
  }
}

// Runs f(tiles, item, its sums) for all items and returns the whole.
template <class A, class F>
Sums for_items(const Upsampling<A>& up, const Parallel& parallel, const F& f) {
  std::vector<Sums> sums(up.items);
  parallel(up.items, [&](Share& items) {
    UpsampledTiles<A> tiles(up);
    for (const int64_t item : items) f(tiles, item, sums[item]);
  });
  Sums all;
  for (const Sums& item : sums) all.add(item);
  if (!all.in_range) {
    throw std::runtime_error("segnext_kernels: target has labels that are neither ignore_index nor in the range [0, " +
                             std::to_string(up.logits.channels) + ")");
  }
  return all;
}

// The gradient of one row of logits: what its own item has, and what the item before left for it. partial holds for every item
// a row for each of its gaps and one for the end of the last.
template <class A>
void sum_row(const Upsampling<A>& up, const A* partial, int64_t n, int64_t row, A factor, A* out) {
  constexpr int64_t kRows = Upsampling<A>::kRows;
  const int64_t size = up.row_size(), block = row / kRows;
  const A* own = partial + ((n * up.blocks + block) * (kRows + 1) + row % kRows) * size;
  const A* before = row % kRows == 0 && row > 0 ? own - size : nullptr;
  const A* end = row + 1 == up.logits.height ? own + size : nullptr;  // past the last row the last is taken
  for (int64_t i = 0; i < size; i += kLanes<A>) {
    Vector<A> sum = load<A>(own + i);
    if (before != nullptr) sum += load<A>(before + i);
    if (end != nullptr) sum += load<A>(end + i);
    store<A>(out + i, sum * factor);
  }
}

}  // namespace

double upsample_cross_entropy_forward(const Image& logits, const Targets& targets, const Parallel& parallel) {
  Sums all;
  with_accumulator(logits.dtype, [&]<class A>() {
    const Upsampling<A> up(logits, targets.height, targets.width);
    all = for_items(up, parallel, [&](UpsampledTiles<A>& tiles, int64_t item, Sums& sums) {
      tiles.run(item, [&](const UpsampledTile<A>& tile) { add_losses(up, targets, tile, sums); });
    });
  });
  return all.weight == 0 ? 0.0 : all.loss / all.weight;
}

void upsample_cross_entropy_backward(double grad_out, const Image& logits, const Targets& targets, const Image& grad_logits,
                                     const Parallel& parallel) {
  with_accumulator(logits.dtype, [&]<class A>() {
    constexpr int L = kLanes<A>;
    const Upsampling<A> up(logits, targets.height, targets.width);
    const int64_t size = up.row_size(), item_size = (up.kRows + 1) * size;
    Buffer<A> partial(logits.images * up.blocks * item_size);
    if (up.items == 0) std::memset(partial, 0, sizeof(A) * logits.images * up.blocks * item_size);
    const Sums all = for_items(up, parallel, [&](UpsampledTiles<A>& tiles, int64_t item, Sums& sums) {
      Buffer<A> scratch(3 * up.groups * L * L);
      A *upper = scratch, *lower = upper + up.groups * L * L, *exps = lower + up.groups * L * L,
        *rows = partial + item * item_size;
      std::memset(rows, 0, sizeof(A) * item_size);
      tiles.run(item, [&](const UpsampledTile<A>& tile) {
        tile_gradient(up, targets, tile, sums, exps, upper, lower);
        A* row = rows + tile.gap % up.kRows * size;
        add_columns(up, tile.column, upper, row);
        add_columns(up, tile.column, lower, row + size);
      });
    });
    const A factor = all.weight == 0 ? A(0) : static_cast<A>(grad_out / all.weight);
    parallel(logits.images * logits.height, [&](Share& items) {
      Buffer<A> out(size);
      for (const int64_t i : items) {
        sum_row<A>(up, partial, i / logits.height, i % logits.height, factor, out);
        store_row<A>(grad_logits, i / logits.height, 0, i % logits.height, out, up.groups, logits.width * L);
      }
    });
  });
}

}  // namespace segnext
