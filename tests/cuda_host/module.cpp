// The CUDA kernels on NumPy arrays, run on the host.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "cuda/kernels.h"

namespace py = pybind11;
using namespace segnext;
using namespace py::literals;

namespace {

// bfloat16 comes as uint16.
Dtype dtype_of(const py::array& a) {
  if (a.dtype().kind() == 'u') return Dtype::kBFloat16;
  return a.itemsize() == 4 ? Dtype::kFloat32 : Dtype::kHalf;
}

void* data(const py::array& a) { return const_cast<void*>(a.data()); }

// [N, C, H, W], or [N, H, W, C] in memory with channels_last.
Image image(const py::array& a, bool channels_last) {
  const auto* s = a.shape();
  if (channels_last) return {data(a), dtype_of(a), true, s[0], s[3], s[1], s[2]};
  return {data(a), dtype_of(a), false, s[0], s[1], s[2], s[3]};
}
Image optional_image(const py::object& a, bool channels_last) {
  return a.is_none() ? Image{} : image(a.cast<py::array>(), channels_last);
}

StripFilters filters(const py::list& arrays) {
  StripFilters f = {{}, dtype_of(arrays[0].cast<py::array>())};
  for (int i = 0; i < kStripTensors; ++i) f.tensors[i] = data(arrays[i].cast<py::array>());
  return f;
}

DepthwiseFilter depthwise(const py::list& arrays) {
  const py::array weight = arrays[0].cast<py::array>();
  return {data(weight), data(arrays[1].cast<py::array>()), dtype_of(weight)};
}

// Filled with NaN, as new memory may be.
std::vector<float> scratch(int64_t floats) { return std::vector<float>(static_cast<size_t>(floats), __builtin_nanf("")); }

}  // namespace

PYBIND11_MODULE(cuda_host, m) {
  m.def("msca_strips", [](py::array x, py::list weights, py::array y, bool channels_last) {
    cuda::msca_strips_forward(image(x, channels_last), filters(weights), image(y, channels_last), nullptr);
  });
  m.def("msca_strips_backward", [](py::array grad_out, py::array x, py::list weights, py::object grad_x, py::object grads,
                                   bool channels_last) {
    const Image in = image(x, channels_last);
    std::vector<float> sums = scratch(cuda::msca_strips_backward_scratch(in));
    StripFilters results = {};
    if (!grads.is_none()) results = filters(grads.cast<py::list>());
    cuda::msca_strips_backward(image(grad_out, channels_last), in, filters(weights), optional_image(grad_x, channels_last),
                               grads.is_none() ? nullptr : &results, sums.data(), nullptr);
  });
  m.def("dwconv_gelu", [](py::array x, py::list filter, py::array y, bool channels_last) {
    cuda::dwconv_gelu_forward(image(x, channels_last), depthwise(filter), image(y, channels_last), nullptr);
  });
  m.def("dwconv_gelu_backward", [](py::array grad_out, py::array x, py::list filter, py::object grad_x, py::object grads,
                                   bool channels_last) {
    const Image in = image(x, channels_last);
    std::vector<float> sums = scratch(cuda::dwconv_gelu_backward_scratch(in));
    DepthwiseFilter results = {};
    if (!grads.is_none()) results = depthwise(grads.cast<py::list>());
    cuda::dwconv_gelu_backward(image(grad_out, channels_last), in, depthwise(filter), optional_image(grad_x, channels_last),
                               grads.is_none() ? nullptr : &results, sums.data(), nullptr);
  });
  m.def(
      "settings",
      [](unsigned order, int shared_limit, unsigned first, unsigned step, unsigned count, int launch, bool traced) {
        host_run::settings = {order, shared_limit, first, step, count, launch, traced};
        host_run::reset();
      },
      py::arg("order") = 0, py::arg("shared_limit") = 227 * 1024, py::arg("first") = 0, py::arg("step") = 1,
      py::arg("count") = ~0u, py::arg("launch") = -1, py::arg("traced") = false);
  m.def("traffic", [] {
    const host_run::Traffic t = host_run::traffic();
    return py::dict("read_bytes"_a = t.read_bytes, "written_bytes"_a = t.written_bytes, "read_sectors"_a = t.read_sectors,
                    "written_sectors"_a = t.written_sectors, "distinct_read_sectors"_a = t.distinct_read_sectors,
                    "shared_instructions"_a = t.shared_instructions, "shared_wavefronts"_a = t.shared_wavefronts,
                    "shared_ideal"_a = t.shared_ideal);
  });
  m.def("cuts", [] {
    py::list all;
    for (const host_run::Cut& c : host_run::cuts) {
      all.append(py::dict("channels"_a = c.channels, "columns"_a = c.columns, "rows"_a = c.rows, "groups"_a = c.groups,
                          "column_tiles"_a = c.column_tiles, "row_parts"_a = c.row_parts, "block_images"_a = c.block_images,
                          "blocks"_a = c.blocks, "threads"_a = c.threads, "shared_bytes"_a = c.shared_bytes));
    }
    return all;
  });
}
