// dwconv_gelu: 3x3 depthwise convolution, bias and GELU in one pass; backward recomputes the convolution.
#include "cpu/kernels.h"
#include "cpu/stencil.h"

namespace segnext {
namespace {

constexpr int kK = 3;
constexpr int kTaps = kK * kK + 1;  // the bias comes last

// d/dz of z Phi(z)
template <class A>
SEGNEXT_INLINE Vector<A> gelu_slope(Vector<A> z) {
  return normal_cdf(z) + z * static_cast<A>(0.3989422804014327) * exp_negative(z * z * static_cast<A>(-0.5));
}

// The rows of an image around the newest one, staged in a ring; zero outside.
template <class A>
class ImageRows {
 public:
  ImageRows(const Image& x, int64_t n, int64_t c, int count)
      : x_(x), n_(n), c_(c), rows_(count, x.width, 1), zero_(1, x.width, 1) {
    std::memset(zero_[0], 0, sizeof(A) * x.width * kLanes<A>);
  }
  void advance(int64_t last) {
    for (; next_ <= last && next_ < x_.height; ++next_) load_row<A>(x_, n_, c_, next_, rows_[next_]);
  }
  void window(int64_t row, const A* (&rows)[kK]) const {
    for (int s = 0; s < kK; ++s) rows[s] = row + s - 1 >= 0 && row + s - 1 < x_.height ? rows_[row + s - 1] : zero_[0];
  }

 private:
  const Image& x_;
  int64_t n_, c_, next_ = 0;
  RowRing<A> rows_, zero_;
};

template <class A>
void load_group_taps(const Image& x, const DepthwiseFilter& filter, int64_t c, A* taps) {
  load_row<A>(filter_row(filter.weight, x.dtype, x.channels, kTaps - 1), 0, c, 0, taps);
  load_row<A>(filter_row(filter.bias, x.dtype, x.channels, 1), 0, c, 0, taps + (kTaps - 1) * kLanes<A>);
}

template <class A>
void forward(const Image& x, const DepthwiseFilter& filter, const Image& y, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  const Groups<A> groups(x);
  Buffer<A> taps(kTaps * L), out(x.width * L);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = groups.image(item), c = groups.channel(item);
    load_group_taps<A>(x, filter, c, taps);
    ImageRows<A> x_rows(x, n, c, kK);
    for (int64_t row = 0; row < x.height; ++row) {
      x_rows.advance(row + 1);
      const A* rows[kK];
      x_rows.window(row, rows);
      for_tiles<kTile>(x.width, [&](int64_t w, auto size) {
        constexpr int tile = size;
        Vector<A> z[tile];
        square_tile<A, kK, tile>(rows, taps, load<A>(taps + (kTaps - 1) * L), w, z);
        SEGNEXT_UNROLL
        for (int i = 0; i < tile; ++i) store<A>(out + (w + i) * L, z[i] * normal_cdf(z[i]));
      });
      store_row<A>(y, n, c, row, out);
    }
  }
}

template <class A>
void backward(const Image& grad_out, const Image& x, const DepthwiseFilter& filter, const Image& grad_x, A* partial,
              int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  const Groups<A> groups(x);
  const int64_t width = x.width, height = x.height;
  Buffer<A> taps(kTaps * L), transposed((kTaps - 1) * L), out(width * L), g(width * L);
  RowRing<A> dz_rows(kK, width, 1), zero(1, width, 1);
  std::memset(zero[0], 0, sizeof(A) * width * L);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = groups.image(item), c = groups.channel(item);
    load_group_taps<A>(x, filter, c, taps);
    reverse_taps<A>(taps, kTaps - 1, transposed);
    A* grad = partial == nullptr ? nullptr : partial + item * kTaps * L;
    if (grad != nullptr) std::memset(grad, 0, sizeof(A) * kTaps * L);

    auto write_grad_x = [&](int64_t row) {
      const A* rows[kK];
      for (int s = 0; s < kK; ++s) rows[s] = row + s - 1 >= 0 && row + s - 1 < height ? dz_rows[row + s - 1] : zero[0];
      square<A, kK>(rows, transposed, Vector<A>{}, width, out);
      store_row<A>(grad_x, n, c, row, out);
    };
    ImageRows<A> x_rows(x, n, c, kK);
    for (int64_t row = 0; row < height; ++row) {
      x_rows.advance(row + 1);
      load_row<A>(grad_out, n, c, row, g);
      const A* rows[kK];
      x_rows.window(row, rows);
      A* dz = dz_rows[row];
      for_tiles<kTile>(width, [&](int64_t w, auto size) {
        constexpr int tile = size;
        Vector<A> z[tile];
        square_tile<A, kK, tile>(rows, taps, load<A>(taps + (kTaps - 1) * L), w, z);
        SEGNEXT_UNROLL
        for (int i = 0; i < tile; ++i) store<A>(dz + (w + i) * L, load<A>(g + (w + i) * L) * gelu_slope<A>(z[i]));
      });
      if (grad != nullptr) {
        square_grad<A, kK>(dz, rows, width, grad);
        add_row_sum<A>(dz, width, grad + (kTaps - 1) * L);
      }
      if (grad_x.data != nullptr && row >= 1) write_grad_x(row - 1);
    }
    if (grad_x.data != nullptr && height > 0) write_grad_x(height - 1);
  }
}

// Sums the items' gradients over the images, in order.
template <class A>
void reduce(const Image& x, const A* partial, const DepthwiseFilter& grads, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  Buffer<A> total(kTaps * L);
  for (int64_t group = begin; group < end; ++group) {
    sum_over_images<A>(x, partial, kTaps, group, total);
    store_row<A>(filter_row(grads.weight, x.dtype, x.channels, kTaps - 1), 0, group * L, 0, total);
    store_row<A>(filter_row(grads.bias, x.dtype, x.channels, 1), 0, group * L, 0, total + (kTaps - 1) * L);
  }
}

}  // namespace

void dwconv_gelu_forward(const Image& x, const DepthwiseFilter& filter, const Image& y, const Parallel& parallel) {
  with_accumulator(x.dtype, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    parallel(Groups<A>(x).items, [&](int64_t begin, int64_t end) { forward<A>(x, filter, y, begin, end); });
  });
}

void dwconv_gelu_backward(const Image& grad_out, const Image& x, const DepthwiseFilter& filter, const Image& grad_x,
                          const DepthwiseFilter* grads, const Parallel& parallel) {
  with_accumulator(x.dtype, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    const Groups<A> groups(x);
    Buffer<A> partial(grads == nullptr ? 0 : groups.items * kTaps * kLanes<A>);
    parallel(groups.items, [&](int64_t begin, int64_t end) {
      backward<A>(grad_out, x, filter, grad_x, grads == nullptr ? nullptr : static_cast<A*>(partial), begin, end);
    });
    if (grads == nullptr) return;
    parallel(groups.per_image, [&](int64_t begin, int64_t end) { reduce<A>(x, partial, *grads, begin, end); });
  });
}

}  // namespace segnext
