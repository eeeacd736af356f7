// Products of pixels [rows][depth] with packed weights [depth][columns], accumulated in float.
//
// A panel holds 32 columns of the weights, so that a tile of 8 rows by 32 columns is summed in registers while its operands
// come from the first two caches. Every sum runs over the depth in order, wherever the tiles begin.
#pragma once
#include "cpu/image.h"

namespace segnext {

inline constexpr int kPanel = 32;                           // columns that are packed together
inline constexpr int kTileRows = kRegisters == 32 ? 8 : 4;  // what the registers hold of two vectors each
inline constexpr int kTileVectors = 2;

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
  return (depth + kDepthStep<T> - 1) / kDepthStep<T> * kDepthStep<T>;
}

// Rows of pixels, `depth` elements each, `row` elements apart; `zeros`: each row has zeros up to the filled depth.
template <class T>
struct Pixels {
  const T* data;
  int64_t row, count, depth;
  bool zeros = false;
};

// sum += the product of one element of the left side with a vector of the right, or of a pair with a vector of pairs.
SEGNEXT_INLINE void multiply_add(Vector<float>& sum, const float* left, const float* right) {
  sum += *left * load<float>(right);
}

#if defined(__AVX512BF16__)
SEGNEXT_INLINE void multiply_add(Vector<float>& sum, const BFloat16* left, const BFloat16* right) {
  int32_t pair;
  std::memcpy(&pair, left, sizeof pair);
  const __m512 dot =
      _mm512_dpbf16_ps(bit_cast<__m512>(sum), (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(right));
  sum = bit_cast<Vector<float>>(dot);
}
#endif

// acc[v][m] += row m of left [M][depth] * vector v of a panel
template <int M, class O>
SEGNEXT_INLINE void multiply_tile(const O* left, int64_t left_row, const O* right, int64_t depth,
                                  Vector<float> (&acc)[kTileVectors][M]) {
  constexpr int step = Packed<O>::step();
  for (int64_t k = 0; k < depth; k += step, right += step * kPanel) {
    SEGNEXT_UNROLL
    for (int m = 0; m < M; ++m) {
      SEGNEXT_UNROLL
      for (int v = 0; v < kTileVectors; ++v) multiply_add(acc[v][m], left + m * left_row + k, right + v * kLanes<float> * step);
    }
  }
}

// The operands of one product in the form that the micro-kernels take: as they are, or in scratch memory, widened or filled up
// with zeros.
template <class T>
class Operands {
  typedef Operand<T> O;
  static constexpr bool kSame = std::is_same_v<O, T>;

 public:
  Operands(const Pixels<T>& a, const Packed<T>& w)
      : w_(w),
        depth_(filled<T>(a.depth)),
        staged_(!kSame || (depth_ != a.depth && !a.zeros)),
        left_(staged_ ? a.count * depth_ : 0),
        panel_(kSame && depth_ == packed_depth() ? 0 : depth_ * kPanel),
        data_(nullptr),
        row_(staged_ ? depth_ : a.row) {
    if constexpr (kSame) data_ = a.data;
    if (!staged_) return;
    for (int64_t m = 0; m < a.count; ++m) copy(a.data + m * a.row, a.depth, left_ + m * depth_);
    data_ = left_;
  }
  const O* left() const { return data_; }
  int64_t row() const { return row_; }
  int64_t depth() const { return depth_; }
  const O* panel(int64_t p) const {
    const T* panel = w_.data + p * w_.panel_size;
    if constexpr (kSame) {
      if (depth_ == packed_depth()) return panel;
      std::memcpy(panel_, panel, sizeof(T) * packed_depth() * kPanel);
      std::memset(panel_ + packed_depth() * kPanel, 0, sizeof(T) * (depth_ - packed_depth()) * kPanel);
      return panel_;
    } else {
      for (int64_t k = 0; k < depth_; ++k) {
        for (int i = 0; i < kPanel; ++i) panel_[k * kPanel + i] = widen(panel[(k / 2 * kPanel + i) * 2 + k % 2]);
      }
      return panel_;
    }
  }

 private:
  int64_t packed_depth() const { return w_.depth + w_.depth % Packed<T>::step(); }
  void copy(const T* from, int64_t count, O* to) {
    for (int64_t k = 0; k < count; ++k) {
      if constexpr (kSame) {
        to[k] = from[k];
      } else {
        to[k] = widen(from[k]);
      }
    }
    for (int64_t k = count; k < depth_; ++k) to[k] = O{};
  }

  const Packed<T> w_;
  const int64_t depth_;
  const bool staged_;
  Buffer<O> left_, panel_;
  const O* data_;
  const int64_t row_;
};

// Calls f(first row, number of rows as an integral constant) for tiles of `rows` rows.
template <class F>
SEGNEXT_INLINE void for_row_tiles(int64_t rows, const F& f) {
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows) f(m, std::integral_constant<int, kTileRows>{});
  if constexpr (kTileRows > 4) {
    for (; m + 4 <= rows; m += 4) f(m, std::integral_constant<int, 4>{});
  }
  for (; m < rows; ++m) f(m, std::integral_constant<int, 1>{});
}

