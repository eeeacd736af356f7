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
  ImageRows(const Image& x, int64_t n, int64_t c, int count) : x_(x), n_(n), c_(c), rows_(count, x.width, 1), zero_(1, x.width, 1) {
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
void load_group_taps(const Image& x, void* weight, void* bias, int64_t c, A* taps) {
  load_row<A>(filter_row(weight, x.dtype, x.channels, kTaps - 1), 0, c, 0, taps);
  load_row<A>(filter_row(bias, x.dtype, x.channels, 1), 0, c, 0, taps + (kTaps - 1) * kLanes<A>);
}

template <class A>
void forward(const Image& x, void* weight, void* bias, const Image& y, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  const Groups<A> groups(x);
  Buffer<A> taps(kTaps * L), out(x.width * L);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = groups.image(item), c = groups.channel(item);
    load_group_taps<A>(x, weight, bias, c, taps);
    ImageRows<A> x_rows(x, n, c, kK);
    for (int64_t row = 0; row < x.height; ++row) {
      x_rows.advance(row + 1);
      const A* rows[kK];
      x_rows.window(row, rows);
      for_tiles<kTile>(x.width, [&](int64_t w, auto tile) {
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
void backward(const Image& grad_out, const Image& x, void* weight, void* bias, const Image& grad_x, A* partial, int64_t begin,
              int64_t end) {
  constexpr int L = kLanes<A>;
  const Groups<A> groups(x);
  const int64_t width = x.width, height = x.height;
  Buffer<A> taps(kTaps * L), transposed((kTaps - 1) * L), out(width * L), g(width * L);
  RowRing<A> dz_rows(kK, width, 1), zero(1, width, 1);
  std::memset(zero[0], 0, sizeof(A) * width * L);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = groups.image(item), c = groups.channel(item);
    load_group_taps<A>(x, weight, bias, c, taps);
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
      for_tiles<kTile>(width, [&](int64_t w, auto tile) {
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

template <class A>
void reduce(const Image& x, const A* partial, void* grad_weight, void* grad_bias) {
  constexpr int L = kLanes<A>;
  const Groups<A> groups(x);
  Buffer<A> total(kTaps * L);
  for (int64_t group = 0; group < groups.per_image; ++group) {
    std::memset(total, 0, sizeof(A) * kTaps * L);
    for (int64_t n = 0; n < x.images; ++n) {
      const A* part = partial + (n * groups.per_image + group) * kTaps * L;
      for (int t = 0; t < kTaps; ++t) store<A>(total + t * L, load<A>(total + t * L) + load<A>(part + t * L));
    }
    store_row<A>(filter_row(grad_weight, x.dtype, x.channels, kTaps - 1), 0, group * L, 0, total);
    store_row<A>(filter_row(grad_bias, x.dtype, x.channels, 1), 0, group * L, 0, total + (kTaps - 1) * L);
  }
}

}  // namespace

int64_t dwconv_gelu_items(const Image& x) { return msca_strips_items(x); }

int64_t dwconv_gelu_partial_size(const Image& x) {
  return dwconv_gelu_items(x) * kTaps * (x.dtype == Dtype::kFloat64 ? kLanes<double> : kLanes<float>);
}

void dwconv_gelu_forward(const Image& x, void* weight, void* bias, const Image& y, int64_t begin, int64_t end) {
  x.dtype == Dtype::kFloat64 ? forward<double>(x, weight, bias, y, begin, end) : forward<float>(x, weight, bias, y, begin, end);
}

void dwconv_gelu_backward(const Image& grad_out, const Image& x, void* weight, void* bias, const Image& grad_x, void* partial,
                          int64_t begin, int64_t end) {
  x.dtype == Dtype::kFloat64 ? backward(grad_out, x, weight, bias, grad_x, static_cast<double*>(partial), begin, end)
                             : backward(grad_out, x, weight, bias, grad_x, static_cast<float*>(partial), begin, end);
}

void dwconv_gelu_reduce(const Image& x, const void* partial, void* grad_weight, void* grad_bias) {
  x.dtype == Dtype::kFloat64 ? reduce(x, static_cast<const double*>(partial), grad_weight, grad_bias)
                             : reduce(x, static_cast<const float*>(partial), grad_weight, grad_bias);
}

}  // namespace segnext
