// Products of bfloat16 blocks on the processor's matrix tiles (AMX), which hold 16 rows of 64 bytes each.
#pragma once
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/simd.h"

namespace segnext::amx {

// Asks the system for the tiles' registers, which a process gets only if it wants them; whether it got them.
inline bool permitted() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

inline constexpr int kRows = 16, kColumns = 16, kDepth = 32;  // of one product of tiles
inline constexpr int kParts = 3;                              // bfloat16 that make up a float
inline constexpr int kTileSize = kRows * kDepth;              // elements of an operand

#if defined(__AMX_BF16__) && !SEGNEXT_ADDRESS_SANITIZER

// The compiler does not know that the instructions for tiles read memory.
SEGNEXT_INLINE void finish_stores() { __asm__ volatile("" ::: "memory"); }

// The calling thread's tiles are 16 rows of 64 bytes as long as this lives.
class Tiles {
 public:
  Tiles() {
    static constexpr struct alignas(64) Shapes {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// The sums of 16 Blocks rows by 16 Halves columns, in tiles 0 to 3: two for every 16 rows.
template <int Blocks, int Halves>
SEGNEXT_INLINE void load_sums(const float* const (&start)[4], int64_t row) {
  const int64_t bytes = row * 4;
  if (start[0] == nullptr) {
    _tile_zero(0);
    if constexpr (Halves == 2) _tile_zero(1);
    if constexpr (Blocks == 2) _tile_zero(2);
    if constexpr (Blocks == 2 && Halves == 2) _tile_zero(3);
  } else {
    _tile_loadd(0, start[0], bytes);
    if constexpr (Halves == 2) _tile_loadd(1, start[1], bytes);
    if constexpr (Blocks == 2) _tile_loadd(2, start[2], bytes);
    if constexpr (Blocks == 2 && Halves == 2) _tile_loadd(3, start[3], bytes);
  }
}

template <int Blocks, int Halves>
SEGNEXT_INLINE void store_sums(float* const (&out)[4], int64_t row) {
  const int64_t bytes = row * 4;
  _tile_stored(0, out[0], bytes);
  if constexpr (Halves == 2) _tile_stored(1, out[1], bytes);
  if constexpr (Blocks == 2) _tile_stored(2, out[2], bytes);
  if constexpr (Blocks == 2 && Halves == 2) _tile_stored(3, out[3], bytes);
}

// Adds the product of tiles 4 and 5, of 16 rows each, and 6 and 7, the halves of a panel.
template <int Blocks, int Halves>
SEGNEXT_INLINE void multiply_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (Halves == 2) _tile_dpbf16ps(1, 4, 7);
  if constexpr (Blocks == 2) _tile_dpbf16ps(2, 5, 6);
  if constexpr (Blocks == 2 && Halves == 2) _tile_dpbf16ps(3, 5, 7);
}

// out = start + left [16 Blocks][depth] * a panel [depth / 2][32][2], depth a multiple of 32; strides in elements. start and
// out are tiles [16][16] each, two for the panel's halves for every 16 rows (with 16 rows the last two are not used); the first
// of start may be null, for zeros.
template <int Blocks>
SEGNEXT_INLINE void multiply(const BFloat16* left, int64_t left_row, const BFloat16* panel, int64_t depth,
                             const float* const (&start)[4], int64_t start_row, float* const (&out)[4], int64_t out_row) {
  const int64_t left_bytes = left_row * 2, panel_bytes = 128;
  finish_stores();
  load_sums<Blocks, 2>(start, start_row);
  for (int64_t k = 0; k < depth; k += kDepth, panel += kDepth * 32) {
    _tile_loadd(4, left + k, left_bytes);
    if constexpr (Blocks == 2) _tile_loadd(5, left + kRows * left_row + k, left_bytes);
    _tile_loadd(6, panel, panel_bytes);
    _tile_loadd(7, panel + 32, panel_bytes);
    multiply_tiles<Blocks, 2>();
  }
  store_sums<Blocks, 2>(out, out_row);
}

// As multiply, with both operands as sums of kParts bfloat16, in tiles that follow each other: left [Blocks][depth /
// 32][kParts], blocks left_block elements apart, and a panel [depth / 32][kParts][2], of which the first half may be multiplied
// alone.
template <int Blocks, int Halves>
SEGNEXT_INLINE void multiply_parts(const BFloat16* left, int64_t left_block, const BFloat16* panel, int64_t depth,
                                   const float* const (&start)[4], int64_t start_row, float* const (&out)[4], int64_t out_row) {
  constexpr int64_t kBytes = 64;
  finish_stores();
  load_sums<Blocks, Halves>(start, start_row);
  for (int64_t k = 0; k < depth; k += kDepth, left += kParts * kTileSize, panel += kParts * 2 * kTileSize) {
    auto load_left = [&](int part) {
      _tile_loadd(4, left + part * kTileSize, kBytes);
      if constexpr (Blocks == 2) _tile_loadd(5, left + left_block + part * kTileSize, kBytes);
    };
    auto load_panel = [&](int part) {
      _tile_loadd(6, panel + part * 2 * kTileSize, kBytes);
      if constexpr (Halves == 2) _tile_loadd(7, panel + (part * 2 + 1) * kTileSize, kBytes);
    };
    load_left(0);
    load_panel(2);
    multiply_tiles<Blocks, Halves>();
    load_panel(1);
    multiply_tiles<Blocks, Halves>();
    load_left(1);
    multiply_tiles<Blocks, Halves>();
    load_panel(0);
    multiply_tiles<Blocks, Halves>();
    load_left(2);
    multiply_tiles<Blocks, Halves>();
    load_left(0);
    multiply_tiles<Blocks, Halves>();
  }
  store_sums<Blocks, Halves>(out, out_row);
}

#else

// The portable twin, whose every access the sanitizers see. As in the instruction, the products of a tile's even and odd depths
// are summed apart and then added.
class Tiles {};

template <class F>
float tile_sum(const F& product) {
  float sums[2] = {};
  for (int k = 0; k < kDepth; ++k) sums[k % 2] += product(k);
  return sums[0] + sums[1];
}

template <int Blocks>
void multiply(const BFloat16* left, int64_t left_row, const BFloat16* panel, int64_t depth, const float* const (&start)[4],
              int64_t start_row, float* const (&out)[4], int64_t out_row) {
  for (int m = 0; m < Blocks * kRows; ++m) {
    for (int c = 0; c < 2 * kColumns; ++c) {
      const int tile = m / kRows * 2 + c / kColumns, row = m % kRows, column = c % kColumns;
      float sum = start[0] == nullptr ? 0 : start[tile][row * start_row + column];
      for (int64_t first = 0; first < depth; first += kDepth) {
        sum += tile_sum([&](int64_t k) {
          k += first;
          return widen(left[m * left_row + k]) * widen(panel[(k / 2 * 2 * kColumns + c) * 2 + k % 2]);
        });
      }
      out[tile][row * out_row + column] = sum;
    }
  }
}

template <int Blocks, int Halves>
void multiply_parts(const BFloat16* left, int64_t left_block, const BFloat16* panel, int64_t depth,
                    const float* const (&start)[4], int64_t start_row, float* const (&out)[4], int64_t out_row) {
  for (int m = 0; m < Blocks * kRows; ++m) {
    for (int c = 0; c < Halves * kColumns; ++c) {
      const int tile = m / kRows * 2 + c / kColumns, row = m % kRows, column = c % kColumns;
      float sum = start[0] == nullptr ? 0 : start[tile][row * start_row + column];
      for (int64_t block = 0; block * kDepth < depth; ++block) {
        const BFloat16* a = left + m / kRows * left_block + block * kParts * kTileSize + row * kDepth;
        const BFloat16* b = panel + (block * kParts * 2 + c / kColumns) * kTileSize + column * 2;
        for (int i = kParts; i-- > 0;) {
          for (int j = kParts - i; j-- > 0;) {
            sum += tile_sum([&](int k) {
              return widen(a[i * kTileSize + k]) * widen(b[j * 2 * kTileSize + k / 2 * 2 * kColumns + k % 2]);
            });
          }
        }
      }
      out[tile][row * out_row + column] = sum;
    }
  }
}

#endif

}  // namespace segnext::amx
