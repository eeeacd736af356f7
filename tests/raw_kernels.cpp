// The CPU kernels on NumPy arrays, without torch: built with sanitizers by test_memory_safety.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;
using namespace segnext;

namespace {

// bfloat16 comes as uint16.
Dtype dtype_of(const py::array& a) {
  if (a.dtype().kind() == 'u') return Dtype::kBFloat16;
  return a.itemsize() == 8 ? Dtype::kFloat64 : a.itemsize() == 4 ? Dtype::kFloat32 : Dtype::kHalf;
}

void* data(const py::array& a) { return const_cast<void*>(a.data()); }

// More threads than most loops have items, so that an item that leans on its neighbour's scratch memory is found out.
const Parallel kThreads = {8, [](int64_t count, const std::function<void(int64_t)>& f) {
                             std::vector<std::thread> threads;
                             std::atomic<int64_t> begun = 0;
                             for (int64_t i = 0; i < count; ++i) {
                               threads.emplace_back([&, i] {
                                 for (++begun; begun < count;) std::this_thread::yield();  // no one takes all before
                                 f(i);
                               });
                             }
                             for (std::thread& thread : threads) thread.join();
                           }};

// What each thread was given, in order, `most` at a time or as a loop over its share does where that is 0; the first thread
// works on each item for a millisecond.
std::vector<std::vector<int64_t>> items_of_threads(int64_t count, int64_t least, int64_t most, bool backward) {
  std::vector<std::vector<int64_t>> items(kThreads.threads);
  std::atomic<size_t> bodies = 0;
  const auto body = [&](Share& share) {
    const size_t thread = bodies++;
    const auto take = [&](int64_t item) {
      items[thread].push_back(item);
      if (thread == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    };
    if (most == 0) {
      for (const int64_t item : share) take(item);
    } else {
      for (Range range = share.next(most); !range.empty(); range = share.next(most)) {
        for (int64_t item = range.begin; item < range.end; ++item) take(item);
      }
    }
  };
  kThreads({count, least, backward ? Order::kBackward : Order::kForward}, body);
  return items;
}

// [N, C, H, W], or [N, H, W, C] in memory with channels_last.
Image image(const py::array& a, bool channels_last) {
  const auto* s = a.shape();
  if (channels_last) return {data(a), dtype_of(a), true, s[0], s[3], s[1], s[2]};
  return {data(a), dtype_of(a), false, s[0], s[1], s[2], s[3]};
}

// [B, D, N], or [B, N, D] in memory with transposed.
Matrices matrices(const py::array& a, bool transposed) {
  const auto* s = a.shape();
  return {data(a), dtype_of(a), transposed, s[0], s[transposed ? 2 : 1], s[transposed ? 1 : 2]};
}

StripFilters filters(const py::list& tensors) {
  StripFilters f = {{}, dtype_of(tensors[0].cast<py::array>())};
  for (int i = 0; i < kStripTensors; ++i) f.tensors[i] = data(tensors[i].cast<py::array>());
  return f;
}

PackedWeights packed(const py::array& weight, const py::array& bias) {
  return {data(weight), static_cast<const float*>(data(bias))};
}

const float* floats(const py::array& a) { return static_cast<const float*>(data(a)); }

}  // namespace

PYBIND11_MODULE(raw_kernels, m) {
  m.def("items_of_threads", &items_of_threads);
  m.def("msca_strips", [](py::array x, py::list weights, py::array y, bool channels_last) {
    msca_strips_forward(image(x, channels_last), filters(weights), image(y, channels_last), kThreads);
  });
  m.def("msca_strips_backward",
        [](py::array grad_out, py::array x, py::list weights, py::array grad_x, py::list grads, bool channels_last) {
          const StripFilters out = filters(grads);
          msca_strips_backward(image(grad_out, channels_last), image(x, channels_last), filters(weights),
                               image(grad_x, channels_last), &out, kThreads);
        });
  m.def("dwconv_gelu", [](py::array x, py::array w, py::array b, py::array y, bool channels_last) {
    dwconv_gelu_forward(image(x, channels_last), {data(w), data(b), dtype_of(w)}, image(y, channels_last), kThreads);
  });
  m.def("dwconv_gelu_backward", [](py::array grad_out, py::array x, py::array w, py::array b, py::array grad_x,
                                   py::array grad_w, py::array grad_b, bool channels_last) {
    const DepthwiseFilter grads{data(grad_w), data(grad_b), dtype_of(grad_w)};
    dwconv_gelu_backward(image(grad_out, channels_last), image(x, channels_last), {data(w), data(b), dtype_of(w)},
                         image(grad_x, channels_last), &grads, kThreads);
  });
  m.def("scale_add", [](py::array x, py::array y, py::array scale, py::array keep, py::array out, bool channels_last) {
    scale_add_forward(image(x, channels_last), image(y, channels_last), {data(scale), data(keep)}, image(out, channels_last),
                      kThreads);
  });
  m.def("scale_add_backward", [](py::array grad_out, py::array y, py::array scale, py::array keep, py::array grad_y,
                                 py::array grad_scale, bool channels_last) {
    scale_add_backward(image(grad_out, channels_last), image(y, channels_last), {data(scale), data(keep)},
                       image(grad_y, channels_last), data(grad_scale), kThreads);
  });
  m.def("nmf_factors_size", [](py::array x, int64_t rank, int64_t steps, bool one_step) {
    return nmf_factors_size(matrices(x, false), rank, steps, one_step);
  });
  // without elements, factors are not kept, or not given, and there is no projection
  auto kept = [](py::array factors) { return factors.size() > 0 ? data(factors) : nullptr; };
  m.def("nmf", [kept](py::array x, py::array bases, int64_t steps, bool rounded, bool one_step, py::array factors,
                      py::array projection, py::array y, bool transposed) {
    nmf_forward(matrices(x, transposed), data(bases), bases.shape(2), steps, rounded, one_step, kept(factors), kept(projection),
                matrices(y, transposed), kThreads);
  });
  m.def("nmf_backward",
        [kept](py::array grad_out, py::array x, py::array bases, py::array factors, py::array projection, int64_t steps,
               bool one_step, py::array grad_x, py::array grad_bases, py::array grad_projection, bool transposed) {
          nmf_backward(matrices(grad_out, transposed), matrices(x, transposed), data(bases), kept(factors), kept(projection),
                       bases.shape(2), steps, one_step, {matrices(grad_x, transposed), data(grad_bases), kept(grad_projection)},
                       kThreads);
        });
  m.def("upsample_argmax", [](py::array logits, py::array_t<int64_t> labels, bool channels_last) {
    upsample_argmax_forward(image(logits, channels_last), labels.shape(1), labels.shape(2), labels.mutable_data(), kThreads);
  });
  m.def("upsample_cross_entropy",
        [](py::array logits, py::array_t<int64_t> labels, py::array weights, py::array grad_logits, bool channels_last) {
          const Targets targets{labels.data(), labels.shape(1), labels.shape(2), data(weights), 255};
          const Image in = image(logits, channels_last);
          upsample_cross_entropy_backward(1.5, in, targets, image(grad_logits, channels_last), kThreads);
          return upsample_cross_entropy_forward(in, targets, kThreads);
        });
  m.def("conv_act", [](py::array x, py::array weight, py::array bias, int64_t kernel, int64_t stride, bool gelu, py::array y,
                       bool channels_last) {
    const Activation activation = gelu ? Activation::kGelu : Activation::kNone;
    conv_act_forward(image(x, channels_last), {packed(weight, bias), kernel, stride, activation}, image(y, true), kThreads);
  });
  m.def("spatial_attention", [](py::array x, py::array matrix, py::array bias, py::list strips, py::array y) {
    const PackedWeights weights = packed(matrix, bias);
    spatial_attention_forward(image(x, true), {weights, filters(strips), weights, weights, floats(bias)}, image(y, true),
                              kThreads);
  });
  m.def("mlp", [](py::array x, py::array fc1, py::array bias1, py::array depthwise, py::array fc2, py::array bias2, bool norm,
                  py::array y) {
    const LayerNorm of_sum{norm ? floats(bias2) : nullptr, floats(bias2), 1e-5f};
    const MlpWeights weights{packed(fc1, bias1), floats(depthwise), floats(bias1), packed(fc2, bias2), bias1.size(), of_sum};
    mlp_forward(image(x, true), weights, image(y, true), kThreads);
  });
  m.def("group_norm_relu", [](py::array x, py::array weight, int64_t groups, py::array residual, py::array y) {
    group_norm_relu_forward(image(x, true), {floats(weight), floats(weight), groups, 1e-5f}, image(residual, true),
                            image(y, true), kThreads);
  });
  m.def("hamburger", [](py::array x, py::array matrix, py::array bias, py::array bases, int64_t steps, py::array out,
                        int64_t groups, bool rounded, py::array y) {
    const GroupNorm norm{floats(bias), floats(bias), groups, 1e-5f};
    const HamburgerWeights weights{packed(matrix, bias), floats(bases), floats(out), norm, bases.shape(2), steps, rounded};
    hamburger_forward(image(x, true), weights, image(y, true), kThreads);
  });
  m.def("resize_concat_conv", [](py::list maps, py::list weights, py::array bias, py::array y) {
    std::vector<Image> images;
    std::vector<const void*> matrices;
    for (size_t i = 0; i < maps.size(); ++i) {
      images.push_back(image(maps[i].cast<py::array>(), true));
      matrices.push_back(data(weights[i].cast<py::array>()));
    }
    resize_concat_conv_forward(images.data(), matrices.data(), static_cast<int64_t>(maps.size()), floats(bias), image(y, true),
                               kThreads);
  });
}
