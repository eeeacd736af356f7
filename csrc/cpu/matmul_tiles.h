// The operands of products and the micro-kernel that multiplies them in registers. Part of matmul.h.
//
// A panel holds 32 columns of the weights, so that a tile of 8 rows by 2 vectors (3 by 4 where there are 16 registers) is
// summed in registers while its operands come from the first two caches. Every sum runs over the depth in order, wherever the
// tiles begin.
#pragma once
#include <algorithm>

#include "cpu/image.h"
#include "cpu/kernels.h"

namespace segnext {

// Calls f<T>() with the type T that products are stored in: float or BFloat16.
template <class F>
void with_dense_type(Dtype dtype, const F& f) {
  dtype == Dtype::kBFloat16 ? f.template operator()<BFloat16>() : f.template operator()<float>();
}

inline constexpr int64_t whole_panels(int64_t columns) { return round_up(columns, kPanel); }

inline constexpr int kTileRows = kRegisters == 32 ? 8 : 3;  // what the registers hold of that many vectors each
inline constexpr int kTileVectors = kRegisters == 32 ? 2 : 4;

// bfloat16 is multiplied in pairs by the processor's dot products where it has them; elsewhere it is widened first.
#if defined(__AVX512BF16__)
template <class T>
using Operand = T;
#else
template <class T>
using Operand = float;
#endif

// Weights in panels, zero past the last column: float [panels][depth][32], bfloat16 [panels][depth / 2, rounded up][32][2].
template <class T>
struct Packed {
  const T* data;
  int64_t depth, columns, panel_size;

  Packed(const T* data, int64_t depth, int64_t columns)
      : data(data), depth(depth), columns(columns), panel_size((depth + depth % step()) * kPanel) {}
  static constexpr int step() { return std::is_same_v<T, float> ? 1 : 2; }
  // Some rows of the weights, the first of them even; some columns, the first of them a panel's.
  Packed rows(int64_t first, int64_t last) const { return {data + first * kPanel, last - first, columns, panel_size}; }
  Packed from_column(int64_t first, int64_t last) const {
    return {data + first / kPanel * panel_size, depth, last - first, panel_size};
  }

