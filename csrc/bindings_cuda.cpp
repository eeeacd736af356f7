// The registration of the CUDA kernels, under torch's stable ABI; linked to the static CUDA runtime, so that the library loads
// beside whatever CUDA its torch has.
#define SEGNEXT_CUDA
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels.h"
#include "tensors.h"

// Lives in libtorch_cuda, which a torch for the CPU does not have; such a one must be able to build this file.
extern "C" AOTI_TORCH_EXPORT __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace {

using namespace segnext;
using namespace segnext::tensors;

// Makes x's device, on which the others must be too, the current one as long as it lives, and knows its current stream.
class OnDevice {
 public:
  OnDevice(const Tensor& x, const std::vector<Tensor>& others) : guard_(x.get_device_index()) {
    for (const Tensor& other : others) {
      STD_TORCH_CHECK(on_device(other) && other.get_device_index() == x.get_device_index(),
                      "segnext_kernels: all tensors must be on x's device");
    }
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "segnext_kernels: this torch has no CUDA");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  operator cudaStream_t() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

std::vector<Tensor> with(std::vector<Tensor> tensors, const Tensor& another) {
  tensors.push_back(another);
  return tensors;
}

// New memory for the gradients of a filter's tensors.
std::vector<Tensor> gradients_of(const std::vector<Tensor>& weights) {
  std::vector<Tensor> grads;
  for (const Tensor& weight : weights) grads.push_back(gradient_of(weight));
  return grads;
}

Tensor floats(const Tensor& x, int64_t count) { return torch::stable::new_empty(x, {count}, ScalarType::Float); }

Tensor msca_strips(const Tensor& given, const std::vector<Tensor>& weights) {
  const Tensor x = arranged(given);
  const Image in = image(x, "x");
  const OnDevice stream(x, weights);
  const Filters filters = strip_filters(weights, in);
  Tensor y = torch::stable::empty_like(x);
  cuda::msca_strips_forward(in, filters.pointers, image_like(y, in, "y"), stream);
  return y;
}

std::tuple<Tensor, std::vector<Tensor>> msca_strips_backward(const Tensor& grad_out, const Tensor& given,
                                                             const std::vector<Tensor>& weights, bool need_x,
                                                             bool need_weights) {
  const Tensor x = arranged(given);
  const Image in = image(x, "x");
  const OnDevice stream(x, with(weights, grad_out));
  const Tensor gradient = arranged_like(grad_out, in, "grad_out");
  const Image grad = image_like(gradient, in, "grad_out");
  const Filters filters = strip_filters(weights, in);
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : empty(x);
  const std::vector<Tensor> grads = gradients_of(need_weights ? weights : std::vector<Tensor>());
  StripFilters pointers = filters.pointers;
  for (size_t i = 0; i < grads.size(); ++i) pointers.tensors[i] = grads[i].data_ptr();
  Tensor scratch = floats(x, need_weights ? cuda::msca_strips_backward_scratch(in) : 0);
  cuda::msca_strips_backward(grad, in, filters.pointers, need_x ? image_like(grad_x, in, "grad_x") : Image{},
                             need_weights ? &pointers : nullptr, static_cast<float*>(scratch.data_ptr()), stream);
  return {grad_x, grads};
}

Tensor dwconv_gelu(const Tensor& given, const Tensor& weight, const Tensor& bias) {
  const Tensor x = arranged(given);
  const Image in = image(x, "x");
  const OnDevice stream(x, {weight, bias});
  const Dtype dtype = filter_dtype(weight, in);
  const Tensor w = filter(weight, {in.channels, 1, 3, 3}, "weight", dtype), b = filter(bias, {in.channels}, "bias", dtype);
  Tensor y = torch::stable::empty_like(x);
  cuda::dwconv_gelu_forward(in, depthwise_filter(w, b, dtype), image_like(y, in, "y"), stream);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> dwconv_gelu_backward(const Tensor& grad_out, const Tensor& given, const Tensor& weight,
                                                        const Tensor& bias, bool need_x, bool need_weights) {
  const Tensor x = arranged(given);
  const Image in = image(x, "x");
  const OnDevice stream(x, {weight, bias, grad_out});
  const Tensor gradient = arranged_like(grad_out, in, "grad_out");
  const Image grad = image_like(gradient, in, "grad_out");
  const Dtype dtype = filter_dtype(weight, in);
  const Tensor w = filter(weight, {in.channels, 1, 3, 3}, "weight", dtype), b = filter(bias, {in.channels}, "bias", dtype);
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : empty(x);
  Tensor grad_w = need_weights ? gradient_of(weight) : empty(x), grad_b = need_weights ? gradient_of(bias) : empty(x);
  const DepthwiseFilter pointers = {grad_w.data_ptr(), grad_b.data_ptr(), dtype};
  Tensor scratch = floats(x, need_weights ? cuda::dwconv_gelu_backward_scratch(in) : 0);
  cuda::dwconv_gelu_backward(grad, in, depthwise_filter(w, b, dtype), need_x ? image_like(grad_x, in, "grad_x") : Image{},
                             need_weights ? &pointers : nullptr, static_cast<float*>(scratch.data_ptr()), stream);
  return {grad_x, grad_w, grad_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(segnext_kernels, CUDA, m) {
  m.impl("msca_strips", TORCH_BOX(&msca_strips));
  m.impl("msca_strips_backward", TORCH_BOX(&msca_strips_backward));
  m.impl("dwconv_gelu", TORCH_BOX(&dwconv_gelu));
  m.impl("dwconv_gelu_backward", TORCH_BOX(&dwconv_gelu_backward));
}

namespace {

PyObject* facts(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:i}", "architectures", SEGNEXT_CUDA_ARCHITECTURES, "cuda", CUDART_VERSION);
}

PyObject* driver(PyObject*, PyObject*) {
  int newest = 0;
  cudaDriverGetVersion(&newest);
  return PyLong_FromLong(newest);
}

PyMethodDef methods[] = {
    {"facts", facts, METH_NOARGS, "What this library was built for and with."},
    {"driver", driver, METH_NOARGS,
     "The newest CUDA that the driver knows, 0 without one. It starts to work in this process then."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&module); }
