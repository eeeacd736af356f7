// scale_add: x + keep[n] scale[c] y and the gradients of y and scale; that of x is the result's own.
#include <algorithm>

#include "cpu/image.h"
#include "cpu/kernels.h"

namespace segnext {
namespace {

// An item is a run of elements of one image that lie together in memory: whole pixels in channels_last, else of one channel.
// Runs are short enough for their sums not to lose what is added to them.
template <class A>
struct Runs {
  int64_t channels, pixels, per_run, cuts, per_image, items;
  bool channels_last;

  explicit Runs(const Image& x) : channels(x.channels), pixels(x.height * x.width), channels_last(x.channels_last) {
    per_run = channels_last ? 256 : 256 * kLanes<A>;
    cuts = ceil_div(pixels, per_run);
    per_image = channels_last ? cuts : channels * cuts;
    items = x.images * per_image;
  }
  int64_t padded() const { return round_up(channels, kLanes<A>); }
  // An item's partial sums of the scale's gradient: of every channel, or the lanes of one.
  int64_t sums() const { return channels_last ? padded() : kLanes<A>; }
};

// The factors of the channels, padded to whole vectors, and of the images.
template <class A>
struct Factors {
  Buffer<A> scale;
  const A* keep;

  Factors(const Image& x, const ResidualScale& f) : scale(Runs<A>(x).padded()), keep(static_cast<const A*>(f.keep)) {
    for (int64_t c = 0; c < x.channels; c += kLanes<A>) {
      load_row<A>(filter_row(f.scale, x.dtype, x.channels, 1), 0, c, 0, scale + c);
    }
  }
  Vector<A> of_channel(const Runs<A>& runs, int64_t c) const {
    return runs.channels_last ? load<A>(scale + c) : broadcast<A>(scale[c]);
  }
  A of_item(const Runs<A>& runs, int64_t item) const { return keep == nullptr ? A{1} : keep[item / runs.per_image]; }
};

// The product by itself, so that no multiply-add rounds it together with a sum and the result has the bits of plain PyTorch.
// (The compiler's own barriers take vectors to pieces.)
template <class V>
SEGNEXT_INLINE V rounded(V product) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(product));
#elif defined(__x86_64__)
  __asm__("" : "+x"(product));
#elif defined(__aarch64__)
  __asm__("" : "+w"(product));
#endif
  return product;
}

// f(c, i, count) for the vectors of an item: `count` elements from element i on, channels from c on, or of channel c alone.
template <class A, class F>
SEGNEXT_INLINE void for_vectors(const Runs<A>& runs, int64_t item, const F& f) {
  constexpr int L = kLanes<A>;
  const int64_t n = item / runs.per_image, part = item % runs.per_image;
  auto run = [&](int64_t first, int64_t length, int64_t channel, int64_t step) {
    int64_t i = 0;
    for (; i + L <= length; i += L) f(channel + i * step, first + i, std::integral_constant<int, L>{});
    if (i < length) f(channel + i * step, first + i, static_cast<int>(length - i));
  };
  const int64_t channel = runs.channels_last ? 0 : part / runs.cuts, begin = part % runs.cuts * runs.per_run;
  const int64_t end = std::min(runs.pixels, begin + runs.per_run);
  if (!runs.channels_last) return run((n * runs.channels + channel) * runs.pixels + begin, end - begin, channel, 0);
  for (int64_t p = begin; p < end; ++p) run((n * runs.pixels + p) * runs.channels, runs.channels, 0, 1);
}

template <class A, class X, class Y>
void forward(const Image& x, const Image& y, const ResidualScale& f, const Image& out, Share& items) {
  const Runs<A> runs(x);
  const X* from = static_cast<const X*>(x.data);
  const Y* add = static_cast<const Y*>(y.data);
  X* to = static_cast<X*>(out.data);
  const Factors<A> factors(x, f);
  for (const int64_t item : items) {
    const A keep = factors.of_item(runs, item);
    for_vectors<A>(runs, item, [&](int64_t c, int64_t i, auto count) {
      const Vector<A> scaled = factors.of_channel(runs, c) * load_lanes<A>(add + i, count) * keep;
      store_lanes<A>(to + i, load_lanes<A>(from + i, count) + rounded(scaled), count);
    });
  }
}

