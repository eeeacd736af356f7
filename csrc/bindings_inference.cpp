// The registration of the operators that serve inference alone.
#include "threads.h"

namespace {

using namespace segnext::tensors;
using segnext::Activation;
using segnext::AttentionWeights;
using segnext::ceil_div;
using segnext::Convolution;
using segnext::Dtype;
using segnext::GroupNorm;
using segnext::HamburgerWeights;
using segnext::Image;
using segnext::kMostSteps;
using segnext::kPanel;
using segnext::kStripTensors;
using segnext::LayerNorm;
using segnext::MlpWeights;
using segnext::PackedWeights;

// An image that is stored pixel by pixel.
Image pixels(const Tensor& t, const char* name) {
  Image x = image(t, name);
  STD_TORCH_CHECK(x.dtype == Dtype::kFloat32 || x.dtype == Dtype::kBFloat16, "segnext_kernels: ", name,
                  " must be float32 or bfloat16");
  STD_TORCH_CHECK(t.numel() == 0 || dense(t, {0, 2, 3, 1}), "segnext_kernels: ", name, " must be channels_last");
  x.channels_last = true;
  return x;
}

// t pixel by pixel: itself or a copy, for the reason of arranged().
Tensor in_pixels(const Tensor& t) {
  const bool other = t.dim() == 4 && t.numel() > 0 && !dense(t, {0, 2, 3, 1});
  return other ? torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast) : t;
}

const float* floats(const Tensor& t, const Shape& shape, const char* name, const char* of = "") {
  return static_cast<const float*>(numbers(t, shape, Dtype::kFloat32, std::string(of) + name));
}

PackedWeights packed(const Tensor& weight, const Tensor& bias, int64_t depth, int64_t columns, const Image& x,
                     const char* name) {
  STD_TORCH_CHECK(depth > 0, "segnext_kernels: ", name, " has no inputs");
  const int64_t panels = ceil_div(columns, kPanel);
  const bool pairs = x.dtype == Dtype::kBFloat16;
  const Shape shape = pairs ? Shape{panels, ceil_div(depth, 2), kPanel, 2} : Shape{panels, depth, kPanel};
  return {numbers(weight, shape, x.dtype, std::string(name) + ", packed,"), floats(bias, {columns}, name, "the bias of ")};
}

Tensor empty_pixels(const Tensor& like, int64_t images, int64_t channels, int64_t height, int64_t width) {
  Tensor t = torch::stable::new_empty(like, {images, height, width, channels});
  return torch::stable::transpose(torch::stable::transpose(t, 1, 3), 2, 3);
}

Tensor conv_act(const Tensor& given, const Tensor& weight, const Tensor& bias, int64_t kernel_size, int64_t stride,
                const std::string& activation) {
  const Tensor x = arranged(given);
  const Image in = image(x, "x");
  STD_TORCH_CHECK(in.dtype == Dtype::kFloat32 || in.dtype == Dtype::kBFloat16,
                  "segnext_kernels: x must be float32 or bfloat16");
  constexpr int64_t kLargest = 1 << 16;  // whose square times channels is still a number
  STD_TORCH_CHECK(kernel_size > 0 && kernel_size % 2 == 1 && kernel_size < kLargest && stride > 0,
                  "segnext_kernels: kernel_size must be odd and below ", kLargest, ", and stride positive");
  const int64_t columns = bias.numel();
  Convolution conv{packed(weight, bias, in.channels * kernel_size * kernel_size, columns, in, "weight"), kernel_size, stride,
                   activation == "gelu"   ? Activation::kGelu
                   : activation == "relu" ? Activation::kRelu
                                          : Activation::kNone};
  STD_TORCH_CHECK(conv.activation != Activation::kNone || activation == "none",
                  "segnext_kernels: activation must be none, gelu or relu, got ", activation);
  auto size = [&](int64_t n) { return n > 0 ? (n - 1) / stride + 1 : 0; };
  Tensor y = empty_pixels(x, in.images, columns, size(in.height), size(in.width));
  segnext::conv_act_forward(in, conv, pixels(y, "y"), parallel());
  return y;
}

// weights: of the first projection, 14 strips, the gate, the second projection, scale; packed weights are followed by a bias.
Tensor spatial_attention(const Tensor& given, const std::vector<Tensor>& weights) {
  constexpr size_t kStrips = kStripTensors;
  const Tensor x = in_pixels(given);
  const Image in = pixels(x, "x");
  STD_TORCH_CHECK(weights.size() == kStrips + 7, "segnext_kernels: spatial_attention takes ", kStrips + 7, " weights");
  const Filters strips = strip_filters({weights.begin() + 2, weights.begin() + 2 + kStrips}, in, 2);
  auto dense_at = [&](size_t i, const char* name) {
    return packed(weights[i], weights[i + 1], in.channels, in.channels, in, name);
  };
  const AttentionWeights w{dense_at(0, "proj_1"), strips.pointers, dense_at(kStrips + 2, "conv3"),
                           dense_at(kStrips + 4, "proj_2"), floats(weights[kStrips + 6], {in.channels}, "scale")};
  Tensor y = torch::stable::empty_like(x);
  segnext::spatial_attention_forward(in, w, pixels(y, "y"), parallel());
  return y;
}

