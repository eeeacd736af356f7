// msca_strips backward in two passes. With a = W5 x + b5, h_k = H_k a + bh_k and g the output's gradient:
//
//   inputs: da = g + sum_k V_k^T H_k^T g,  dx = W5^T da,  dW5 = sum da x (shifted),  db5 = sum da
//   taps:   u_k = V_k^T g,  dH_k[t] = sum u_k[r, w] a[r, w + t - k/2],  dbh_k = sum u_k
//           dV_k[t] = sum h_k[r, w] g[r - t + k/2, w],  dbv_k = sum g
//
// Both march like forward does: `inputs` with the transposed filters on g, `taps` with g's rows in the registers where forward
// has its sums. README.md says why two passes.
#pragma once
#include <cuda_runtime.h>

#include "cuda/strips.h"

namespace segnext::cuda {

inline constexpr int kInputSums = 26;  // dW5, db5
inline constexpr int kRowSums = 0, kColumnSums = kStripsTaps, kRowBiasSums = 2 * kStripsTaps,
                     kGradSum = kRowBiasSums + kBranches;
inline constexpr int kTapSums = kGradSum + 1;  // dH and dV in the order of the taps, dbh, dbv

// Parts of the images, each of which has its own sums in `partial`: [part][channel][kInputSums], or kTapSums.
int64_t input_parts(const Image& x);
int64_t tap_parts(const Image& x);

// grad_x.data may be null, and so may partial.
void backward_inputs(const Image& grad_out, const Image& x, const StripFilters& filters, const Image& grad_x, float* partial,
                     cudaStream_t stream);
void backward_taps(const Image& grad_out, const Image& x, const StripFilters& filters, float* partial, cudaStream_t stream);

}  // namespace segnext::cuda