 private:
  Packed(const T* data, int64_t depth, int64_t columns, int64_t panel_size)
      : data(data), depth(depth), columns(columns), panel_size(panel_size) {}
};

// What the depth of a product is filled up to with zeros: pairs for dot products, whole tiles for AMX.
#if defined(__AMX_BF16__)
template <class T>
inline constexpr int kDepthStep = std::is_same_v<T, float> ? 1 : 32;
#else
template <class T>
inline constexpr int kDepthStep = Packed<Operand<T>>::step();
#endif

template <class T>
constexpr int64_t filled(int64_t depth) {
  return round_up(depth, kDepthStep<T>);
}

// Rows of pixels, `depth` elements each, `row` elements apart; `zeros`: each row has zeros up to the filled depth.
template <class T>
struct Pixels {
  const T* data;
  int64_t row, count, depth;
  bool zeros = false;
};

// One element of the left side in all lanes, or one pair.
SEGNEXT_INLINE Vector<float> repeat(const float* left) { return broadcast(*left); }
// sum += the product of what is repeated with a vector of the right side, or of pairs.
SEGNEXT_INLINE void multiply_add(Vector<float>& sum, Vector<float> left, const float* right) {
  sum += left * load<float>(right);
}

#if defined(__AVX512BF16__)
SEGNEXT_INLINE __m512i repeat(const BFloat16* left) {
  int32_t pair;
  std::memcpy(&pair, left, sizeof pair);
  return _mm512_set1_epi32(pair);
}
SEGNEXT_INLINE void multiply_add(Vector<float>& sum, __m512i left, const BFloat16* right) {
  const __m512 dot = _mm512_dpbf16_ps(bit_cast<__m512>(sum), (__m512bh)left, (__m512bh)_mm512_loadu_si512(right));
  sum = bit_cast<Vector<float>>(dot);
}
#endif

// The left side of a tile: rows `row` elements apart, whose elements follow each other or lie at `offsets`.
template <class O>
struct DenseRows {
  const O* data;
  int64_t row;
  const O* element(int64_t m, int64_t k) const { return data + m * row + k; }
  DenseRows from(int64_t m) const { return {data + m * row, row}; }
};
struct ScatteredRows {
  const float* data;
  int64_t row;
  const int64_t* offsets;
  const float* element(int64_t m, int64_t k) const { return data + m * row + offsets[k]; }
  ScatteredRows from(int64_t m) const { return {data + m * row, row, offsets}; }
};

// acc[v][m] += row m of left [M][depth] * vector v of a panel
template <int M, class R, class O>
SEGNEXT_INLINE void multiply_tile(const R left, const O* right, int64_t depth, Vector<float> (&acc)[kTileVectors][M]) {
  constexpr int step = Packed<O>::step();
  for (int64_t k = 0; k < depth; k += step, right += step * kPanel) {
    auto add = [&](int v, int m, auto repeated) { multiply_add(acc[v][m], repeated, right + v * kLanes<float> * step); };
    if constexpr (kTileVectors <= kTileRows) {  // the vectors stay in registers, and each element meets them as it is read
      SEGNEXT_UNROLL
      for (int m = 0; m < M; ++m) {
        SEGNEXT_UNROLL
        for (int v = 0; v < kTileVectors; ++v) add(v, m, repeat(left.element(m, k)));
      }
    } else {
      decltype(repeat(right)) repeated[M];
      SEGNEXT_UNROLL
      for (int m = 0; m < M; ++m) repeated[m] = repeat(left.element(m, k));
      SEGNEXT_UNROLL
      for (int v = 0; v < kTileVectors; ++v) {
        SEGNEXT_UNROLL
        for (int m = 0; m < M; ++m) add(v, m, repeated[m]);
      }
    }
  }
}

// As a function of its own: its callers are so long that GCC does not spare 16 registers for the sums.
template <int M, class R, class O>
SEGNEXT_NOINLINE void multiply_tile_alone(const R& left, const O* right, int64_t depth,
                                          Vector<float> (&sums)[kTileVectors][M]) {
  Vector<float> acc[kTileVectors][M] = {};
  multiply_tile<M>(left, right, depth, acc);
  SEGNEXT_UNROLL
  for (int v = 0; v < kTileVectors; ++v) {
    SEGNEXT_UNROLL
    for (int m = 0; m < M; ++m) sums[v][m] = acc[v][m];
  }
}

// sums <- a tile
template <int M, class R, class O>
SEGNEXT_INLINE void sum_tile(const R& left, const O* right, int64_t depth, Vector<float> (&sums)[kTileVectors][M]) {
  if constexpr (kRegisters == 32) {
    SEGNEXT_UNROLL
    for (int v = 0; v < kTileVectors; ++v) {
      SEGNEXT_UNROLL
      for (int m = 0; m < M; ++m) sums[v][m] = Vector<float>{};
    }
    multiply_tile<M>(left, right, depth, sums);
  } else {
    multiply_tile_alone<M>(left, right, depth, sums);
  }
}

// The left side of a product in the form that the micro-kernels take: as it is, or in scratch memory, widened or filled up with
// zeros to a depth.
template <class A, class O>
class LeftOperand {
 public:
  LeftOperand(const Pixels<A>& a, int64_t depth)
      : staged_(!std::is_same_v<A, O> || (depth != a.depth && !a.zeros)),
        rows_(staged_ ? a.count * depth : 0),
        dense_{rows_, staged_ ? depth : a.row} {
    if constexpr (std::is_same_v<A, O>) {
      if (!staged_) dense_.data = a.data;
    }
    for (int64_t m = 0; staged_ && m < a.count; ++m) {
      copy_elements(a.data + m * a.row, a.depth, rows_ + m * depth);
      std::fill(rows_ + m * depth + a.depth, rows_ + (m + 1) * depth, O{});
    }
  }
  const DenseRows<O>& rows() const { return dense_; }

 private:
  const bool staged_;
  Buffer<O> rows_;
  DenseRows<O> dense_;
};

// The right side's panels likewise.
template <class T>
class RightOperand {
  typedef Operand<T> O;
  static constexpr bool kSame = std::is_same_v<O, T>;

