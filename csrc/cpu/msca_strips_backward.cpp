// msca_strips backward: one pass over x and the output's gradient g, row by row.
//
//   u_k = V_k^T g,  da = g + sum_k H_k^T u_k,  dx = W5^T da,  q_k = H_k^T g
//   dH_k[t] = sum u_k[r, w] a[r, w + t - k/2],   dV_k[t] = sum q_k[r, w] a[r + t - k/2, w] + bh_k (sum of g over valid rows)
//   dW5 = sum da x (shifted),  db5 = sum da,  dbh_k = sum u_k,  dbv_k = sum g
//
// Sums are kept per row in registers, then added to the item's totals: fixed order, and less rounding than one long sum.
#include <optional>

#include "cpu/strips.h"

namespace segnext {
namespace {

constexpr int kChunk = kRegisters == 32 ? 21 : 7;  // taps whose sums fit in registers together

// Calls f(first, count) for runs of at most kChunk taps that cover K taps.
template <int K, class F>
SEGNEXT_INLINE void for_chunks(const F& f) {
  constexpr int kFull = K < kChunk ? K : kChunk;
  int first = 0;
  for (; first + kFull <= K; first += kFull) f(first, std::integral_constant<int, kFull>{});
  if constexpr (K % kFull != 0) f(first, std::integral_constant<int, K % kFull>{});
}

// grad[t] += sum over w of u[w] * a[w + t - K / 2]
template <class A, int K>
SEGNEXT_NOINLINE void row_grad(const A* u, const A* a, int64_t width, A* grad) {
  constexpr int L = kLanes<A>;
  for_chunks<K>([&](int first, auto size) {
    constexpr int count = size;
    Vector<A> acc[count] = {};
    for (int64_t w = 0; w < width; ++w) {
      const Vector<A> v = load<A>(u + w * L);
      const A* row = a + (w + first - K / 2) * L;
      SEGNEXT_UNROLL
      for (int t = 0; t < count; ++t) acc[t] += v * load<A>(row + t * L);
    }
    add_to<A>(grad + first * L, acc);
  });
}

// grad[t] += sum over rows j < kStripRows and w of q_j[w] * a[j + t - K / 2][w]; a's rows outside the image are null
template <class A, int K>
SEGNEXT_NOINLINE void column_grad(const A* const (&q)[kStripRows], const Window<A>& a, int64_t width, A* grad) {
  constexpr int L = kLanes<A>;
  for_chunks<K>([&](int first, auto size) {
    constexpr int count = size;
    const A* const* rows = a.rows + kReach - K / 2 + first;
    Vector<A> acc[count] = {};
    for (int64_t w = 0; w < width; ++w) {
      Vector<A> v[kStripRows];
      SEGNEXT_UNROLL
      for (int j = 0; j < kStripRows; ++j) v[j] = load<A>(q[j] + w * L);
      SEGNEXT_UNROLL
      for (int i = 0; i < count + kStripRows - 1; ++i) {
        if (rows[i] == nullptr) continue;
        const Vector<A> row = load<A>(rows[i] + w * L);
        SEGNEXT_UNROLL
        for (int j = 0; j < kStripRows; ++j) {
          if (i - j >= 0 && i - j < count) acc[i - j] += v[j] * row;
        }
      }
    }
    add_to<A>(grad + first * L, acc);
  });
}

// out[w] = sum over t of taps[t] * row[w + t - K / 2]
template <class A, int K>
SEGNEXT_NOINLINE void strip(const A* row, const A* taps, int64_t width, A* out) {
  for_tiles<kTile>(width, [&](int64_t w, auto size) {
    constexpr int tile = size;
    Vector<A> acc[tile] = {};
    strip_tile<A, K>(row, taps, w, width, acc);
    SEGNEXT_UNROLL
    for (int i = 0; i < tile; ++i) store<A>(out + (w + i) * kLanes<A>, acc[i]);
  });
}

// The transposed filters, each in its own filter's place.
template <class A>
void transpose_taps(const A* taps, A* transposed) {
  for (int i = 0; i < kStripTensors; ++i) {
    const int offset = tensor_offset(i) * kLanes<A>;
    reverse_taps<A>(taps + offset, kStripTaps[i], transposed + offset);
  }
}

// The gradients of one group's taps, collected row by row.
template <class A>
class TapGrads {
 public:
  TapGrads(const Image& x, const A* taps)
      : taps_(taps),
        height_(x.height),
        width_(x.width),
        stem_(x, taps, true),
        strips_(x.width),
        zero_(x.width * kLanes<A>),
        g_sums_(x.height * kLanes<A>) {
    std::memset(zero_, 0, sizeof(A) * x.width * kLanes<A>);
  }

  // Begins with another group of channels, whose gradients go to `total`.
  void restart(int64_t n, int64_t c, A* total) {
    total_ = total;
    stem_.restart(n, c, 0);
    std::memset(total, 0, sizeof(A) * kTaps * kLanes<A>);
    std::memset(g_sums_, 0, sizeof(A) * height_ * kLanes<A>);
  }

  void advance(int64_t last_row) { stem_.advance(last_row); }

  void add_row(int64_t row, int64_t in_block, const A* g, const StripRows<A>& u, const A* da, const A* transposed) {
    for_branches([&](auto b) {
      strip<A, kBranchTaps[b]>(g, transposed + kRowTaps[b] * L, width_, strips_(b, in_block));
      row_grad<A, kBranchTaps[b]>(u(b, in_block), stem_.a()[row], width_, total_ + row_taps(b) * L);
      add_row_sum<A>(u(b, in_block), width_, total_ + row_bias(b) * L);
    });
    const A* x_rows[5];
    stem_.x().window(row, 0, height_, x_rows);
    depthwise_grad<A, 5>(da, x_rows, width_, total_ + kW5 * L);
    add_row_sum<A>(da, width_, total_ + kB5 * L);
    add_row_sum<A>(g, width_, g_sums_ + row * L);
  }

