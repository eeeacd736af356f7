// The bindings of the operators that are for the CPU and for CUDA alike. Kernels are those of a device, which are made for one
// call of its tensors: x and others that must be where x is.
#pragma once
#include "tensors.h"

namespace segnext::tensors {

using Tensors = std::vector<Tensor>;

template <class Kernels>
Tensor msca_strips(const Tensor& given, const Tensors& weights) {
  const Tensor x = arranged(given);
  const Image in = image(x, "x");
  const Kernels kernels(x, weights);
  const Filters filters = strip_filters(weights, in);
  Tensor y = torch::stable::empty_like(x);
  kernels.msca_strips(in, filters.pointers, image_like(y, in, "y"));
  return y;
}

template <class Kernels>
std::tuple<Tensor, Tensors> msca_strips_backward(const Tensor& grad_out, const Tensor& given, const Tensors& weights,
                                                 bool need_x, bool need_weights) {
  const Tensor x = arranged(given);
  const Image in = image(x, "x");
  Tensors others = weights;
  others.push_back(grad_out);
  const Kernels kernels(x, others);
  const Tensor gradient = arranged_like(grad_out, in, "grad_out");
  const Image grad = image_like(gradient, in, "grad_out");
  const Filters filters = strip_filters(weights, in);
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : empty(x);
  Tensors grads;
  StripFilters pointers = filters.pointers;
  for (size_t i = 0; need_weights && i < weights.size(); ++i) {
    grads.push_back(gradient_of(weights[i]));
    pointers.tensors[i] = grads.back().data_ptr();
  }
  kernels.msca_strips_backward(grad, in, filters.pointers, need_x ? image_like(grad_x, in, "grad_x") : Image{},
                               need_weights ? &pointers : nullptr);
  return {grad_x, grads};
}

// A filter's tensors, and pointers to them.
struct Depthwise3x3 {
  Depthwise3x3(const Tensor& weight, const Tensor& bias, const Image& x)
      : pointers{nullptr, nullptr, filter_dtype(weight, x)},
        kept_weight(filter(weight, {x.channels, 1, 3, 3}, "weight", pointers.dtype)),
        kept_bias(filter(bias, {x.channels}, "bias", pointers.dtype)) {
    pointers.weight = data_of(kept_weight, "weight");
    pointers.bias = data_of(kept_bias, "bias");
  }
  DepthwiseFilter pointers;
  Tensor kept_weight, kept_bias;
};

template <class Kernels>
Tensor dwconv_gelu(const Tensor& given, const Tensor& weight, const Tensor& bias) {
  const Tensor x = arranged(given);
  const Image in = image(x, "x");
  const Kernels kernels(x, {weight, bias});
  const Depthwise3x3 filter(weight, bias, in);
  Tensor y = torch::stable::empty_like(x);
  kernels.dwconv_gelu(in, filter.pointers, image_like(y, in, "y"));
  return y;
}

template <class Kernels>
std::tuple<Tensor, Tensor, Tensor> dwconv_gelu_backward(const Tensor& grad_out, const Tensor& given, const Tensor& weight,
                                                        const Tensor& bias, bool need_x, bool need_weights) {
  const Tensor x = arranged(given);
  const Image in = image(x, "x");
  const Kernels kernels(x, {weight, bias, grad_out});
  const Tensor gradient = arranged_like(grad_out, in, "grad_out");
  const Image grad = image_like(gradient, in, "grad_out");
  const Depthwise3x3 filter(weight, bias, in);
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : empty(x);
  Tensor grad_weight = need_weights ? gradient_of(weight) : empty(x);
  Tensor grad_bias = need_weights ? gradient_of(bias) : empty(x);
  const DepthwiseFilter grads = {grad_weight.data_ptr(), grad_bias.data_ptr(), filter.pointers.dtype};
  kernels.dwconv_gelu_backward(grad, in, filter.pointers, need_x ? image_like(grad_x, in, "grad_x") : Image{},
                               need_weights ? &grads : nullptr);
  return {grad_x, grad_weight, grad_bias};
}

// Registers them for a device; what is boxed is named without commas.
template <class Kernels, class Library>
void register_convolutions(Library& m) {
  m.impl("msca_strips", TORCH_BOX(&msca_strips<Kernels>));
  m.impl("msca_strips_backward", TORCH_BOX(&msca_strips_backward<Kernels>));
  m.impl("dwconv_gelu", TORCH_BOX(&dwconv_gelu<Kernels>));
  m.impl("dwconv_gelu_backward", TORCH_BOX(&dwconv_gelu_backward<Kernels>));
}

}  // namespace segnext::tensors
