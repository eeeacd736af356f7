// What nmf's forward and backward share: the matrices cut into chunks of columns and tiles within them, and the updates.
//
// Factors are rows of vectors: C [N][padded rank], B [D][padded rank], zero beyond the rank. A step reads each tile of x once:
// it updates the tile's rows of C and adds the tile's share to x C and C^T C. Sums over N are kept per chunk and then added in
// order.
#pragma once
#include <optional>

#include "cpu/nmf_columns.h"

namespace segnext {

template <class A>
SEGNEXT_INLINE Vector<A> epsilon() {
  return broadcast(static_cast<A>(1e-6));
}

// rows [count][padded] <- softmax over the rank
template <class A>
void softmax_rows(const NmfShape<A>& s, A* rows, int64_t count) {
  for (int64_t n = 0; n < count; ++n) {
    A* row = rows + n * s.padded;
    A most = row[0];
    for (int64_t r = 1; r < s.rank; ++r) most = row[r] > most ? row[r] : most;
    for (int64_t v = 0; v < s.padded; v += kLanes<A>) store<A>(row + v, exp_negative(load<A>(row + v) - most));
    A sum = 0;
    for (int64_t r = 0; r < s.rank; ++r) sum += row[r];
    for (int64_t r = 0; r < s.padded; ++r) row[r] = r < s.rank ? row[r] / sum : 0;
  }
}

// What follows an update of C: sum x C and C^T C for the update of B, write y = B C^T (or a projection of it), or nothing.
enum class Then { kSum, kMultiply, kNothing };

// What backward needs of the factors: nothing, those around the last update of C, or those of every step.
enum class Keep { kNothing, kLast, kAll };

// The factors and the sums of a whole batch, and the two halves of a step.
template <class A>
class Nmf {
 public:
  using Accumulator = A;

  // What is kept lies in `factors`, of nmf_factors_size, or in memory of its own where that is null.
  Nmf(const Matrices& x, int64_t rank, int64_t steps, Keep keep, void* factors, const Parallel& parallel)
      : x_(x),
        s_(x, rank),
        parallel_(parallel),
        steps_(steps),
        keep_(keep),
        same_(x.dtype == Dtype::kFloat64 || x.dtype == Dtype::kFloat32),
        kept_steps_(keep == Keep::kAll ? steps : 0),
        c_size_(x.batch * s_.N * s_.padded),
        b_size_(x.batch * s_.D * s_.padded),
        c_slots_(keep == Keep::kNothing ? 1 : kept_steps_ + 2),
        c_ratio_slots_(keep == Keep::kNothing ? 0 : kept_steps_ + 1),
        own_(factors == nullptr ? size() : 0),
        c_(factors == nullptr ? own_ : static_cast<A*>(factors)),
        c_ratio_(c_ + c_slots_ * c_size_),
        b_(c_ratio_ + c_ratio_slots_ * c_size_),
        b_ratio_(b_ + (kept_steps_ + 1) * b_size_),
        xc_(x.batch * s_.chunks * s_.D * s_.padded),
        cc_(x.batch * s_.chunks * rank * s_.padded),
        bb_(x.batch * s_.row_blocks * rank * s_.padded),
        projected_(b_size_) {}

  void begin(const void* bases) {
    const A* given = static_cast<const A*>(bases);
    for (int64_t i = 0; i < x_.batch * s_.D; ++i) {
      for (int64_t r = 0; r < s_.padded; ++r) b_[i * s_.padded + r] = r < s_.rank ? given[i * s_.rank + r] : 0;
    }
    sum_bb(0);
  }

  // Of the factors that are kept, in accumulators.
  int64_t size() const { return (c_slots_ + c_ratio_slots_) * c_size_ + (2 * kept_steps_ + 1) * b_size_; }

  // All steps; y, if any, <- B C^T, or projection [D][D] times that, if any.
  void run(const void* bases, const Matrices* y = nullptr, const A* projection = nullptr) {
    begin(bases);
    for (int64_t step = 0; step < steps_; ++step) {
      update_coefficients(step, Then::kSum);
      update_bases(step, [&](int64_t image, int64_t first, int64_t rows, A*) { return xc(image, first, rows); });
    }
    project(projection);
    update_coefficients(steps_, y != nullptr ? Then::kMultiply : Then::kNothing, y);
  }

  // projection, if any, times the last B, which is then left() [D][padded].
  void project(const A* projection) {
    has_projected_ = projection != nullptr;
    if (!has_projected_) return;
    parallel_(x_.batch * s_.row_blocks, [&](Share& items) {
      for (const int64_t item : items) {
        const auto [image, first, rows] = row_block(item);
        gemm<A>({projection + first * s_.D, s_.D, 1}, rows, s_.D, last_bases(image), s_.padded, s_.vectors,
                projected_ + (image * s_.D + first) * s_.padded, s_.padded, false);
      }
    });
  }
  // What y is the product of with C^T.
  const A* left(int64_t image) { return has_projected_ ? projected_ + image * s_.D * s_.padded : last_bases(image); }

