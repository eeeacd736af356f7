// The CPU kernels: plain functions over pointers and sizes. A kernel works on the items [begin, end) that it is given; which
// thread runs which items does not change any result.
#pragma once
#include "cpu/image.h"

namespace segnext {

// msca_strips: w5, b5, then row filter, bias, column filter, bias for the branches 7, 11, 21.
inline constexpr int kStripTensors = 14;
struct StripFilters {
  void* tensors[kStripTensors];
};

// Items: groups of channels of images.
int64_t msca_strips_items(const Image& x);
void msca_strips_forward(const Image& x, const StripFilters& filters, const Image& y, int64_t begin, int64_t end);

// grad_x.data may be null; partial may be null, else it takes msca_strips_partial_size(x) accumulators (x's items first).
int64_t msca_strips_partial_size(const Image& x);
void msca_strips_backward(const Image& grad_out, const Image& x, const StripFilters& filters, const Image& grad_x, void* partial,
                          int64_t begin, int64_t end);
// Sums the partial gradients over the images, in order.
void msca_strips_reduce(const Image& x, const void* partial, const StripFilters& grads);

int64_t dwconv_gelu_items(const Image& x);
void dwconv_gelu_forward(const Image& x, void* weight, void* bias, const Image& y, int64_t begin, int64_t end);
int64_t dwconv_gelu_partial_size(const Image& x);
void dwconv_gelu_backward(const Image& grad_out, const Image& x, void* weight, void* bias, const Image& grad_x, void* partial,
                          int64_t begin, int64_t end);
void dwconv_gelu_reduce(const Image& x, const void* partial, void* grad_weight, void* grad_bias);

}  // namespace segnext
