// The registration of the CUDA kernels, under torch's stable ABI; linked to the static CUDA runtime, so that the library loads
// beside whatever CUDA its torch has.
#define SEGNEXT_CUDA
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "convolutions.h"
#include "cuda/kernels.h"

// Lives in libtorch_cuda, which a torch for the CPU does not have; such a one must be able to build this file.
extern "C" AOTI_TORCH_EXPORT __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace {

using namespace segnext;
using namespace segnext::tensors;

// The kernels of convolutions.h on the current stream of x's device, which is the current device as long as this lives.
class OnDevice {
 public:
  OnDevice(const Tensor& x, const Tensors& others) : guard_(x.get_device_index()), x_(x) {
    for (const Tensor& other : others) {
      STD_TORCH_CHECK(on_device(other) && other.get_device_index() == x.get_device_index(),
                      "segnext_kernels: all tensors must be on x's device");
    }
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "segnext_kernels: this torch has no CUDA");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  void msca_strips(const Image& x, const StripFilters& filters, const Image& y) const {
    cuda::msca_strips_forward(x, filters, y, stream_);
  }
  void msca_strips_backward(const Image& grad, const Image& x, const StripFilters& filters, const Image& grad_x,
                            const StripFilters* grads) const {
    const Tensor scratch = floats(grads != nullptr ? cuda::msca_strips_backward_scratch(x) : 0);
    cuda::msca_strips_backward(grad, x, filters, grad_x, grads, static_cast<float*>(scratch.data_ptr()), stream_);
  }
  void dwconv_gelu(const Image& x, const DepthwiseFilter& filter, const Image& y) const {
    cuda::dwconv_gelu_forward(x, filter, y, stream_);
  }
  void dwconv_gelu_backward(const Image& grad, const Image& x, const DepthwiseFilter& filter, const Image& grad_x,
                            const DepthwiseFilter* grads) const {
    const Tensor scratch = floats(grads != nullptr ? cuda::dwconv_gelu_backward_scratch(x) : 0);
    cuda::dwconv_gelu_backward(grad, x, filter, grad_x, grads, static_cast<float*>(scratch.data_ptr()), stream_);
  }

 private:
  Tensor floats(int64_t count) const { return torch::stable::new_empty(x_, {count}, ScalarType::Float); }

  torch::stable::accelerator::DeviceGuard guard_;
  const Tensor& x_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(segnext_kernels, CUDA, m) { register_convolutions<OnDevice>(m); }

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