// Calls f(first row, number of rows as an integral constant, first column, sums [kTileVectors][rows]) for every tile of a * w.
template <class T, class F>
SEGNEXT_INLINE void for_product_tiles(const Pixels<T>& a, const Packed<T>& w, const F& f) {
  const Operands<T> operands(a, w);
  for (int64_t first = 0; first < w.columns; first += kPanel) {
    const auto* panel = operands.panel(first / kPanel);
    for_row_tiles(a.count, [&](int64_t m, auto rows) {
      for (int column = 0; column < kPanel; column += kTileVectors * kLanes<float>) {
        Vector<float> acc[kTileVectors][rows] = {};
        multiply_tile<rows>(operands.left() + m * operands.row(), operands.row(), panel + column * Packed<Operand<T>>::step(),
                            operands.depth(), acc);
        f(m, rows, first + column, acc);
      }
    });
  }
}

}  // namespace segnext

#if defined(__AMX_BF16__)
#include "cpu/matmul_amx.h"
#include "cpu/matmul_split.h"
#endif

namespace segnext {

// The two sides of a product in the form that the functions below take, each made of one of the structures above once for as
// many products as it serves: float is split into bfloat16 where the processor has tiles for these.
#if defined(__AMX_BF16__)
template <class T>
using Left = std::conditional_t<std::is_same_v<T, float>, SplitPixels, Pixels<T>>;
template <class T>
using Weights = std::conditional_t<std::is_same_v<T, float>, SplitWeights, Packed<T>>;
#else
template <class T>
using Left = Pixels<T>;
template <class T>
using Weights = Packed<T>;
#endif

// `once`: for one product of at most kPixels pixels.
template <class T>
Weights<T> prepared(const Packed<T>& w, bool once) {
  if constexpr (std::is_same_v<Weights<T>, Packed<T>>) {
    return w;
  } else {
    return Weights<T>(w, once);
  }
}

inline constexpr int64_t kPixels = 128;  // pixels of one product

// The left side of a product, to be stored a few channels at a time.
template <class T>
class StoredPixels {
 public:
  static constexpr int kVectors = 1;  // of channels that are stored together

  StoredPixels(int64_t most, int64_t depth) : depth_(depth), data_(most * depth) {}
  template <int Tile>
  SEGNEXT_INLINE void store(int64_t m, int64_t c, const Vector<float> (&z)[kVectors][Tile]) {
    SEGNEXT_UNROLL
    for (int i = 0; i < Tile; ++i) store_as<float>(data_ + (m + i) * depth_ + c, z[0][i]);
  }
  Pixels<T> first(int64_t pixels, int64_t channels) const { return {data_, depth_, pixels, channels}; }

