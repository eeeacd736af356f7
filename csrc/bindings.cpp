// Tensors -> pointers, and the registration of the CPU kernels. The only CPU file that knows torch; the schemas are Python's.
#undef Py_LIMITED_API  // torch's build adds its own
#define Py_LIMITED_API 0x030a0000
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/version.h>

#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace {

using segnext::DepthwiseFilter;
using segnext::Dtype;
using segnext::Image;
using segnext::Matrices;
using segnext::StripFilters;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& t, const char* name) {
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
bool dense(const Tensor& t, std::initializer_list<int> order) {
  int64_t expected = 1;
  for (auto d = std::rbegin(order); d != std::rend(order); ++d) {
    if (t.size(*d) != 1 && t.stride(*d) != expected) return false;
    expected *= t.size(*d);
  }
  return true;
}

Image image(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 4, "segnext_kernels: ", name, " must be a CPU tensor [N, C, H, W]");
  const bool contiguous = t.numel() == 0 || dense(t, {0, 1, 2, 3});
  STD_TORCH_CHECK(contiguous || dense(t, {0, 2, 3, 1}), "segnext_kernels: ", name, " must be contiguous or channels_last");
  return {t.data_ptr(), dtype_of(t, name), !contiguous, t.size(0), t.size(1), t.size(2), t.size(3)};
}

Image image_like(const Tensor& t, const Image& x, const char* name) {
  Image other = image(t, name);
  STD_TORCH_CHECK(other.dtype == x.dtype && other.images == x.images && other.channels == x.channels &&
                      other.height == x.height && other.width == x.width,
                  "segnext_kernels: ", name, " must have x's shape and dtype");
  return other;
}

// A filter's or bias' memory; `count` elements of x's dtype. The caller keeps the returned tensor alive.
Tensor filter(const Tensor& t, const Image& x, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && dtype_of(t, name) == x.dtype && t.numel() == x.channels * count, "segnext_kernels: ", name,
                  " must hold ", x.channels * count, " elements of x's dtype on the CPU");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

struct Filters {
  std::vector<Tensor> kept;
  StripFilters pointers;
};

Filters strip_filters(const std::vector<Tensor>& weights, const Image& x) {
  STD_TORCH_CHECK(weights.size() == segnext::kStripTensors,
                  "segnext_kernels: msca_strips on the CPU takes the 5x5 filter and branches of 7, 11 and 21 taps: 14 tensors");
  Filters filters;
  for (int i = 0; i < segnext::kStripTensors; ++i) {
    filters.kept.push_back(filter(weights[i], x, segnext::kStripTaps[i], ("weights[" + std::to_string(i) + "]").c_str()));
    filters.pointers.tensors[i] = filters.kept.back().data_ptr();
  }
  return filters;
}

Tensor contiguous_like(const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); }
Tensor empty(const Tensor& t) { return torch::stable::new_empty(t, {0}); }

segnext::Parallel parallel() {
  return {torch::stable::get_num_threads(), [](int64_t items, const segnext::Range& body) {
            if (items > 0) torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) { body(begin, end); });
          }};
}

Tensor msca_strips(const Tensor& x, const std::vector<Tensor>& weights) {
  const Image in = image(x, "x");
  const Filters filters = strip_filters(weights, in);
  Tensor y = torch::stable::empty_like(x);
  segnext::msca_strips_forward(in, filters.pointers, image_like(y, in, "y"), parallel());
  return y;
}

std::tuple<Tensor, std::vector<Tensor>> msca_strips_backward(const Tensor& grad_out, const Tensor& x,
                                                             const std::vector<Tensor>& weights, bool need_x,
                                                             bool need_weights) {
  const Image in = image(x, "x"), grad = image_like(grad_out, in, "grad_out");
  const Filters filters = strip_filters(weights, in);
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : empty(x);
  const Image out = need_x ? image_like(grad_x, in, "grad_x") : Image{};
  std::vector<Tensor> grads;
  StripFilters pointers;
  for (size_t i = 0; need_weights && i < weights.size(); ++i) {
    grads.push_back(contiguous_like(weights[i]));
    pointers.tensors[i] = grads.back().data_ptr();
  }
  segnext::msca_strips_backward(grad, in, filters.pointers, out, need_weights ? &pointers : nullptr, parallel());
  return {grad_x, grads};
}

