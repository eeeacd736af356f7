// How nmf cuts a matrix into chunks and tiles of columns, and how a tile comes to lie as the products want it: [columns][D].
#pragma once
#include <algorithm>
#include <numeric>

#include "cpu/gemm.h"
#include "cpu/kernels.h"

namespace segnext {

inline constexpr int64_t kRowBlock = 64;  // rows of B that are one item

// One matrix' share of the work, by its shape alone.
template <class A>
struct NmfShape {
  int64_t D, N, rank, vectors, padded;  // padded: the rank in whole vectors
  int64_t chunk, chunks, tile, row_blocks;
  int64_t odd_row;  // elements of a column in a copy: an odd number of vectors, for the caches' sake

  NmfShape(const Matrices& x, int64_t rank_) : D(x.rows), N(x.columns), rank(rank_) {
    constexpr int L = kLanes<A>;
    vectors = ceil_div(rank, L);
    padded = vectors * L;
    chunk = N / 16 > 128 ? round_up(ceil_div(N, 16), 32) : 128;
    chunks = ceil_div(N, chunk);
    const int64_t fits = 49152 / (D > 0 ? D : 1);  // a tile of x takes about 200 KB in float
    const int64_t most = fits < 32 ? 32 : fits;
    const int64_t tiles = ceil_div(chunk, most);
    tile = round_up(ceil_div(chunk, tiles), L);
    row_blocks = ceil_div(D, kRowBlock);
    odd_row = (ceil_div(D, L) | 1) * L;
  }
  // Whether the columns that a product reads side by side would drive each other out of the first cache, `row` elements apart.
  bool conflicts(int64_t row) const {
    constexpr int64_t kPeriod = 4096, kWays = 6;  // bytes between addresses that share a set, lines in a set and some to spare
    const int64_t together = rows_together(vectors >= 4 ? 4 : vectors >= 2 ? 2 : 1);
    return together > kWays * kPeriod / std::gcd(kPeriod, row * static_cast<int64_t>(sizeof(A)));
  }
};

template <class A>
inline int lanes_of(int64_t left) {
  return static_cast<int>(left < kLanes<A> ? left : kLanes<A>);
}

// The first of an image's elements.
template <class T>
T* matrix_of(const Matrices& x, int64_t image) {
  return static_cast<T*>(x.data) + image * x.rows * x.columns;
}

// out [columns][out_row] <- some columns of x; out_row are whole vectors
template <class A>
void gather_columns(const Matrices& x, int64_t image, int64_t first, int64_t columns, A* out, int64_t out_row) {
  with_storage<A>(x.dtype, [&]<class T>() {
    const auto* from = matrix_of<T>(x, image) + first * (x.transposed ? x.rows : 1);
    if (!x.transposed) {
      for (int64_t d = 0; d < x.rows; d += kLanes<A>)
        gather_channels<A>(from + d * x.columns, x.columns, x.rows - d, columns, out + d, out_row);
      return;
    }
    for (int64_t n = 0; n < columns; ++n) {
      for (int64_t d = 0; d < x.rows; d += kLanes<A>)
        store<A>(out + n * out_row + d, load_lanes<A>(from + n * x.rows + d, lanes_of<A>(x.rows - d)));
    }
  });
}

// The reverse.
template <class A>
void scatter_columns(const Matrices& x, int64_t image, int64_t first, int64_t columns, const A* in, int64_t in_row) {
  with_storage<A>(x.dtype, [&]<class T>() {
    auto* to = matrix_of<T>(x, image) + first;
    for (int64_t d = 0; d < x.rows; d += kLanes<A>)
      scatter_channels<A>(in + d, in_row, columns, to + d * x.columns, x.columns, x.rows - d);
  });
}

// Two factors of which left [D][padded] * right [columns][padded]^T is wanted.
template <class A>
struct Pair {
  const A *left, *right;
};

// Some columns of a matrix as accumulators [columns][D]: a view of where they lie so, or a copy.
template <class A>
class Tile {
 public:
  explicit Tile(const NmfShape<A>& shape) : D_(shape.D), row_(shape.odd_row), data_(shape.tile * row_) {}

  void view(const A* columns, int64_t row) { values_ = {columns, row, 1}; }

  void load_from(const Matrices& x, int64_t image, int64_t first, int64_t columns) {
    view(data_, row_);
    gather_columns<A>(x, image, first, columns, data_, row_);
  }

  void store_to(const Matrices& x, int64_t image, int64_t first, int64_t columns) const {
    if (!x.transposed) return scatter_columns<A>(x, image, first, columns, data_, row_);
    with_storage<A>(x.dtype, [&]<class T>() {
      auto* to = matrix_of<T>(x, image) + first * D_;
      for (int64_t n = 0; n < columns; ++n) {
        for (int64_t d = 0; d < D_; d += kLanes<A>)
          store_lanes<A>(to + n * D_ + d, load<A>(data_ + n * row_ + d), lanes_of<A>(D_ - d));
      }
    });
  }

  Strided<A> by_row() const { return {values_.data, 1, values_.row}; }
  Strided<A> by_column() const { return values_; }

  // The copy (+)= the sum of left [D][padded] * right [columns][padded]^T over some pairs, no more than the scratch is for:
  // one product of their depths together, so that the sums stay in registers.
  void product(const NmfShape<A>& s, const Pair<A>* pairs, int64_t count, int64_t columns, bool add, Buffer<A>& scratch) {
    const int64_t depth = count * s.rank;
    A* rights = scratch + depth * row_;
    for (int64_t i = 0; i < count; ++i) {
      transpose_rows<A>(pairs[i].left, s.padded, D_, s.rank, scratch + i * s.rank * row_, row_);
      for (int64_t n = 0; count > 1 && n < columns; ++n)
        std::memcpy(rights + n * depth + i * s.rank, pairs[i].right + n * s.padded, sizeof(A) * s.rank);
    }
    const Strided<A> right = count > 1 ? Strided<A>{rights, depth, 1} : Strided<A>{pairs[0].right, s.padded, 1};
    gemm<A>(right, columns, depth, scratch, row_, row_ / kLanes<A>, data_, row_, add);
  }
  int64_t scratch_size(const NmfShape<A>& s, int64_t pairs = 1) const { return pairs * s.rank * (row_ + s.tile); }

 private:
  const int64_t D_, row_;
  Buffer<A> data_;
  Strided<A> values_ = {};
};

}  // namespace segnext
