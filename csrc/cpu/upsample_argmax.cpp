// upsample_argmax: the highest class at every pixel of bilinearly upsampled logits.
#include <limits>

#include "cpu/upsample.h"

namespace segnext {
namespace {

// best[i], label[i] of `Rows` rows of a tile from `row` on; the lowest class wins where several are highest.
template <class A, int Rows>
SEGNEXT_INLINE void label_rows(const Upsampling<A>& up, const UpsampledTile<A>& tile, int64_t row, int64_t* labels) {
  constexpr int L = kLanes<A>;
  Vector<A> best[Rows];
  BitsVector<A> label[Rows], c = {};
  SEGNEXT_UNROLL
  for (int i = 0; i < Rows; ++i) {
    best[i] = broadcast(-std::numeric_limits<A>::infinity());
    label[i] = c;
  }
  for (int64_t at = 0; at < up.logits.channels * L; at += L, c += 1) {
    const Vector<A> upper = load<A>(tile.upper + at), step = load<A>(tile.step + at);
    SEGNEXT_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const Vector<A> z = upper + up.rows[row + i].weight * step;
      label[i] = z > best[i] ? c : label[i];
      best[i] = z > best[i] ? z : best[i];
    }
  }
  for (int i = 0; i < Rows; ++i) {
    int64_t* out = labels + (tile.image * up.height() + row + i) * up.width + tile.column;
    for (int lane = 0; lane < tile.lanes; ++lane) out[lane] = label[i][lane];
  }
}

}  // namespace

void upsample_argmax_forward(const Image& logits, int64_t height, int64_t width, int64_t* labels, const Parallel& parallel) {
  with_accumulator(logits.dtype, [&]<class A>() {
    const Upsampling<A> up(logits, height, width);
    parallel(up.items, [&](Share& items) {
      UpsampledTiles<A> tiles(up);
      for (const int64_t item : items) {
        tiles.run(item, [&](const UpsampledTile<A>& tile) {
          int64_t row = tile.first_row;
          for (; row + 4 <= tile.last_row; row += 4) label_rows<A, 4>(up, tile, row, labels);
          for (; row < tile.last_row; ++row) label_rows<A, 1>(up, tile, row, labels);
        });
      }
    });
  });
}

}  // namespace segnext