Tensor dwconv_gelu(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const Image in = image(x, "x");
  const Tensor w = filter(weight, in, 9, "weight"), b = filter(bias, in, 1, "bias");
  Tensor y = torch::stable::empty_like(x);
  segnext::dwconv_gelu_forward(in, {w.data_ptr(), b.data_ptr()}, image_like(y, in, "y"), parallel());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> dwconv_gelu_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                                        const Tensor& bias, bool need_x, bool need_weights) {
  const Image in = image(x, "x"), grad = image_like(grad_out, in, "grad_out");
  const Tensor w = filter(weight, in, 9, "weight"), b = filter(bias, in, 1, "bias");
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : empty(x);
  Tensor grad_weight = need_weights ? contiguous_like(weight) : empty(x);
  Tensor grad_bias = need_weights ? contiguous_like(bias) : empty(x);
  const DepthwiseFilter grads{grad_weight.data_ptr(), grad_bias.data_ptr()};
  segnext::dwconv_gelu_backward(grad, in, {w.data_ptr(), b.data_ptr()}, need_x ? image_like(grad_x, in, "grad_x") : Image{},
                                need_weights ? &grads : nullptr, parallel());
  return {grad_x, grad_weight, grad_bias};
}

Matrices matrices(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 3, "segnext_kernels: ", name, " must be a CPU tensor [B, D, N]");
  const bool contiguous = t.numel() == 0 || dense(t, {0, 1, 2});
  STD_TORCH_CHECK(contiguous || dense(t, {0, 2, 1}), "segnext_kernels: ", name, " must be contiguous or transposed");
  return {t.data_ptr(), dtype_of(t, name), !contiguous, t.size(0), t.size(1), t.size(2)};
}

Matrices matrices_like(const Tensor& t, const Matrices& x, const char* name) {
  Matrices other = matrices(t, name);
  STD_TORCH_CHECK(other.dtype == x.dtype && other.batch == x.batch && other.rows == x.rows && other.columns == x.columns,
                  "segnext_kernels: ", name, " must have x's shape and dtype");
  return other;
}

void check_nmf(const Tensor& bases, const Matrices& x, int64_t steps, const std::string& gradient) {
  const Dtype accumulator = x.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  STD_TORCH_CHECK(bases.is_cpu() && bases.dim() == 3 && bases.size(0) == x.batch && bases.size(1) == x.rows &&
                      bases.size(2) > 0 && dtype_of(bases, "bases") == accumulator && bases.is_contiguous(),
                  "segnext_kernels: bases must be contiguous [B, D, R] on the CPU in the accumulator's dtype");
  STD_TORCH_CHECK(steps >= 0, "segnext_kernels: steps must be at least 0");
  STD_TORCH_CHECK(gradient == "exact" || gradient == "one_step", "segnext_kernels: gradient must be exact or one_step, got ",
                  gradient);
}

Tensor nmf(const Tensor& x, const Tensor& bases, int64_t steps, const std::string& gradient) {
  const Matrices in = matrices(x, "x");
  check_nmf(bases, in, steps, gradient);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() > 0) segnext::nmf_forward(in, bases.data_ptr(), bases.size(2), steps, matrices_like(y, in, "y"), parallel());
  return y;
}

std::tuple<Tensor, Tensor> nmf_backward(const Tensor& grad_out, const Tensor& x, const Tensor& bases, int64_t steps,
                                        const std::string& gradient, bool need_x, bool need_bases) {
  const Matrices in = matrices(x, "x"), grad = matrices_like(grad_out, in, "grad_out");
  check_nmf(bases, in, steps, gradient);
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : empty(x);
  Tensor grad_bases = need_bases ? contiguous_like(bases) : empty(bases);
  if (x.numel() == 0) return {grad_x, torch::stable::zero_(grad_bases)};
  segnext::nmf_backward(grad, in, bases.data_ptr(), bases.size(2), steps, gradient == "one_step",
                        need_x ? matrices_like(grad_x, in, "grad_x") : Matrices{}, need_bases ? grad_bases.data_ptr() : nullptr,
                        parallel());
  return {grad_x, grad_bases};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(segnext_kernels, CPU, m) {
  m.impl("msca_strips", TORCH_BOX(&msca_strips));
  m.impl("msca_strips_backward", TORCH_BOX(&msca_strips_backward));
  m.impl("dwconv_gelu", TORCH_BOX(&dwconv_gelu));
  m.impl("dwconv_gelu_backward", TORCH_BOX(&dwconv_gelu_backward));
  m.impl("nmf", TORCH_BOX(&nmf));
  m.impl("nmf_backward", TORCH_BOX(&nmf_backward));
}

#define SEGNEXT_TEXT_(x) #x
#define SEGNEXT_TEXT(x) SEGNEXT_TEXT_(x)
#define SEGNEXT_JOIN_(a, b) a##b
#define SEGNEXT_JOIN(a, b) SEGNEXT_JOIN_(a, b)

namespace {

PyObject* facts(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s}", "isa", SEGNEXT_TEXT(SEGNEXT_ISA), "torch", TORCH_VERSION, "compiler", __VERSION__);
}

PyMethodDef methods[] = {
    {"facts", facts, METH_NOARGS, "What this library was built for and with."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC SEGNEXT_JOIN(PyInit__C_, SEGNEXT_ISA)() { return PyModule_Create(&module); }
