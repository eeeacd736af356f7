// The CUDA kernels: plain functions over device pointers and sizes that know nothing of torch. They run on `stream` of the
// current device, allocate nothing, and return before the work is done. Work is cut into blocks by the shapes and by the
// shared memory that a block may have, and sums across blocks are made in a fixed order: no result depends on anything else.
#pragma once
#include <cuda_runtime.h>

#include "arguments.h"

namespace segnext::cuda {

void msca_strips_forward(const Image& x, const StripFilters& filters, const Image& y, cudaStream_t stream);
// Floats of scratch memory that the gradients of the filters need.
int64_t msca_strips_backward_scratch(const Image& x);
// grad_x.data may be null, and so may grads.
void msca_strips_backward(const Image& grad_out, const Image& x, const StripFilters& filters, const Image& grad_x,
                          const StripFilters* grads, float* scratch, cudaStream_t stream);

void dwconv_gelu_forward(const Image& x, const DepthwiseFilter& filter, const Image& y, cudaStream_t stream);
int64_t dwconv_gelu_backward_scratch(const Image& x);
// grad_x.data may be null, and so may grads.
void dwconv_gelu_backward(const Image& grad_out, const Image& x, const DepthwiseFilter& filter, const Image& grad_x,
                          const DepthwiseFilter* grads, float* scratch, cudaStream_t stream);

}  // namespace segnext::cuda
