// The CPU kernels: plain functions over pointers and sizes that know nothing of torch. No result depends on the number of
// threads: where sums cross items, the work is cut into items by the shapes alone.
#pragma once
#include "arguments.h"
#include "cpu/parallel.h"

namespace segnext {

void msca_strips_forward(const Image& x, const StripFilters& filters, const Image& y, const Parallel& parallel);
// grad_x.data may be null, and so may grads.
void msca_strips_backward(const Image& grad_out, const Image& x, const StripFilters& filters, const Image& grad_x,
                          const StripFilters* grads, const Parallel& parallel);

void dwconv_gelu_forward(const Image& x, const DepthwiseFilter& filter, const Image& y, const Parallel& parallel);
void dwconv_gelu_backward(const Image& grad_out, const Image& x, const DepthwiseFilter& filter, const Image& grad_x,
                          const DepthwiseFilter* grads, const Parallel& parallel);

// out = x + keep[n] scale[c] y, all images in one layout; scale has x's dtype, y its own; keep [N] may be null.
struct ResidualScale {
  void* scale;
  const void* keep;  // accumulators
};
void scale_add_forward(const Image& x, const Image& y, const ResidualScale& factors, const Image& out,
                       const Parallel& parallel);
// grad_y.data may be null, and so may grad_scale.
void scale_add_backward(const Image& grad_out, const Image& y, const ResidualScale& factors, const Image& grad_y,
                        void* grad_scale, const Parallel& parallel);

// A batch of matrices [B, D, N], N fastest in memory or (transposed) D fastest.
struct Matrices {
  void* data;
  Dtype dtype;
  bool transposed;
  int64_t batch, rows, columns;
};
inline constexpr int64_t kMostSteps = 1 << 20;  // of nmf
// bases [B, D, rank] are accumulators, and so are the factors that forward may leave for backward, in an order of their own.
// rounded: in products with bfloat16 x the factors may be rounded to it, where nothing is left for backward.
// one_step: backward differentiates the last update of the coefficients alone. nmf_factors_size throws std::bad_alloc for more
// than any memory holds.
int64_t nmf_factors_size(const Matrices& x, int64_t rank, int64_t steps, bool one_step);
// projection [D, D], accumulators, may be null: else y is multiplied with it from the left.
void nmf_forward(const Matrices& x, const void* bases, int64_t rank, int64_t steps, bool rounded, bool one_step, void* factors,
                 const void* projection, const Matrices& y, const Parallel& parallel);
// factors may be null, and are then computed again; so may what of the gradients is not wanted.
struct NmfGradients {
  Matrices x;
  void *bases, *projection;  // accumulators
};
void nmf_backward(const Matrices& grad_out, const Matrices& x, const void* bases, const void* factors, const void* projection,
                  int64_t rank, int64_t steps, bool one_step, const NmfGradients& gradients, const Parallel& parallel);

// labels [N, height, width] <- the highest class of upsampled logits
void upsample_argmax_forward(const Image& logits, int64_t height, int64_t width, int64_t* labels, const Parallel& parallel);

// labels [N, height, width]; weights: of the classes, accumulators, may be null.
struct Targets {
  const int64_t* labels;
  int64_t height, width;
  const void* weights;
  int64_t ignored;
};
// The weighted mean of the losses, 0 without any; throws std::runtime_error where a label is out of range.
double upsample_cross_entropy_forward(const Image& logits, const Targets& targets, const Parallel& parallel);
void upsample_cross_entropy_backward(double grad_out, const Image& logits, const Targets& targets, const Image& grad_logits,
                                     const Parallel& parallel);

// Weights of a matrix product, packed as segnext_kernels/_pack.py says into panels of kPanel columns, in x's dtype, and their
// bias.
struct PackedWeights {
  const void* data;
  const float* bias;
};
inline constexpr int kPanel = 32;

enum class Activation { kNone, kGelu, kRelu };

// For inference, float or BFloat16. Images are channels_last, but conv_act's x may have either layout.
struct Convolution {
  PackedWeights weights;
  int64_t kernel, stride;  // the padding is half the kernel
  Activation activation;
};
void conv_act_forward(const Image& x, const Convolution& conv, const Image& y, const Parallel& parallel);

struct AttentionWeights {
  PackedWeights in;
  StripFilters strips;
  PackedWeights gate, out;
  const float* scale;
};
void spatial_attention_forward(const Image& x, const AttentionWeights& w, const Image& y, const Parallel& parallel);

// Of every pixel's channels; weight may be null, and then there is none.
struct LayerNorm {
  const float *weight, *bias;
  float epsilon;
};
struct MlpWeights {
  PackedWeights fc1;
  const float *depthwise, *depthwise_bias;  // [hidden][9], [hidden]
  PackedWeights fc2;
  int64_t hidden;
  LayerNorm norm;
};
void mlp_forward(const Image& x, const MlpWeights& w, const Image& y, const Parallel& parallel);

struct GroupNorm {
  const float *weight, *bias;
  int64_t groups;
  float epsilon;
};
// residual.data may be null.
void group_norm_relu_forward(const Image& x, const GroupNorm& norm, const Image& residual, const Image& y,
                             const Parallel& parallel);

struct HamburgerWeights {
  PackedWeights in;
  const float *bases, *out;  // [N][C][rank], [C][C]
  GroupNorm norm;
  int64_t rank, steps;
  bool rounded;  // as in nmf_forward
};
void hamburger_forward(const Image& x, const HamburgerWeights& w, const Image& y, const Parallel& parallel);

// `count` maps of y's dtype, the first of y's size, and as many packed weights.
void resize_concat_conv_forward(const Image* maps, const void* const* weights, int64_t count, const float* bias, const Image& y,
                                const Parallel& parallel);

}  // namespace segnext
