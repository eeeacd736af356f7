// What the kernels of every device take: images and filters, as pointers and sizes.
#pragma once
#include <cstdint>

namespace segnext {

inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

enum class Dtype { kFloat32, kFloat64, kBFloat16, kHalf };

// [N, C, H, W], dense, in either layout.
struct Image {
  void* data;
  Dtype dtype;
  bool channels_last;
  int64_t images, channels, height, width;
};

// msca_strips: w5, b5, then row filter, bias, column filter, bias for the branches 7, 11, 21.
inline constexpr int kStripTensors = 14;
inline constexpr int kStripTaps[kStripTensors] = {25, 1, 7, 1, 7, 1, 11, 1, 11, 1, 21, 1, 21, 1};
struct StripFilters {
  void* tensors[kStripTensors];
  Dtype dtype;  // the image's, or float32 beside 16 bits
};
inline constexpr int kBranches = 3;
inline constexpr int kBranchTaps[kBranches] = {7, 11, 21};
inline constexpr int kReach = 10;  // of the longest branch

struct DepthwiseFilter {
  void *weight, *bias;
  Dtype dtype;  // the image's, or float32 beside 16 bits
};

}  // namespace segnext
