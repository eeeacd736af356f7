// dwconv_gelu: 3x3 depthwise convolution, bias and GELU in one pass; backward recomputes the convolution.
#include "cpu/dwconv_rows.h"
#include "cpu/gelu.h"
#include "cpu/kernels.h"

namespace segnext {
namespace {

using namespace dwconv;

// out [width] <- activate(bias + the stencil), tile by tile; out's pixels lie out_step elements apart.
template <class A, class T, class O, class F>
void convolve_row(const Rows<T>& x, const A* taps, int64_t groups, O* out, int64_t out_step, const F& activate) {
  constexpr int L = kLanes<A>;
  for_tiles<kPixels>(x.width, [&](int64_t w, auto size) {
    constexpr int tile = size;
    for (int64_t g = 0; g < groups; ++g) {
      Vector<A> z[tile];
      convolve<A, tile>(x, taps + g * kTaps * L, w, g * L, z);
      activate(z);
      SEGNEXT_UNROLL
      for (int i = 0; i < tile; ++i) store_as<A>(out + (w + i) * out_step + g * L, z[i]);
    }
  });
}

// dz [width][groups] <- dy times the slope; sums, if not null, += its gradients of the taps.
template <class A, class T>
void dz_row(const Rows<T>& x, const T* dy, const A* taps, int64_t groups, A* dz, A* sums) {
  constexpr int L = kLanes<A>;
  int64_t done = 0;  // pixels that an earlier tile has had
  for_tiles<kPixels>(x.width, [&](int64_t w, auto size) {
    constexpr int tile = size;
    for (int64_t g = 0; g < groups; ++g) {
      Vector<A> z[tile];
      convolve<A, tile>(x, taps + g * kTaps * L, w, g * L, z);
      gelu_slope(z);
      SEGNEXT_UNROLL
      for (int i = 0; i < tile; ++i) {
        z[i] *= load_as<A>(dy + (w + i) * x.step + g * L);
        store<A>(dz + ((w + i) * groups + g) * L, z[i]);
      }
      if (sums == nullptr) continue;
      if (w < done) {
        SEGNEXT_UNROLL
        for (int i = 0; i < tile; ++i) z[i] = w + i < done ? Vector<A>{} : z[i];
      }
      add_tap_grads<A, tile>(x, z, w, g * L, sums + g * kTaps * L);
    }
    done = w + tile;
  });
}

// taps [groups][kTaps][kLanes] <- the filter and the bias
template <class A>
void load_taps(const Image& x, const DepthwiseFilter& filter, const Part<A>& part, A* taps) {
  constexpr int L = kLanes<A>;
  load_row<A>(filter_row(filter.weight, filter.dtype, x.channels, kTaps - 1), 0, part.c, 0, taps, part.groups, kTaps * L);
  load_row<A>(filter_row(filter.bias, filter.dtype, x.channels, 1), 0, part.c, 0, taps + (kTaps - 1) * L, part.groups,
              kTaps * L);
}

template <class A, class T, bool Staged>
void forward(const Image& x, const DepthwiseFilter& filter, const Image& y, const Parts<A>& parts, Share& items) {
  Buffer<A> taps(parts.block * kTaps * kLanes<A>);
  Source<A, T, Staged> source(x);
  Target<A, T, Staged> target(y);
  for (const int64_t item : items) {
    const Part<A> part(x, parts, item);
    if (part.direct == Staged) continue;
    load_taps<A>(x, filter, part, taps);
    source.restart(part, part.first - 1);
    for (int64_t row = part.first; row < part.last; ++row) {
      target.write(part, row, [&](T* out) {
        convolve_row<A>(source.around(row), taps, part.groups, out, target.step, [](auto& z) { exact_gelu(z); });
      });
    }
  }
}

// A part computes the row of dz before and after its own once more.
template <class A, class T, bool Staged>
void backward(const Image& grad_out, const Image& x, const DepthwiseFilter& filter, const Image& grad_x, A* partial,
              const Parts<A>& parts, Share& items) {
  constexpr int L = kLanes<A>;
  const int64_t width = x.width, height = x.height;
  Buffer<A> taps(parts.block * kTaps * L), transposed(parts.block * kTaps * L), zeros(L);
  Buffer<A> row_sums(parts.block * kTaps * L);  // each row's are added up first, since an image can have millions of pixels
  std::memset(zeros, 0, sizeof(A) * L);
  Source<A, T, Staged> source(x), dy(grad_out);
  Target<A, T, Staged> target(grad_x);
  for (const int64_t item : items) {
    const Part<A> part(x, parts, item);
    if (part.direct == Staged) continue;
    const int64_t step = part.groups * L;
    RowRing<A> dz_rows(kK, width, 0, part.groups);
    load_taps<A>(x, filter, part, taps);
    std::memset(transposed, 0, sizeof(A) * part.groups * kTaps * L);
    for (int64_t g = 0; g < part.groups; ++g) reverse_taps<A>(taps + g * kTaps * L, kTaps - 1, transposed + g * kTaps * L);
    A* sums = partial == nullptr ? nullptr : partial + (part.index * parts.groups + part.group) * kTaps * L;
    if (sums != nullptr) std::memset(sums, 0, sizeof(A) * part.groups * kTaps * L);

    auto write_grad_x = [&](int64_t row) {
      Rows<A> rows = {{}, zeros, step, width};
      for (int64_t r = std::max<int64_t>(row - 1, 0); r <= row + 1 && r < height; ++r) rows.rows[r - row + 1] = dz_rows[r];
      target.write(part, row, [&](T* out) { convolve_row<A>(rows, transposed, part.groups, out, target.step, [](auto&) {}); });
    };
    const int64_t begin_row = std::max<int64_t>(part.first - 1, 0), end_row = std::min(part.last + 1, height);
    source.restart(part, begin_row - 1);
    dy.restart(part, begin_row);
    for (int64_t row = begin_row; row < end_row; ++row) {
      const bool own = sums != nullptr && row >= part.first && row < part.last;
      if (own) std::memset(row_sums, 0, sizeof(A) * part.groups * kTaps * L);
      dz_row<A>(source.around(row), dy[row], taps, part.groups, dz_rows[row], own ? static_cast<A*>(row_sums) : nullptr);
      for (int64_t i = 0; own && i < part.groups * kTaps * L; i += L) {
        store<A>(sums + i, load<A>(sums + i) + load<A>(row_sums + i));
      }
      if (grad_x.data != nullptr && row > part.first) write_grad_x(row - 1);
    }
    if (grad_x.data != nullptr && part.last == height) write_grad_x(height - 1);
  }
}

// Sums the items' gradients over images and parts, in order.
template <class A>
void reduce(const Image& x, const A* partial, const DepthwiseFilter& grads, const Parts<A>& parts, Share& items) {
  constexpr int L = kLanes<A>;
  Buffer<A> total(kTaps * L);
  for (const int64_t group : items) {
    sum_partial<A>(partial, x.images * parts.per_image, parts.groups, kTaps, group, total);
    store_row<A>(filter_row(grads.weight, grads.dtype, x.channels, kTaps - 1), 0, group * L, 0, total);
    store_row<A>(filter_row(grads.bias, grads.dtype, x.channels, 1), 0, group * L, 0, total + (kTaps - 1) * L);
  }
}

// Calls f<type of the rows, whether they are staged>() for the kinds of items there are.
template <class A, class F>
void with_rows(const Image& x, const Parts<A>& parts, const F& f) {
  if (parts.direct > 0) {
    with_storage<A>(x.dtype, [&]<class T>() { f.template operator()<T, false>(); });
  }
  if (parts.direct < parts.groups) f.template operator()<A, true>();
}

}  // namespace

void dwconv_gelu_forward(const Image& x, const DepthwiseFilter& filter, const Image& y, const Parallel& parallel) {
  with_accumulator(x.dtype, [&]<class A>() {
    const Parts<A> parts(x, 8);
    with_rows<A>(x, parts, [&]<class T, bool staged>() {
      parallel(parts.items, [&](Share& items) { forward<A, T, staged>(x, filter, y, parts, items); });
    });
  });
}

void dwconv_gelu_backward(const Image& grad_out, const Image& x, const DepthwiseFilter& filter, const Image& grad_x,
                          const DepthwiseFilter* grads, const Parallel& parallel) {
  with_accumulator(x.dtype, [&]<class A>() {
    const Parts<A> parts(x, 16);  // fewer rows would be computed twice too often
    Buffer<A> partial(grads == nullptr ? 0 : x.images * parts.per_image * parts.groups * kTaps * kLanes<A>);
    A* sums = grads == nullptr ? nullptr : static_cast<A*>(partial);
    with_rows<A>(x, parts, [&]<class T, bool staged>() {
      parallel(parts.items, [&](Share& items) { backward<A, T, staged>(grad_out, x, filter, grad_x, sums, parts, items); });
    });
    if (grads == nullptr) return;
    parallel(parts.groups, [&](Share& items) { reduce<A>(x, partial, *grads, parts, items); });
  });
}

}  // namespace segnext