 public:
  RightOperand(const Packed<T>& w, int64_t depth)
      : w_(w), depth_(depth), panel_(kSame && depth_ == packed_depth() ? 0 : std::max(depth_, packed_depth()) * kPanel) {}
  const O* operator()(int64_t p) const {
    const T* panel = w_.data + p * w_.panel_size;
    if constexpr (kSame) {
      if (depth_ == packed_depth()) return panel;
      std::memcpy(panel_, panel, sizeof(T) * packed_depth() * kPanel);
      std::memset(panel_ + packed_depth() * kPanel, 0, sizeof(T) * (depth_ - packed_depth()) * kPanel);
      return panel_;
    } else {
      typedef VectorN<uint32_t, kLanes<float>> Pairs;
      for (int64_t i = 0; i < packed_depth() * kPanel; i += 2 * kLanes<float>) {
        Pairs pairs;
        std::memcpy(&pairs, panel + i, sizeof pairs);
        O* even = panel_ + i / (2 * kPanel) * 2 * kPanel + i % (2 * kPanel) / 2;
        store<float>(even, bit_cast<Vector<float>>(pairs << 16));
        store<float>(even + kPanel, bit_cast<Vector<float>>(pairs & 0xffff0000u));
      }
      return panel_;
    }
  }

 private:
  int64_t packed_depth() const { return w_.depth + w_.depth % Packed<T>::step(); }

  const Packed<T> w_;
  const int64_t depth_;
  Buffer<O> panel_;
};

// Both sides of one product.
template <class T, class A = T>
class Operands {
 public:
  Operands(const Pixels<A>& a, const Packed<T>& w) : depth_(filled<T>(a.depth)), left_(a, depth_), right_(w, depth_) {}
  int64_t depth() const { return depth_; }
  const DenseRows<Operand<T>>& rows() const { return left_.rows(); }
  const Operand<T>* left() const { return rows().data; }
  int64_t row() const { return rows().row; }
  const Operand<T>* panel(int64_t p) const { return right_(p); }

 private:
  const int64_t depth_;
  const LeftOperand<A, Operand<T>> left_;
  const RightOperand<T> right_;
};

// Calls f(first row, number of rows as an integral constant) for tiles of `rows` rows.
template <class F>
SEGNEXT_INLINE void for_row_tiles(int64_t rows, const F& f) {
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows) f(m, std::integral_constant<int, kTileRows>{});
  constexpr int kPart = kTileRows > 4 ? 4 : 2;
  for (; m + kPart <= rows; m += kPart) f(m, std::integral_constant<int, kPart>{});
  for (; m < rows; ++m) f(m, std::integral_constant<int, 1>{});
}

// Asks for memory that will soon be read, a share at a time.
class Ahead {
 public:
  Ahead(const void* data, int64_t bytes, int64_t shares)
      : at_(static_cast<const char*>(data)),
        end_(at_ + bytes),
        share_((bytes / std::max<int64_t>(shares, 1) / kLine + 1) * kLine) {}
  SEGNEXT_INLINE void fetch() {
    const char* stop = std::min(at_ + share_, end_);
    for (; at_ < stop; at_ += kLine) __builtin_prefetch(at_, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64;
  const char *at_, *end_;
  const int64_t share_;
};

// Calls f(first row, number of rows as an integral constant, first column, sums [kTileVectors][rows]) for every tile of
// `count` rows times w, whose panels panel(p) gives. Meanwhile the caches fetch the next one, which would else come from afar
// where images are small.
template <class T, class R, class P, class F>
SEGNEXT_INLINE void for_panel_tiles(const R& left, int64_t count, int64_t depth, const Packed<T>& w, const P& panel,
                                    const F& f) {
  for (int64_t first = 0; first < w.columns; first += kPanel) {
    const auto* right = panel(first / kPanel);
    const bool last = first + kPanel >= w.columns;
    Ahead next(w.data + (first / kPanel + 1) * w.panel_size, last ? 0 : w.depth * kPanel * sizeof(T), count / kTileRows);
    for_row_tiles(count, [&](int64_t m, auto rows) {
      next.fetch();
      for (int column = 0; column < kPanel; column += kTileVectors * kLanes<float>) {
        Vector<float> acc[kTileVectors][rows];
        sum_tile<rows>(left.from(m), right + column * Packed<Operand<T>>::step(), depth, acc);
        f(m, rows, first + column, acc);
      }
    });
  }
}

template <class A, class T, class F>
SEGNEXT_INLINE void for_product_tiles(const Pixels<A>& a, const Packed<T>& w, const F& f) {
  const Operands<T, A> operands(a, w);
  for_panel_tiles(operands.rows(), a.count, operands.depth(), w, [&](int64_t p) { return operands.panel(p); }, f);
}

}  // namespace segnext
