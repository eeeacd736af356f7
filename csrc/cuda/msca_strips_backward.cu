// msca_strips backward: its two passes one after the other, and the sums over their blocks.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/msca_strips_backward.h"
#include "cuda/sums.h"

namespace segnext::cuda {
namespace {

// One thread for each tap and bias of a channel.
template <class T>
__global__ void reduce(const float* input_sums, int64_t input_parts, const float* tap_sums, int64_t tap_parts, int channels,
                       const __grid_constant__ StripFilters grads) {
  const int tensor = blockIdx.y;
  const int branch = (tensor - 2) / 4, kind = (tensor - 2) % 4;  // row, bias, column, bias
  const int count = tensor_taps(tensor);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= channels * count) return;
  const int channel = i / count, tap = i - channel * count;
  float sum = 0;
  if (tensor < 2) {
    const float* from = input_sums + static_cast<int64_t>(channel) * kInputSums + (tensor == 0 ? tap : 25);
    sum = sum_parts(from, static_cast<int64_t>(channels) * kInputSums, input_parts);
  } else {
    const int place = kind == 1 ? kRowBiasSums + branch : kind == 3 ? kGradSum : tap_place(branch, tap);
    const float* from = tap_sums + static_cast<int64_t>(channel) * kTapSums + place + (kind == 2 ? kColumnSums : kRowSums);
    sum = sum_parts(from, static_cast<int64_t>(channels) * kTapSums, tap_parts);
  }
  Vec<T, 1> rounded;
  round_to(sum, rounded[0]);
  write<1>(static_cast<T*>(grads.tensors[tensor]) + i, rounded);
}

}  // namespace

int64_t msca_strips_backward_scratch(const Image& x) {
  return x.channels * (input_parts(x) * kInputSums + tap_parts(x) * kTapSums);
}

void msca_strips_backward(const Image& grad_out, const Image& x, const StripFilters& filters, const Image& grad_x,
                          const StripFilters* grads, float* scratch, cudaStream_t stream) {
  backward_inputs(grad_out, x, filters, grad_x, grads == nullptr ? nullptr : scratch, stream);
  if (grads == nullptr) return;
  const int64_t parts = input_parts(x);
  float* tap_sums = scratch + parts * x.channels * kInputSums;
  backward_taps(grad_out, x, filters, tap_sums, stream);
  const int channels = static_cast<int>(x.channels);
  with_storage(grads->dtype, [&]<class T>() {
    launch(reduce<T>, dim3(ceil_div(channels * 25, 128), kStripTensors), 128, 0, stream, static_cast<const float*>(scratch),
           parts, static_cast<const float*>(tap_sums), tap_parts(x), channels, *grads);
  });
}

}  // namespace segnext::cuda