Tensor mlp(const Tensor& given, const Tensor& fc1, const Tensor& bias1, const Tensor& depthwise, const Tensor& depthwise_bias,
           const Tensor& fc2, const Tensor& bias2, const std::optional<Tensor>& norm_weight,
           const std::optional<Tensor>& norm_bias, double eps) {
  const Tensor x = in_pixels(given);
  const Image in = pixels(x, "x");
  const int64_t hidden = bias1.numel();
  STD_TORCH_CHECK(hidden > 0, "segnext_kernels: fc1 must have at least one output");
  STD_TORCH_CHECK(norm_weight.has_value() == norm_bias.has_value(), "segnext_kernels: a norm has a weight and a bias");
  LayerNorm norm{};
  if (norm_weight) {
    norm = {floats(*norm_weight, {in.channels}, "norm_weight"), floats(*norm_bias, {in.channels}, "norm_bias"),
            static_cast<float>(eps)};
  }
  const MlpWeights w{packed(fc1, bias1, in.channels, hidden, in, "fc1"),
                     floats(depthwise, {hidden, 1, 3, 3}, "depthwise"),
                     floats(depthwise_bias, {hidden}, "depthwise_bias"),
                     packed(fc2, bias2, hidden, in.channels, in, "fc2"),
                     hidden,
                     norm};
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() > 0) segnext::mlp_forward(in, w, pixels(y, "y"), parallel());
  return y;
}

GroupNorm group_norm(const Tensor& weight, const Tensor& bias, int64_t groups, double eps, const Image& x) {
  STD_TORCH_CHECK(groups > 0 && x.channels % groups == 0, "segnext_kernels: ", groups, " groups do not divide ", x.channels,
                  " channels");
  return {floats(weight, {x.channels}, "the norm's weight"), floats(bias, {x.channels}, "the norm's bias"), groups,
          static_cast<float>(eps)};
}

Tensor group_norm_relu(const Tensor& given, const Tensor& weight, const Tensor& bias, int64_t groups, double eps,
                       const std::optional<Tensor>& residual) {
  const Tensor x = in_pixels(given);
  const Image in = pixels(x, "x");
  const GroupNorm norm = group_norm(weight, bias, groups, eps, in);
  Image add{};
  const Tensor added = residual ? in_pixels(*residual) : x;
  if (residual) {
    add = image_like(added, in, "residual");
    pixels(added, "residual");
  }
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() > 0) segnext::group_norm_relu_forward(in, norm, add, pixels(y, "y"), parallel());
  return y;
}

Tensor hamburger(const Tensor& given, const Tensor& ham_in, const Tensor& bias, const Tensor& bases, int64_t steps,
                 const Tensor& ham_out, const Tensor& norm_weight, const Tensor& norm_bias, int64_t groups, double eps,
                 bool round_factors) {
  const Tensor x = in_pixels(given);
  const Image in = pixels(x, "x");
  const int64_t C = in.channels;
  STD_TORCH_CHECK(bases.dim() == 3 && bases.size(0) == in.images && bases.size(1) == C && bases.size(2) > 0,
                  "segnext_kernels: bases must be [N, C, R] for x [N, C, H, W]");
  STD_TORCH_CHECK(steps >= 0 && steps <= kMostSteps, "segnext_kernels: steps must be between 0 and ", kMostSteps);
  const HamburgerWeights w{packed(ham_in, bias, C, C, in, "ham_in"),
                           floats(bases, {in.images, C, bases.size(2)}, "bases"),
                           floats(ham_out, {C, C}, "ham_out"),
                           group_norm(norm_weight, norm_bias, groups, eps, in),
                           bases.size(2),
                           steps,
                           round_factors};
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() > 0) segnext::hamburger_forward(in, w, pixels(y, "y"), parallel());
  return y;
}

Tensor resize_concat_conv(std::vector<Tensor> maps, const std::vector<Tensor>& weights, const Tensor& bias) {
  STD_TORCH_CHECK(!maps.empty() && maps.size() == weights.size(), "segnext_kernels: as many maps as weights are needed");
  std::vector<Image> images;
  std::vector<const void*> pointers;
  for (size_t i = 0; i < maps.size(); ++i) {
    maps[i] = in_pixels(maps[i]);
    images.push_back(pixels(maps[i], "maps"));
    STD_TORCH_CHECK(images[i].dtype == images[0].dtype && images[i].images == images[0].images,
                    "segnext_kernels: maps must have one dtype and batch size");
    STD_TORCH_CHECK(images[i].height > 0 && images[i].width > 0, "segnext_kernels: maps must have pixels");
    pointers.push_back(packed(weights[i], bias, images[i].channels, bias.numel(), images[i], "weights").data);
  }
  const Image& first = images[0];
  Tensor y = empty_pixels(maps[0], first.images, bias.numel(), first.height, first.width);
  segnext::resize_concat_conv_forward(images.data(), pointers.data(), static_cast<int64_t>(images.size()),
                                      floats(bias, {bias.numel()}, "bias"), pixels(y, "y"), parallel());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(segnext_kernels, CPU, m) {
  m.impl("conv_act", TORCH_BOX(&conv_act));
  m.impl("spatial_attention", TORCH_BOX(&spatial_attention));
  m.impl("mlp", TORCH_BOX(&mlp));
  m.impl("group_norm_relu", TORCH_BOX(&group_norm_relu));
  m.impl("hamburger", TORCH_BOX(&hamburger));
  m.impl("resize_concat_conv", TORCH_BOX(&resize_concat_conv));
}
