// Products of pixels [rows][depth] with packed weights [depth][columns], accumulated in float, on what the processor has:
// register tiles (matmul_tiles.h), or its matrix tiles for bfloat16 (matmul_amx.h) and float (matmul_split.h).
#pragma once
#include "cpu/matmul_tiles.h"
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

// `once`: where a thread will hardly have more than one product of at most kPixels pixels.
template <class T>
Weights<T> prepared(const Packed<T>& w, bool once) {
  if constexpr (std::is_same_v<Weights<T>, Packed<T>>) {
    return w;
  } else {
    return Weights<T>(w, once);
  }
}

inline constexpr int64_t kPixels = 128;  // pixels of a product that may be cut anywhere

// The left side of a product where it is made for that alone: of elements in the form that is multiplied.
template <class T>
using MadePixels = std::conditional_t<std::is_same_v<Left<T>, Pixels<T>>, Pixels<Operand<T>>, Left<T>>;

// The same, stored a few channels at a time.
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
using Stored = std::conditional_t<std::is_same_v<Left<T>, Pixels<T>>, StoredPixels<Operand<T>>, Left<T>>;

template <class T, class P, class F>
SEGNEXT_INLINE void for_products(const P& a, const Weights<T>& w, const F& f) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) return for_product_blocks(a, w, f);
  if constexpr (std::is_same_v<T, float>) return for_split_products(a, w, f);
#else
  for_product_tiles(a, w, f);
#endif
}

// f(first row, number of rows as an integral constant, first column, sums [kTileVectors][rows]) that calls done(first row,
// number of rows, column, lanes that exist, their sums [rows]) for each vector of columns.
template <class F>
auto each_vector(int64_t columns, const F& done) {
  return [columns, &done](int64_t m, auto rows, int64_t column, auto& acc) {
    constexpr int L = kLanes<float>;
    SEGNEXT_UNROLL
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t c = column + v * L;
      if (c < columns) done(m, rows, c, columns - c < L ? static_cast<int>(columns - c) : L, acc[v]);
    }
  };
}

// Calls done(first row, number of rows as an integral constant, column, lanes that exist, their sums [rows]) for a * w; P: Left
// or MadePixels.
template <class T, class P = Left<T>, class F>
void matmul(const P& a, const Weights<T>& w, const F& done) {
  for_products<T, P>(a, w, each_vector(w.columns, done));
}

// Whether products are of floats in registers, so that the left side's rows need not be gathered.
template <class T>
inline constexpr bool kCanScatter = std::is_same_v<MadePixels<T>, Pixels<float>>;

// The same for such rows.
template <class T, class F>
void matmul_scattered(const ScatteredRows& left, int64_t count, const Packed<T>& w, const F& done) {
  for_panel_tiles(left, count, w.depth, w, RightOperand<T>(w, w.depth), each_vector(w.columns, done));
}

// sum [rows, with room for a multiple of 16][columns rounded up to panels] (+)= a * w
template <class T, class P = Left<T>>
void matmul_sum(const P& a, const Weights<T>& w, float* sum, int64_t sum_row, bool add) {
  constexpr int L = kLanes<float>;
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) return matmul_sum_blocks(a, w, sum, sum_row, add);
  if constexpr (std::is_same_v<T, float>) return matmul_sum_split(a, w, sum, sum_row, add);
#endif
  for_products<T, P>(a, w, [&](int64_t m, auto rows, int64_t column, auto& acc) {
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

}  // namespace segnext
