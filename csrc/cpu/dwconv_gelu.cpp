// dwconv_gelu: 3x3 depthwise convolution, bias and GELU in one pass; backward recomputes the convolution.
#include <algorithm>

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

// An item is a part of an image's rows in a block of channel groups. In channels_last a block is as wide as the cache allows,
// since its channels lie side by side in memory; the parts, like the blocks, are cut by the shape alone.
template <class A>
struct Parts {
  int64_t groups, rows, per_image, block, blocks, items;

  explicit Parts(const Image& x) : groups(Groups<A>(x).per_image) {
    constexpr int64_t kCache = 384 * 1024, kPartRows = 16, kEnoughItems = 16;
    rows = x.channels_last ? kPartRows : x.height > 0 ? x.height : 1;
    per_image = (x.height + rows - 1) / rows;
    const int64_t fits = kCache / (kK * (x.width + 2) * kVectorBytes), share = x.images * per_image * groups / kEnoughItems;
    block = x.channels_last ? std::max<int64_t>(1, std::min(fits, share)) : 1;
    blocks = (groups + block - 1) / block;
    items = x.images * per_image * blocks;
  }
};

// One item's place: rows [first, last) of image n, `groups` groups of channels from group `group`, channel c on.
template <class A>
struct Part {
  int64_t n, index, first, last, group, groups, c;

  Part(const Image& x, const Parts<A>& parts, int64_t item) : index(item / parts.blocks) {
    n = index / parts.per_image;
    first = index % parts.per_image * parts.rows;
    last = std::min(first + parts.rows, x.height);
    group = item % parts.blocks * parts.block;
    groups = std::min(parts.block, parts.groups - group);
    c = group * kLanes<A>;
  }
};

// taps [groups][kTaps][kLanes] <- the filter and the bias
template <class A>
void load_taps(const Image& x, const DepthwiseFilter& filter, const Part<A>& part, A* taps) {
  constexpr int L = kLanes<A>;
  load_row<A>(filter_row(filter.weight, x.dtype, x.channels, kTaps - 1), 0, part.c, 0, taps, part.groups, kTaps * L);
  load_row<A>(filter_row(filter.bias, x.dtype, x.channels, 1), 0, part.c, 0, taps + (kTaps - 1) * L, part.groups, kTaps * L);
}

// f(w, z) for tiles z of a row of the convolution
template <class A, class F>
SEGNEXT_INLINE void convolve_row(const A* const (&rows)[kK], const A* taps, int64_t width, const F& f) {
  for_tiles<kTile>(width, [&](int64_t w, auto size) {
    constexpr int tile = size;
    Vector<A> z[tile];
    depthwise_tile<A, kK, tile>(rows, taps, load<A>(taps + (kTaps - 1) * kLanes<A>), w, z);
    SEGNEXT_UNROLL
    for (int i = 0; i < tile; ++i) f((w + i) * kLanes<A>, z[i]);
  });
}

template <class A>
void forward(const Image& x, const DepthwiseFilter& filter, const Image& y, const Parts<A>& parts, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  const int64_t out_group = x.width * L;
  Buffer<A> taps(parts.block * kTaps * L), out(parts.block * out_group);
  RowRing<A> x_rows(kK, x.width, kK / 2, parts.block);
  for (int64_t item = begin; item < end; ++item) {
    const Part<A> part(x, parts, item);
    load_taps<A>(x, filter, part, taps);
    int64_t next = std::max<int64_t>(part.first - 1, 0);
    for (int64_t row = part.first; row < part.last; ++row) {
      for (; next <= row + 1 && next < x.height; ++next) {
        load_row<A>(x, part.n, part.c, next, x_rows[next], part.groups, x_rows.group_size());
      }
      for (int64_t g = 0; g < part.groups; ++g) {
        const A* rows[kK];
        x_rows.window(row, g, x.height, rows);
        A* to = out + g * out_group;
        convolve_row<A>(rows, taps + g * kTaps * L, x.width,
                        [&](int64_t at, Vector<A> z) { store<A>(to + at, z * normal_cdf(z)); });
      }
      store_row<A>(y, part.n, part.c, row, out, part.groups, out_group);
    }
  }
}

