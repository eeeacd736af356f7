// The registration of the operators' CPU kernels. Only the bindings know torch; the schemas are Python's.
#include "convolutions.h"
#include "cpu/amx.h"
#include "threads.h"

namespace {

using namespace segnext::tensors;
using segnext::DepthwiseFilter;
using segnext::Dtype;
using segnext::Image;
using segnext::kMostSteps;
using segnext::Matrices;
using segnext::ResidualScale;
using segnext::StripFilters;
using segnext::Targets;

// The kernels of convolutions.h on torch's threads; they check themselves where their tensors are.
struct OnCpu {
  OnCpu(const Tensor&, const Tensors&) {}
  void msca_strips(const Image& x, const StripFilters& filters, const Image& y) const {
    segnext::msca_strips_forward(x, filters, y, parallel());
  }
  void msca_strips_backward(const Image& grad, const Image& x, const StripFilters& filters, const Image& grad_x,
                            const StripFilters* grads) const {
    segnext::msca_strips_backward(grad, x, filters, grad_x, grads, parallel());
  }
  void dwconv_gelu(const Image& x, const DepthwiseFilter& filter, const Image& y) const {
    segnext::dwconv_gelu_forward(x, filter, y, parallel());
  }
  void dwconv_gelu_backward(const Image& grad, const Image& x, const DepthwiseFilter& filter, const Image& grad_x,
                            const DepthwiseFilter* grads) const {
    segnext::dwconv_gelu_backward(grad, x, filter, grad_x, grads, parallel());
  }
};

ResidualScale residual_scale(const Tensor& scale, const std::optional<Tensor>& keep, const Image& x) {
  return {data_of(scale, "scale"), keep ? numbers(*keep, {x.images}, accumulator_of(x.dtype), "keep") : nullptr};
}

Tensor scale_add(const Tensor& given, const Tensor& y, const Tensor& scale, const std::optional<Tensor>& keep) {
  const Tensor x = arranged(given);
  const Image in = image(x, "x");
  const Tensor s = filter(scale, {in.channels}, "scale", in.dtype), add = arranged_like(y, in, "y");
  Tensor out = torch::stable::empty_like(x);
  segnext::scale_add_forward(in, image(add, "y"), residual_scale(s, keep, in), image_like(out, in, "out"), parallel());
  return out;
}

std::tuple<Tensor, Tensor> scale_add_backward(const Tensor& grad_out, const Tensor& given, const Tensor& scale,
                                              const std::optional<Tensor>& keep, bool need_y, bool need_scale) {
  const Tensor y = arranged(given);
  const Image in = image(y, "y");
  const Tensor gradient = arranged_like(grad_out, in, "grad_out");
  const Image grad = image(gradient, "grad_out");
  const Tensor s = filter(scale, {in.channels}, "scale", grad.dtype);
  Tensor grad_y = need_y ? torch::stable::empty_like(y) : empty(y);
  Tensor grad_scale = need_scale ? gradient_of(scale) : empty(scale);
  segnext::scale_add_backward(grad, in, residual_scale(s, keep, grad), need_y ? image_like(grad_y, in, "grad_y") : Image{},
                              need_scale ? grad_scale.data_ptr() : nullptr, parallel());
  return {grad_y, grad_scale};
}

Matrices matrices(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(on_device(t) && t.dim() == 3, "segnext_kernels: ", name, " must be a CPU tensor [B, D, N]");
  const bool contiguous = t.numel() == 0 || dense(t, {0, 1, 2});
  STD_TORCH_CHECK(contiguous || dense(t, {0, 2, 1}), "segnext_kernels: ", name, " must be contiguous or transposed");
  return {data_of(t, name), dtype_of(t, name), !contiguous, t.size(0), t.size(1), t.size(2)};
}

Matrices matrices_like(const Tensor& t, const Matrices& x, const char* name) {
  Matrices other = matrices(t, name);
  STD_TORCH_CHECK(other.dtype == x.dtype && other.batch == x.batch && other.rows == x.rows && other.columns == x.columns,
                  "segnext_kernels: ", name, " must have x's shape and dtype");
  return other;
}

const void* bases_of(const Tensor& bases, const Matrices& x) {
  STD_TORCH_CHECK(bases.dim() == 3 && bases.size(2) > 0, "segnext_kernels: bases must be [B, D, R]");
  return numbers(bases, {x.batch, x.rows, bases.size(2)}, accumulator_of(x.dtype), "bases");
}

// Checks what an update is differentiated by: whether the last step alone.
bool is_one_step(int64_t steps, const std::string& gradient) {
  STD_TORCH_CHECK(steps >= 0 && steps <= kMostSteps, "segnext_kernels: steps must be between 0 and ", kMostSteps);
  STD_TORCH_CHECK(gradient == "exact" || gradient == "one_step", "segnext_kernels: gradient must be exact or one_step, got ",
                  gradient);
  return gradient == "one_step";
}

const void* projection_of(const Tensor* projection, const Matrices& x) {
  return projection == nullptr ? nullptr : numbers(*projection, {x.rows, x.rows}, accumulator_of(x.dtype), "projection");
}

// y and, if `keep`, the factors for backward, which are not rounded then.
std::tuple<Tensor, Tensor> nmf_kept(const Tensor& given, const Tensor& bases, const Tensor* projection, int64_t steps,
                                    const std::string& gradient, bool keep, bool round_factors) {
  const Tensor x = arranged(given);
  const Matrices in = matrices(x, "x");
  const void *start = bases_of(bases, in), *filters = projection_of(projection, in);
  const bool one_step = is_one_step(steps, gradient);
  Tensor y = torch::stable::empty_like(x);
  const int64_t size = keep ? segnext::nmf_factors_size(in, bases.size(2), steps, one_step) : 0;
  Tensor factors = torch::stable::new_empty(bases, {size});
  if (x.numel() == 0) return {y, torch::stable::zero_(factors)};
  segnext::nmf_forward(in, start, bases.size(2), steps, round_factors, one_step, keep ? factors.data_ptr() : nullptr, filters,
                       matrices_like(y, in, "y"), parallel());
  return {y, factors};
}

Tensor nmf(const Tensor& x, const Tensor& bases, int64_t steps, const std::string& gradient, bool round_factors) {
  return std::get<0>(nmf_kept(x, bases, nullptr, steps, gradient, false, round_factors));
}

std::tuple<Tensor, Tensor> nmf_and_factors(const Tensor& x, const Tensor& bases, int64_t steps, const std::string& gradient) {
  return nmf_kept(x, bases, nullptr, steps, gradient, true, false);
}

std::tuple<Tensor, Tensor> nmf_projected(const Tensor& x, const Tensor& bases, const Tensor& projection, int64_t steps,
                                         const std::string& gradient, bool keep, bool round_factors) {
  return nmf_kept(x, bases, &projection, steps, gradient, keep, round_factors);
}

// The gradients of x, the bases and, if there is one, the projection.
std::tuple<Tensor, Tensor, Tensor> nmf_gradients(const Tensor& given_grad, const Tensor& given, const Tensor& bases,
                                                 const std::optional<Tensor>& factors, const Tensor* projection, int64_t steps,
                                                 const std::string& gradient, bool need_x, bool need_bases,
                                                 bool need_projection) {
  const Tensor x = arranged(given), grad_out = arranged(given_grad);
  const Matrices in = matrices(x, "x"), grad = matrices_like(grad_out, in, "grad_out");
  const void *start = bases_of(bases, in), *filters = projection_of(projection, in), *kept = nullptr;
  const bool one_step = is_one_step(steps, gradient);
  if (factors) {
    const int64_t size = segnext::nmf_factors_size(in, bases.size(2), steps, one_step);
    kept = numbers(*factors, {size}, accumulator_of(in.dtype), "factors");
  }
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : empty(x);
  Tensor grad_bases = need_bases ? gradient_of(bases) : empty(bases);
  Tensor grad_projection = need_projection ? gradient_of(*projection) : empty(bases);
  if (x.numel() == 0) return {grad_x, torch::stable::zero_(grad_bases), torch::stable::zero_(grad_projection)};
  segnext::nmf_backward(grad, in, start, kept, filters, bases.size(2), steps, one_step,
                        {need_x ? matrices_like(grad_x, in, "grad_x") : Matrices{},
                         need_bases ? grad_bases.data_ptr() : nullptr, need_projection ? grad_projection.data_ptr() : nullptr},
                        parallel());
  return {grad_x, grad_bases, grad_projection};
}

std::tuple<Tensor, Tensor> nmf_backward(const Tensor& grad_out, const Tensor& x, const Tensor& bases,
                                        const std::optional<Tensor>& factors, int64_t steps, const std::string& gradient,
                                        bool need_x, bool need_bases) {
  auto [grad_x, grad_bases, none] =
      nmf_gradients(grad_out, x, bases, factors, nullptr, steps, gradient, need_x, need_bases, false);
  return {grad_x, grad_bases};
}

std::tuple<Tensor, Tensor, Tensor> nmf_projected_backward(const Tensor& grad_out, const Tensor& x, const Tensor& bases,
                                                          const Tensor& projection, const Tensor& factors, int64_t steps,
                                                          const std::string& gradient, bool need_x, bool need_bases,
                                                          bool need_projection) {
  // Without factors where the forward was recorded for calls without gradient, as in a program exported under no_grad.
  const std::optional<Tensor> kept = factors.numel() > 0 ? std::optional(factors) : std::nullopt;
  return nmf_gradients(grad_out, x, bases, kept, &projection, steps, gradient, need_x, need_bases, need_projection);
}

Tensor upsample_argmax(const Tensor& given, int64_t height, int64_t width) {
  const Tensor logits = arranged(given);
  const Image in = image(logits, "logits");
  STD_TORCH_CHECK(in.channels > 0 && height >= 0 && width >= 0 && (height == 0 || width == 0 || in.height * in.width > 0),
                  "segnext_kernels: logits and size must not be empty");
  Tensor labels = torch::stable::new_empty(logits, {in.images, height, width}, ScalarType::Long);
  segnext::upsample_argmax_forward(in, height, width, static_cast<int64_t*>(labels.data_ptr()), parallel());
  return labels;
}

Targets targets(const Tensor& target, const std::optional<Tensor>& weight, int64_t ignore_index, const Image& logits) {
  STD_TORCH_CHECK(on_device(target) && target.scalar_type() == ScalarType::Long && target.is_contiguous() &&
                      target.dim() == 3 && target.size(0) == logits.images,
                  "segnext_kernels: target must be contiguous int64 [N, H, W] on the CPU");
  STD_TORCH_CHECK(logits.channels > 0 && (target.numel() == 0 || logits.height * logits.width > 0),
                  "segnext_kernels: logits must not be empty");
  return {static_cast<const int64_t*>(data_of(target, "target")), target.size(1), target.size(2),
          weight ? numbers(*weight, {logits.channels}, accumulator_of(logits.dtype), "weight") : nullptr, ignore_index};
}

Tensor upsample_cross_entropy(const Tensor& given, const Tensor& target, const std::optional<Tensor>& weight,
                              int64_t ignore_index) {
  const Tensor logits = arranged(given);
  const Image in = image(logits, "logits");
  const double loss = segnext::upsample_cross_entropy_forward(in, targets(target, weight, ignore_index, in), parallel());
  return torch::stable::fill_(torch::stable::new_empty(logits, {}, scalar_type(accumulator_of(in.dtype))), loss);
}

Tensor upsample_cross_entropy_backward(const Tensor& grad_out, const Tensor& given, const Tensor& target,
                                       const std::optional<Tensor>& weight, int64_t ignore_index) {
  const Tensor logits = arranged(given);
  const Image in = image(logits, "logits");
  STD_TORCH_CHECK(
      on_device(grad_out) && grad_out.numel() == 1 && grad_out.scalar_type() == scalar_type(accumulator_of(in.dtype)),
      "segnext_kernels: grad_out must be one number on the CPU in the accumulator's dtype");
  const void* factor = data_of(grad_out, "grad_out");
  const double scale = in.dtype == Dtype::kFloat64 ? *static_cast<const double*>(factor) : *static_cast<const float*>(factor);
  Tensor grad_logits = torch::stable::empty_like(logits);
  segnext::upsample_cross_entropy_backward(scale, in, targets(target, weight, ignore_index, in),
                                           image_like(grad_logits, in, "grad_logits"), parallel());
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(segnext_kernels, CPU, m) {
  register_convolutions<OnCpu>(m);
  m.impl("scale_add", TORCH_BOX(&scale_add));
  m.impl("scale_add_backward", TORCH_BOX(&scale_add_backward));
  m.impl("nmf", TORCH_BOX(&nmf));
  m.impl("nmf_and_factors", TORCH_BOX(&nmf_and_factors));
  m.impl("nmf_backward", TORCH_BOX(&nmf_backward));
  m.impl("nmf_projected", TORCH_BOX(&nmf_projected));
  m.impl("nmf_projected_backward", TORCH_BOX(&nmf_projected_backward));
  m.impl("upsample_argmax", TORCH_BOX(&upsample_argmax));
  m.impl("upsample_cross_entropy", TORCH_BOX(&upsample_cross_entropy));
  m.impl("upsample_cross_entropy_backward", TORCH_BOX(&upsample_cross_entropy_backward));
}

#define SEGNEXT_TEXT_(x) #x
#define SEGNEXT_TEXT(x) SEGNEXT_TEXT_(x)
#define SEGNEXT_JOIN_(a, b) a##b
#define SEGNEXT_JOIN(a, b) SEGNEXT_JOIN_(a, b)

namespace {

#if defined(__AMX_BF16__)
// A C++ program that loads this library alone has not asked for the tiles, as Python does before it chooses the library.
[[maybe_unused]] const bool tiles_permitted = segnext::amx::permitted();
#endif

PyObject* facts(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s}", "isa", SEGNEXT_TEXT(SEGNEXT_ISA), "torch", TORCH_VERSION, "compiler", __VERSION__);
}

PyMethodDef methods[] = {
    {"facts", facts, METH_NOARGS, "What this library was built for and with."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C_" SEGNEXT_TEXT(SEGNEXT_ISA), nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC SEGNEXT_JOIN(PyInit__C_, SEGNEXT_ISA)() { return PyModule_Create(&module); }