  // The factors after run: C [N][padded] and B [D][padded] of an image.
  A* last_coefficients(int64_t image) { return coefficients(steps_ + 1, image, 0); }
  const A* last_bases(int64_t image) { return bases(steps_, image); }
  const NmfShape<A>& shape() const { return s_; }

  // C of step + 1 from C and B of step.
  void update_coefficients(int64_t step, Then then, const Matrices* y = nullptr) {
    begin_pass();
    parallel_(x_.batch * s_.chunks, [&](Share& items) {
      Tile<A> x(s_);
      Buffer<A> num(s_.tile * s_.padded), den(s_.tile * s_.padded), scratch(x.scratch_size(s_));
      for (const int64_t item : items) {
        const int64_t image = item / s_.chunks;
        for_tiles_of(item, [&](int64_t first, int64_t columns, bool add) {
          take(x, image, first, columns);
          const A* b = bases(step, image);
          A *before = coefficients(step, image, first), *after = coefficients(step + 1, image, first);
          gemm<A>(x.by_column(), columns, s_.D, b, s_.padded, s_.vectors, num, s_.padded, false);
          if (step == 0) {
            std::memcpy(before, num, sizeof(A) * columns * s_.padded);
            softmax_rows<A>(s_, before, columns);
          }
          gemm<A>({before, s_.padded, 1}, columns, s_.rank, bb(image), s_.padded, s_.vectors, den, s_.padded, false);
          scale(before, num, den, columns * s_.padded, after, c_ratio(step, image, first));
          if (then == Then::kMultiply) {
            multiply(x, after, *y, image, first, columns, scratch);
          } else if (then == Then::kSum) {
            add_to_xc(x, after, columns, item, add);
            add_to_cc(after, after, columns, item, add);
          }
        });
      }
    });
  }

  // Columns of y <- left C^T
  SEGNEXT_NOINLINE void multiply(Tile<A>& tile, const A* c, const Matrices& y, int64_t image, int64_t first, int64_t columns,
                                 Buffer<A>& scratch) {
    if (same_ && !y.transposed && columns % L == 0) {  // the products are rows of y already
      transpose_rows<A>(c, s_.padded, columns, s_.rank, scratch, columns);
      gemm<A>({left(image), s_.padded, 1}, s_.D, s_.rank, scratch, columns, columns / L, matrix_of<A>(y, image) + first, s_.N,
              false);
      return;
    }
    const Pair<A> pair = {left(image), c};
    tile.product(s_, &pair, 1, columns, false, scratch);
    tile.store_to(y, image, first, columns);
  }

  // B of step + 1 from B of step and the sums over C of step + 1; x C is what products(image, first
  // row, rows, scratch) points to.
  template <class F>
  void update_bases(int64_t step, const F& products) {
    sum_chunks();
    parallel_(x_.batch * s_.row_blocks, [&](Share& items) {
      Buffer<A> den(kRowBlock * s_.padded), scratch(kRowBlock * s_.padded);
      for (const int64_t item : items) {
        const auto [image, first, rows] = row_block(item);
        const A* before = bases(step, image) + first * s_.padded;
        A* after = bases(step + 1, image) + first * s_.padded;
        gemm<A>({before, s_.padded, 1}, rows, s_.rank, cc(image), s_.padded, s_.vectors, den, s_.padded, false);
        A* ratio = keep_ == Keep::kAll ? b_ratio(step, image) + first * s_.padded : nullptr;
        scale(before, products(image, first, rows, scratch), den, rows * s_.padded, after, ratio);
      }
    });
    sum_bb(step + 1);
  }

 protected:
  static constexpr int L = kLanes<A>;

  // To be called before the tiles of a pass are taken. Where x has not its columns in one piece each, or not in accumulators,
  // gathering or widening them costs more than small products, so it is done in the first pass and kept; widened ones only
  // where that does not take fresh pages of the system in every call, which cost more than widening.
  void begin_pass() {
    constexpr int64_t kMostWidened = 20 << 20;  // bytes
    has_gathered_ = gathered_.has_value();
    const int64_t size = x_.batch * s_.N * s_.odd_row, most = kMostWidened / static_cast<int64_t>(sizeof(A));
    if (!has_gathered_ && (!x_.transposed || (!same_ && size <= most))) gathered_.emplace(size);
  }

  // The tile <- columns of x.
  void take(Tile<A>& tile, int64_t image, int64_t first, int64_t columns) const {
    if (gathered_.has_value()) {
      A* kept = *gathered_ + (image * s_.N + first) * s_.odd_row;
      if (!has_gathered_) gather_columns<A>(x_, image, first, columns, kept, s_.odd_row);
      tile.view(kept, s_.odd_row);
    } else if (same_ && !s_.conflicts(s_.D)) {
      tile.view(matrix_of<const A>(x_, image) + first * s_.D, s_.D);
    } else {
      tile.load_from(x_, image, first, columns);
    }
  }

  // after = before * num / (den + eps)
  static void scale(const A* before, const A* num, const A* den, int64_t size, A* after, A* ratio) {
    for (int64_t i = 0; i < size; i += L) {
      const Vector<A> r = load<A>(num + i) / (load<A>(den + i) + epsilon<A>());
      if (ratio != nullptr) store<A>(ratio + i, r);
      store<A>(after + i, load<A>(before + i) * r);
    }
  }