template <class A, class X, class Y>
void backward(const Image& grad_out, const Image& y, const ResidualScale& f, const Image& grad_y, A* partial, Share& items) {
  const Runs<A> runs(grad_out);
  const X* grad = static_cast<const X*>(grad_out.data);
  const Y* in = static_cast<const Y*>(y.data);
  Y* to = static_cast<Y*>(grad_y.data);
  const Factors<A> factors(grad_out, f);
  for (const int64_t item : items) {
    const A keep = factors.of_item(runs, item);
    A* sums = partial == nullptr ? nullptr : partial + item * runs.sums();
    if (sums != nullptr) std::memset(sums, 0, sizeof(A) * runs.sums());
    for_vectors<A>(runs, item, [&](int64_t c, int64_t i, auto count) {
      const Vector<A> g = load_lanes<A>(grad + i, count);
      if (to != nullptr) store_lanes<A>(to + i, g * keep * factors.of_channel(runs, c), count);
      if (sums == nullptr) return;
      A* sum = runs.channels_last ? sums + c : sums;
      store<A>(sum, load<A>(sum) + g * load_lanes<A>(in + i, count));
    });
  }
}

// The items' sums times keep, in order, in double.
template <class A>
void reduce(const Image& x, const A* partial, const ResidualScale& f, void* grad_scale) {
  constexpr int L = kLanes<A>;
  const Runs<A> runs(x);
  const Factors<A> factors(x, f);
  Buffer<double> total(runs.padded());
  Buffer<A> sum_of_channel(runs.padded());
  std::memset(total, 0, sizeof(double) * runs.padded());
  for (int64_t item = 0; item < runs.items; ++item) {
    const double keep = factors.of_item(runs, item);
    const A* sums = partial + item * runs.sums();
    if (runs.channels_last) {
      for (int64_t c = 0; c < x.channels; ++c) total[c] += keep * sums[c];
    } else {
      double sum = 0;
      for (int lane = 0; lane < L; ++lane) sum += sums[lane];
      total[item % runs.per_image / runs.cuts] += keep * sum;
    }
  }
  for (int64_t c = 0; c < runs.padded(); ++c) sum_of_channel[c] = static_cast<A>(total[c]);
  for (int64_t c = 0; c < x.channels; c += L) {
    store_row<A>(filter_row(grad_scale, x.dtype, x.channels, 1), 0, c, 0, sum_of_channel + c);
  }
}

// Calls f<A, X, Y>() with the type of accumulators and the storage types of x and y.
template <class F>
void with_types(Dtype x, Dtype y, const F& f) {
  with_accumulator(x, [&]<class A>() {
    with_storage<A>(x, [&]<class X>() { with_storage<A>(y, [&]<class Y>() { f.template operator()<A, X, Y>(); }); });
  });
}

}  // namespace

void scale_add_forward(const Image& x, const Image& y, const ResidualScale& factors, const Image& out,
                       const Parallel& parallel) {
  with_types(x.dtype, y.dtype, [&]<class A, class X, class Y>() {
    parallel(Runs<A>(x).items, [&](Share& items) { forward<A, X, Y>(x, y, factors, out, items); });
  });
}

void scale_add_backward(const Image& grad_out, const Image& y, const ResidualScale& factors, const Image& grad_y,
                        void* grad_scale, const Parallel& parallel) {
  with_types(grad_out.dtype, y.dtype, [&]<class A, class X, class Y>() {
    const Runs<A> runs(grad_out);
    Buffer<A> partial(grad_scale == nullptr ? 0 : runs.items * runs.sums());
    A* sums = grad_scale == nullptr ? nullptr : static_cast<A*>(partial);
    parallel(runs.items, [&](Share& items) { backward<A, X, Y>(grad_out, y, factors, grad_y, sums, items); });
    if (grad_scale != nullptr) reduce<A>(grad_out, partial, factors, grad_scale);
  });
}

}  // namespace segnext
