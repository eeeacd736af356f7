// Tensors -> pointers, with the checks that memory safety needs. For the bindings alone; SEGNEXT_CUDA says that tensors are on
// a GPU.
#pragma once
#undef Py_LIMITED_API  // torch's build adds its own
#define Py_LIMITED_API 0x030a0000
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"

namespace segnext::tensors {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A None among the arguments is a tensor that is not defined, of which nothing else can be asked.
#ifdef SEGNEXT_CUDA
inline constexpr char kDevice[] = "a CUDA device";
inline bool on_device(const Tensor& t) { return t.defined() && t.is_cuda(); }
#else
inline constexpr char kDevice[] = "the CPU";
inline bool on_device(const Tensor& t) { return t.defined() && t.is_cpu(); }
#endif

// A tensor's memory, which offloaders take away while the tensor stays. Asked for as what is only read, so that a lazy clone
// stays one; what is written is new and nobody's clone.
inline void* data_of(const Tensor& t, const char* name) {
  void* data = const_cast<void*>(t.const_data_ptr());
  STD_TORCH_CHECK(data != nullptr || t.numel() == 0, "segnext_kernels: ", name, " has no memory: its storage was freed");
  return data;
}

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      STD_TORCH_CHECK(false, "segnext_kernels: ", name, " must be float32, float64, bfloat16 or float16");
  }
}

// Whether the strides are those of a dense tensor whose dimensions lie in memory in this order (strides of length 1 are free).
inline bool dense(const Tensor& t, std::initializer_list<int> order) {
  int64_t expected = 1;
  for (auto d = std::rbegin(order); d != std::rend(order); ++d) {
    if (t.size(*d) != 1 && t.stride(*d) != expected) return false;
    expected *= t.size(*d);
  }
  return true;
}

// t as the kernels take it: itself if it is contiguous or its second dimension lies innermost, as in channels_last, else a
// copy. The public functions bring no other, but graphs that were traced or exported are called with whatever there is.
inline Tensor arranged(const Tensor& t) {
  if (t.numel() == 0) return t;
  if (t.dim() == 4) return dense(t, {0, 1, 2, 3}) || dense(t, {0, 2, 3, 1}) ? t : torch::stable::contiguous(t);
  if (t.dim() == 3) return dense(t, {0, 1, 2}) || dense(t, {0, 2, 1}) ? t : torch::stable::contiguous(t);
  return t;
}

inline const char* name_of(Dtype dtype) {
  return dtype == Dtype::kFloat32   ? "float32"
         : dtype == Dtype::kFloat64 ? "float64"
         : dtype == Dtype::kHalf    ? "float16"
                                    : "bfloat16";
}