  A* coefficients(int64_t step, int64_t image, int64_t row) {
    const int64_t slot = keep_ == Keep::kAll ? step : keep_ == Keep::kLast && step > steps_;
    return c_ + slot * c_size_ + (image * s_.N + row) * s_.padded;
  }
  A* bases(int64_t step, int64_t image) { return b_ + (keep_ == Keep::kAll ? step : 0) * b_size_ + image * s_.D * s_.padded; }
  // What the updates after `step` multiply with, where that is kept.
  A* c_ratio(int64_t step, int64_t image, int64_t row) {
    if (keep_ == Keep::kNothing || (keep_ == Keep::kLast && step < steps_)) return nullptr;
    return c_ratio_ + (keep_ == Keep::kAll ? step : 0) * c_size_ + (image * s_.N + row) * s_.padded;
  }
  A* b_ratio(int64_t step, int64_t image) { return b_ratio_ + step * b_size_ + image * s_.D * s_.padded; }
  // B^T B and, after sum_chunks, C^T C (or what stands in their places): [rank][padded].
  A* bb(int64_t image) { return bb_ + image * s_.row_blocks * s_.rank * s_.padded; }
  A* cc(int64_t image) { return cc_ + image * s_.chunks * s_.rank * s_.padded; }

  // Calls f(first column, columns, not the chunk's first) for each tile of an item's chunk.
  template <class F>
  void for_tiles_of(int64_t item, const F& f) {
    const int64_t begin = item % s_.chunks * s_.chunk, end = begin + s_.chunk < s_.N ? begin + s_.chunk : s_.N;
    for (int64_t n = begin; n < end; n += s_.tile) f(n, n + s_.tile < end ? s_.tile : end - n, n > begin);
  }

  // The chunk's share of x right.
  void add_to_xc(const Tile<A>& x, const A* right, int64_t columns, int64_t item, bool add) {
    gemm<A>(x.by_row(), s_.D, columns, right, s_.padded, s_.vectors, xc_ + item * s_.D * s_.padded, s_.padded, add);
  }
  // The chunk's share of left^T right.
  void add_to_cc(const A* left, const A* right, int64_t columns, int64_t item, bool add) {
    gemm<A>({left, 1, s_.padded}, s_.rank, columns, right, s_.padded, s_.vectors, cc_ + item * s_.rank * s_.padded, s_.padded,
            add);
  }

  struct RowBlock {
    int64_t image, first, rows;
  };
  RowBlock row_block(int64_t item) const {
    const int64_t first = item % s_.row_blocks * kRowBlock;
    return {item / s_.row_blocks, first, s_.D - first < kRowBlock ? s_.D - first : kRowBlock};
  }

  // The first part becomes the sum of all, in order.
  static void sum_parts(A* parts, int64_t count, int64_t part_size, int64_t size) {
    for (int64_t part = 1; part < count; ++part) {
      for (int64_t i = 0; i < size; i += L) store<A>(parts + i, load<A>(parts + i) + load<A>(parts + part * part_size + i));
    }
  }
  void sum_chunks() {
    parallel_(x_.batch, [&](Share& items) {
      for (const int64_t image : items) sum_parts(cc(image), s_.chunks, s_.rank * s_.padded, s_.rank * s_.padded);
    });
  }
  A* xc(int64_t image, int64_t first, int64_t rows) {
    A* sum = xc_ + (image * s_.chunks * s_.D + first) * s_.padded;
    sum_parts(sum, s_.chunks, s_.D * s_.padded, rows * s_.padded);
    return sum;
  }
  // bb <- left^T right, over the rows of two matrices like B
  void sum_rows(const A* left, const A* right) {
    parallel_(x_.batch * s_.row_blocks, [&](Share& items) {
      for (const int64_t item : items) {
        const auto [image, first, rows] = row_block(item);
        const int64_t at = (image * s_.D + first) * s_.padded;
        gemm<A>({left + at, 1, s_.padded}, s_.rank, rows, right + at, s_.padded, s_.vectors, bb_ + item * s_.rank * s_.padded,
                s_.padded, false);
      }
    });
    parallel_(x_.batch, [&](Share& items) {
      for (const int64_t image : items) sum_parts(bb(image), s_.row_blocks, s_.rank * s_.padded, s_.rank * s_.padded);
    });
  }
  void sum_bb(int64_t step) { sum_rows(bases(step, 0), bases(step, 0)); }

  const Matrices& x_;
  const NmfShape<A> s_;
  const Parallel& parallel_;
  const int64_t steps_;
  const Keep keep_;
  const bool same_;  // x is of accumulators
  const int64_t kept_steps_, c_size_, b_size_, c_slots_, c_ratio_slots_;

 private:
  Buffer<A> own_;
  A *const c_, *const c_ratio_, *const b_, *const b_ratio_;

 protected:
  Buffer<A> xc_, cc_, bb_, projected_;
  std::optional<Buffer<A>> gathered_;
  bool has_gathered_ = false, has_projected_ = false;
};

}  // namespace segnext
