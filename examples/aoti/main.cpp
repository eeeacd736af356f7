// Runs a package of `segnext export --format aoti` without Python: float32 images on stdin, logits or int64 labels on stdout.
//
//   T=$(python -c 'import torch; print(torch.__path__[0])')
//   g++ -std=c++20 -O2 main.cpp -o main -I$T/include -L$T/lib -Wl,-rpath,$T/lib,--no-as-needed -ltorch -ltorch_cpu -lc10
//   ./main model.pt2 1 3 512 512 < images.raw > logits.raw
//
// A package made with --operators takes one argument more, the library that the export names. The operators' schemas,
// which segnext_kernels defines in Python, are then those below; a library that is linked with `-z now` wants libpython too.
#include <ATen/ops/from_blob.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/library.h>

#include <iostream>

TORCH_LIBRARY(segnext_kernels, m) {
  m.def("conv_act(Tensor x, Tensor weight, Tensor bias, int kernel_size, int stride, str activation) -> Tensor");
  m.def("group_norm_relu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, Tensor? residual) -> Tensor");
  m.def(
      "hamburger(Tensor x, Tensor ham_in, Tensor bias, Tensor bases, int steps, Tensor ham_out, Tensor norm_weight,"
      " Tensor norm_bias, int groups, float eps, bool round_factors) -> Tensor");
  m.def(
      "mlp(Tensor x, Tensor fc1, Tensor bias1, Tensor depthwise, Tensor depthwise_bias, Tensor fc2, Tensor bias2, "
      "Tensor? norm_weight, Tensor? norm_bias, float eps) -> Tensor");
  m.def("nmf(Tensor x, Tensor bases, int steps, str gradient, bool round_factors=False) -> Tensor");
  m.def("resize_concat_conv(Tensor[] maps, Tensor[] weights, Tensor bias) -> Tensor");
  m.def("spatial_attention(Tensor x, Tensor[] weights) -> Tensor");
  m.def("upsample_argmax(Tensor logits, SymInt height, SymInt width) -> Tensor");
}

int main(int argc, char** argv) {
  if (argc < 6) return std::cerr << "usage: main PACKAGE BATCH CHANNELS HEIGHT WIDTH [LIBRARY]\n", 2;
  if (argc > 6 && !dlopen(argv[6], RTLD_LAZY)) return std::cerr << dlerror() << "\n", 1;
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  const std::vector<int64_t> shape = {std::stoll(argv[2]), std::stoll(argv[3]), std::stoll(argv[4]), std::stoll(argv[5])};
  std::vector<float> pixels(c10::multiply_integers(shape));
  if (!std::cin.read(reinterpret_cast<char*>(pixels.data()), pixels.size() * sizeof(float)))
    return std::cerr << "too few pixels\n", 1;
  const at::Tensor result = loader.run({at::from_blob(pixels.data(), shape)})[0].contiguous();
  std::cout.write(static_cast<const char*>(result.data_ptr()), result.nbytes());
}