 private:
  const int64_t depth_;
  Buffer<T> data_;
};
template <class T>
using Stored = std::conditional_t<std::is_same_v<Left<T>, Pixels<T>>, StoredPixels<T>, Left<T>>;

template <class T, class F>
SEGNEXT_INLINE void for_products(const Left<T>& a, const Weights<T>& w, const F& f) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) return for_product_blocks(a, w, f);
  if constexpr (std::is_same_v<T, float>) return for_split_products(a, w, f);
#else
  for_product_tiles(a, w, f);
#endif
}

// Calls done(first row, number of rows as an integral constant, column, lanes that exist, their sums [rows]) for a * w.
template <class T, class F>
void matmul(const Left<T>& a, const Weights<T>& w, const F& done) {
  constexpr int L = kLanes<float>;
  for_products<T>(a, w, [&](int64_t m, auto rows, int64_t column, auto& acc) {
    SEGNEXT_UNROLL
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t c = column + v * L;
      if (c < w.columns) done(m, rows, c, w.columns - c < L ? static_cast<int>(w.columns - c) : L, acc[v]);
    }
  });
}

// sum [rows, with room for a multiple of 16][columns rounded up to panels] (+)= a * w
template <class T>
void matmul_sum(const Left<T>& a, const Weights<T>& w, float* sum, int64_t sum_row, bool add) {
  constexpr int L = kLanes<float>;
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) return matmul_sum_blocks(a, w, sum, sum_row, add);
  if constexpr (std::is_same_v<T, float>) return matmul_sum_split(a, w, sum, sum_row, add);
#endif
  for_products<T>(a, w, [&](int64_t m, auto rows, int64_t column, auto& acc) {
    constexpr int count = rows;
    float* out = sum + m * sum_row + column;
    SEGNEXT_UNROLL
    for (int i = 0; i < count; ++i) {
      SEGNEXT_UNROLL
      for (int v = 0; v < kTileVectors; ++v) {
        float* at = out + i * sum_row + v * L;
        store<float>(at, add ? load<float>(at) + acc[v][i] : acc[v][i]);
      }
    }
  });
}

// out + place[m] + (c / kLanes) group <- bias + a * w for every vector of columns c; bias and out have room for whole panels.
// `run` rows that follow each other lie next to each other.
template <class T>
void matmul_place(const Left<T>& a, const Weights<T>& w, const float* bias, const int64_t* place, int64_t run, int64_t group,
                  float* out) {
  constexpr int L = kLanes<float>;
#if defined(__AMX_BF16__)
  if (run % amx::kRows == 0) {
    if constexpr (std::is_same_v<T, BFloat16>) return matmul_place_blocks(a, w, bias, place, group, out);
    if constexpr (std::is_same_v<T, float>) return matmul_place_split(a, w, bias, place, group, out);
  }
#endif
  for_products<T>(a, w, [&](int64_t m, auto rows, int64_t column, auto& acc) {
    constexpr int count = rows;
    SEGNEXT_UNROLL
    for (int v = 0; v < kTileVectors; ++v) {
      const Vector<float> b = load<float>(bias + column + v * L);
      float* to = out + (column / L + v) * group;
      SEGNEXT_UNROLL
      for (int i = 0; i < count; ++i) store<float>(to + place[m + i], acc[v][i] + b);
    }
  });
}

template <class T>
SEGNEXT_INLINE Vector<float> load_lanes(const T* p, int lanes) {
  return lanes == kLanes<float> ? load_as<float>(p) : load_some<float>(p, lanes);
}

template <class T>
SEGNEXT_INLINE void store_lanes(T* p, Vector<float> v, int lanes) {
  lanes == kLanes<float> ? store_as<float>(p, v) : store_some<float>(p, v, lanes);
}

}  // namespace segnext