  void add_block(int64_t row) {
    const Window<A> window(stem_.a(), row, height_);
    for_branches([&](auto b) {
      const A* q[kStripRows];
      for (int j = 0; j < kStripRows; ++j) q[j] = row + j < height_ ? strips_(b, j) : zero_;
      column_grad<A, kBranchTaps[b]>(q, window, width_, total_ + column_taps(b) * L);
    });
  }

  // The row filters' biases lie under the column filters: they multiply the sums of g over the rows that a tap reaches.
  void finish() {
    for (int b = 0; b < kBranches; ++b) {
      const Vector<A> bias = load<A>(taps_ + row_bias(b) * L);
      for (int t = 0; t < kBranchTaps[b]; ++t) {
        const int64_t shift = t - kBranchTaps[b] / 2;
        Vector<A> sum = {};
        for (int64_t r = 0; r < height_; ++r) {
          if (r + shift >= 0 && r + shift < height_) sum += load<A>(g_sums_ + r * L);
        }
        A* total = total_ + (column_taps(b) + t) * L;
        store<A>(total, load<A>(total) + bias * sum);
      }
      add_row_sum<A>(g_sums_, height_, total_ + column_bias(b) * L);
    }
  }

 private:
  static constexpr int L = kLanes<A>;
  const A* taps_;
  A* total_ = nullptr;
  int64_t height_, width_;
  Conv5x5Rows<A> stem_;
  StripRows<A> strips_;
  Buffer<A> zero_, g_sums_;
};

template <class A>
void backward(const Image& grad_out, const Image& x, const StripFilters& filters, const Image& grad_x, A* partial,
              Share& items) {
  constexpr int L = kLanes<A>;
  const Groups<A> groups(x);
  const int64_t width = x.width, height = x.height;
  Buffer<A> taps(kTaps * L), transposed(kTaps * L), out(width * L);
  RowRing<A> g_rows(kWindow, width, kApart), da_rows(5, width, 2);
  StripRows<A> u(width);
  std::optional<TapGrads<A>> grads;
  if (partial != nullptr) grads.emplace(x, taps);
  for (const int64_t item : items) {
    const int64_t n = groups.image(item), c = groups.channel(item);
    load_strip_taps<A>(filters, x, c, taps);
    transpose_taps<A>(taps, transposed);
    if (grads) grads->restart(n, c, partial + item * kTaps * L);

    auto write_grad_x = [&](int64_t row) {
      const A* rows[5];
      da_rows.window(row, 0, height, rows);
      depthwise<A, 5>(rows, transposed + kW5 * L, Vector<A>{}, width, out);
      store_row<A>(grad_x, n, c, row, out);
    };
    int64_t next_g = 0;
    for (int64_t row = 0; row < height; row += kStripRows) {
      const int64_t last = row + kStripRows - 1 + kReach;
      for (; next_g <= last && next_g < height; ++next_g) load_row<A>(grad_out, n, c, next_g, g_rows[next_g]);
      if (grads) grads->advance(last);
      column_pass<A>(Window<A>(g_rows, row, height), transposed, width, u);
      for (int64_t r = row; r < row + kStripRows && r < height; ++r) {
        A* da = da_rows[r];
        row_pass<A>(u, r - row, transposed, g_rows[r], Vector<A>{}, width,
                    [&](int64_t w, const auto& sums) { store_tile<A>(da + w * L, L, sums); });
        if (grads) grads->add_row(r, r - row, g_rows[r], u, da, transposed);
        if (grad_x.data != nullptr && r >= 2) write_grad_x(r - 2);
      }
      if (grads) grads->add_block(row);
    }
    if (grad_x.data != nullptr) {
      for (int64_t row = height > 2 ? height - 2 : 0; row < height; ++row) write_grad_x(row);
    }
    if (grads) grads->finish();
  }
}

// Sums the items' gradients over the images, in order.
template <class A>
void reduce(const Image& x, const A* partial, const StripFilters& grads, Share& items) {
  const int64_t groups = Groups<A>(x).per_image;
  Buffer<A> total(kTaps * kLanes<A>);
  for (const int64_t group : items) {
    sum_partial<A>(partial, x.images, groups, kTaps, group, total);
    for (int i = 0; i < kStripTensors; ++i) {
      store_row<A>(filter_row(grads.tensors[i], grads.dtype, x.channels, kStripTaps[i]), 0, group * kLanes<A>, 0,
                   total + tensor_offset(i) * kLanes<A>);
    }
  }
}

}  // namespace

void msca_strips_backward(const Image& grad_out, const Image& x, const StripFilters& filters, const Image& grad_x,
                          const StripFilters* grads, const Parallel& parallel) {
  with_accumulator(x.dtype, [&]<class A>() {
    const Groups<A> groups(x);
    Buffer<A> partial(grads == nullptr ? 0 : groups.items * kTaps * kLanes<A>);
    parallel(groups.items, [&](Share& items) {
      backward<A>(grad_out, x, filters, grad_x, grads == nullptr ? nullptr : static_cast<A*>(partial), items);
    });
    if (grads == nullptr) return;
    parallel(groups.per_image, [&](Share& items) { reduce<A>(x, partial, *grads, items); });
  });
}

}  // namespace segnext