// What sums of a dtype are kept in.
inline Dtype accumulator_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32; }
inline ScalarType scalar_type(Dtype accumulator) {
  return accumulator == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline Image image(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(on_device(t) && t.dim() == 4, "segnext_kernels: ", name, " must be a tensor [N, C, H, W] on ", kDevice);
  const bool contiguous = t.numel() == 0 || dense(t, {0, 1, 2, 3});
  STD_TORCH_CHECK(contiguous || dense(t, {0, 2, 3, 1}), "segnext_kernels: ", name, " must be contiguous or channels_last");
  return {data_of(t, name), dtype_of(t, name), !contiguous, t.size(0), t.size(1), t.size(2), t.size(3)};
}

inline Image image_like(const Tensor& t, const Image& x, const char* name) {
  Image other = image(t, name);
  STD_TORCH_CHECK(other.dtype == x.dtype && other.images == x.images && other.channels == x.channels &&
                      other.height == x.height && other.width == x.width,
                  "segnext_kernels: ", name, " must have x's shape and dtype");
  return other;
}

// t, or a copy of it, in x's layout and its own dtype: a traced graph may bring another layout than was traced.
inline Tensor arranged_like(const Tensor& given, const Image& x, const char* name) {
  const Tensor t = arranged(given);
  const Image other = image(t, name);
  STD_TORCH_CHECK(other.images == x.images && other.channels == x.channels && other.height == x.height &&
                      other.width == x.width && (other.dtype == Dtype::kFloat64) == (x.dtype == Dtype::kFloat64),
                  "segnext_kernels: ", name, " must have the shape of x and go with its dtype");
  if (t.numel() == 0 || other.channels_last == x.channels_last) return t;
  using torch::headeronly::MemoryFormat;
  return torch::stable::contiguous(t, x.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

using Shape = std::vector<int64_t>;

inline bool has_shape(const Tensor& t, const Shape& shape) {
  const auto sizes = t.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

inline std::string text(const Shape& shape) {
  std::string joined;
  for (int64_t size : shape) joined += (joined.empty() ? "" : ", ") + std::to_string(size);
  return "[" + joined + "]";
}

// The memory of numbers that are taken as they are, of the given shape and dtype.
inline const void* numbers(const Tensor& t, const Shape& shape, Dtype dtype, const std::string& name) {
  STD_TORCH_CHECK(on_device(t) && t.is_contiguous() && has_shape(t, shape) && dtype_of(t, name.c_str()) == dtype,
                  "segnext_kernels: ", name, " must be contiguous ", text(shape), " on ", kDevice, " in ", name_of(dtype));
  return data_of(t, name.c_str());
}

// A filter's or bias' memory, of the given shape and dtype. The caller keeps the returned tensor alive.
inline Tensor filter(const Tensor& t, const Shape& shape, const char* name, Dtype dtype) {
  STD_TORCH_CHECK(on_device(t) && dtype_of(t, name) == dtype && has_shape(t, shape), "segnext_kernels: ", name, " must be ",
                  text(shape), " of the dtype that goes with x's on ", kDevice);
  data_of(t, name);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// The dtype that all of an image's filters have, of which this is the first: x's, or float32 beside 16 bits.
inline Dtype filter_dtype(const Tensor& first, const Image& x) {
  return x.dtype != Dtype::kFloat64 && on_device(first) && first.scalar_type() == ScalarType::Float ? Dtype::kFloat32 : x.dtype;
}

struct Filters {
  std::vector<Tensor> kept;
  StripFilters pointers;
};

// `before`: weights of the caller that come before these, for messages.
inline Filters strip_filters(const std::vector<Tensor>& weights, const Image& x, int before = 0) {
  STD_TORCH_CHECK(weights.size() == kStripTensors,
                  "segnext_kernels: msca_strips takes the 5x5 filter and branches of 7, 11 and 21 taps: 14 tensors");
  Filters filters;
  const Dtype dtype = filters.pointers.dtype = filter_dtype(weights[0], x);
  for (int i = 0; i < kStripTensors; ++i) {
    Shape shape{x.channels};  // of a bias, which every other one is
    if (i == 0) shape = {x.channels, 1, 5, 5};
    if (i > 0 && i % 4 == 0) shape = {x.channels, 1, kStripTaps[i], 1};
    if (i % 4 == 2) shape = {x.channels, 1, 1, kStripTaps[i]};
    filters.kept.push_back(filter(weights[i], shape, ("weights[" + std::to_string(before + i) + "]").c_str(), dtype));
    filters.pointers.tensors[i] = data_of(filters.kept.back(), "weights");
  }
  return filters;
}

// For the gradient of a filter or the like, in contiguous order and, if t is so too, with its very strides: those of dimensions
// of length 1 are free, and DistributedDataParallel wants them as the parameter has them.
inline Tensor gradient_of(const Tensor& t) {
  return t.is_contiguous() ? torch::stable::empty_like(t) : torch::stable::new_empty(t, t.sizes());
}
inline Tensor empty(const Tensor& t) { return torch::stable::new_empty(t, {0}); }

}  // namespace segnext::tensors