// A part computes the row of dz before and after its own once more.
template <class A>
void backward(const Image& grad_out, const Image& x, const DepthwiseFilter& filter, const Image& grad_x, A* partial,
              const Parts<A>& parts, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  const int64_t width = x.width, height = x.height, out_group = width * L;
  Buffer<A> taps(parts.block * kTaps * L), transposed(parts.block * (kTaps - 1) * L), out(parts.block * out_group),
      grad(parts.block * out_group);
  RowRing<A> x_rows(kK, width, kK / 2, parts.block), dz_rows(kK, width, kK / 2, parts.block);
  for (int64_t item = begin; item < end; ++item) {
    const Part<A> part(x, parts, item);
    load_taps<A>(x, filter, part, taps);
    for (int64_t g = 0; g < part.groups; ++g) {
      reverse_taps<A>(taps + g * kTaps * L, kTaps - 1, transposed + g * (kTaps - 1) * L);
    }
    A* sums = partial == nullptr ? nullptr : partial + (part.index * parts.groups + part.group) * kTaps * L;
    if (sums != nullptr) std::memset(sums, 0, sizeof(A) * part.groups * kTaps * L);

    auto write_grad_x = [&](int64_t row) {
      for (int64_t g = 0; g < part.groups; ++g) {
        const A* rows[kK];
        dz_rows.window(row, g, height, rows);
        depthwise<A, kK>(rows, transposed + g * (kTaps - 1) * L, Vector<A>{}, width, out + g * out_group);
      }
      store_row<A>(grad_x, part.n, part.c, row, out, part.groups, out_group);
    };
    const int64_t begin_row = std::max<int64_t>(part.first - 1, 0), end_row = std::min(part.last + 1, height);
    int64_t next = std::max<int64_t>(begin_row - 1, 0);
    for (int64_t row = begin_row; row < end_row; ++row) {
      for (; next <= row + 1 && next < height; ++next) {
        load_row<A>(x, part.n, part.c, next, x_rows[next], part.groups, x_rows.group_size());
      }
      load_row<A>(grad_out, part.n, part.c, row, grad, part.groups, out_group);
      for (int64_t g = 0; g < part.groups; ++g) {
        const A *rows[kK], *dy = grad + g * out_group;
        A* dz = dz_rows(row, g);
        x_rows.window(row, g, height, rows);
        convolve_row<A>(rows, taps + g * kTaps * L, width,
                        [&](int64_t at, Vector<A> z) { store<A>(dz + at, load<A>(dy + at) * gelu_slope<A>(z)); });
        if (sums != nullptr && row >= part.first && row < part.last) {
          depthwise_grad<A, kK>(dz, rows, width, sums + g * kTaps * L);
          add_row_sum<A>(dz, width, sums + (g * kTaps + kTaps - 1) * L);
        }
      }
      if (grad_x.data != nullptr && row > part.first) write_grad_x(row - 1);
    }
    if (grad_x.data != nullptr && part.last == height) write_grad_x(height - 1);
  }
}

// Sums the items' gradients over images and parts, in order.
template <class A>
void reduce(const Image& x, const A* partial, const DepthwiseFilter& grads, const Parts<A>& parts, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  Buffer<A> total(kTaps * L);
  for (int64_t group = begin; group < end; ++group) {
    sum_partial<A>(partial, x.images * parts.per_image, parts.groups, kTaps, group, total);
    store_row<A>(filter_row(grads.weight, x.dtype, x.channels, kTaps - 1), 0, group * L, 0, total);
    store_row<A>(filter_row(grads.bias, x.dtype, x.channels, 1), 0, group * L, 0, total + (kTaps - 1) * L);
  }
}

}  // namespace

void dwconv_gelu_forward(const Image& x, const DepthwiseFilter& filter, const Image& y, const Parallel& parallel) {
  with_accumulator(x.dtype, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    const Parts<A> parts(x);
    parallel(parts.items, [&](int64_t begin, int64_t end) { forward<A>(x, filter, y, parts, begin, end); });
  });
}

void dwconv_gelu_backward(const Image& grad_out, const Image& x, const DepthwiseFilter& filter, const Image& grad_x,
                          const DepthwiseFilter* grads, const Parallel& parallel) {
  with_accumulator(x.dtype, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    const Parts<A> parts(x);
    Buffer<A> partial(grads == nullptr ? 0 : x.images * parts.per_image * parts.groups * kTaps * kLanes<A>);
    parallel(parts.items, [&](int64_t begin, int64_t end) {
      backward<A>(grad_out, x, filter, grad_x, grads == nullptr ? nullptr : static_cast<A*>(partial), parts, begin, end);
    });
    if (grads == nullptr) return;
    parallel(parts.groups, [&](int64_t begin, int64_t end) { reduce<A>(x, partial, *grads, parts, begin, end); });
  });
}

}  // namespace segnext
