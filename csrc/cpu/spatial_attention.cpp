// spatial_attention: y = scale x + W2 ((W3 msca_strips(u) + b3) u) + b2 with u = GELU(W1 x + b1), in channels_last.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/matmul.h"

namespace segnext {
namespace {

// y, where the strips of u are, <- the gate and the second projection of pixels [first, last).
template <class T>
void gate_and_project(const Image& x, const AttentionWeights& w, const Weights<T>& gate, const Weights<T>& out, const T* u,
                      T* y, int64_t first, int64_t last, Operand<T>* gated) {
  const int64_t C = x.channels, count = last - first;
  const T* in = static_cast<const T*>(x.data) + first * C;
  u += first * C;
  y += first * C;
  matmul<T>({y, C, count, C}, gate, [&](int64_t m, auto rows, int64_t c, int lanes, const auto& z) {
    constexpr int count = rows;
    const Vector<float> bias = load_lanes(w.gate.bias + c, lanes);
    SEGNEXT_UNROLL
    for (int i = 0; i < count; ++i) {
      const int64_t at = (m + i) * C + c;
      store_lanes(gated + at, (z[i] + bias) * load_lanes(u + at, lanes), lanes);
    }
  });
  matmul<T, MadePixels<T>>({gated, C, count, C}, out, [&](int64_t m, auto rows, int64_t c, int lanes, const auto& z) {
    constexpr int count = rows;
    const Vector<float> bias = load_lanes(w.out.bias + c, lanes), scale = load_lanes(w.scale + c, lanes);
    SEGNEXT_UNROLL
    for (int i = 0; i < count; ++i) {
      const int64_t at = (m + i) * C + c;
      store_lanes(y + at, z[i] + bias + scale * load_lanes(in + at, lanes), lanes);
    }
  });
}

}  // namespace

void spatial_attention_forward(const Image& x, const AttentionWeights& w, const Image& y, const Parallel& parallel) {
  with_dense_type(x.dtype, [&]<class T>() {
    const int64_t C = x.channels, pixels = x.images * x.height * x.width, blocks = ceil_div(pixels, kPixels);
    Buffer<T> u(pixels * C);
    Image in = x;
    in.data = u;
    conv_act_forward(x, {w.in, 1, 1, Activation::kGelu}, in, parallel);
    msca_strips_forward(in, w.strips, y, parallel);
    parallel(blocks, [&](Share& items) {
      Buffer<Operand<T>> gated(kPixels * C);
      const bool once = blocks <= parallel.threads;
      const Weights<T> gate = prepared<T>({static_cast<const T*>(w.gate.data), C, C}, once);
      const Weights<T> out = prepared<T>({static_cast<const T*>(w.out.data), C, C}, once);
      for (const int64_t block : items) {
        const int64_t first = block * kPixels, last = std::min(first + kPixels, pixels);
        gate_and_project<T>(x, w, gate, out, u, static_cast<T*>(y.data), first, last, gated);
      }
    });
  });
}

}  // namespace segnext
