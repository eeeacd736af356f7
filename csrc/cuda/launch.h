// How a kernel is launched: on the current stream of the caller, checked, with as much shared memory as it asks for.
#pragma once
#include <stdexcept>
#include <string>

#include "arguments.h"
#include "cuda/memory.h"

namespace segnext::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report it again
  throw std::runtime_error(std::string("segnext_kernels: ") + what + ": " + cudaGetErrorString(error));
}

// Shared memory that a block may have on the current device.
inline int shared_memory_limit() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "no current device");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "the device does not answer");
  return bytes;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int shared, cudaStream_t stream,
            const Arguments&... arguments) {
  if (blocks.x == 0) return;
  if (shared > 48 * 1024) {  // one value for all calls of the kernel, since another thread may be launching it, too
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shared_memory_limit()),
          "shared memory");
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "a kernel did not start");
}

// Calls f<T>() with the storage type; the caller has refused the others.
template <class F>
void with_storage(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f.template operator()<float>();
    case Dtype::kBFloat16:
      return f.template operator()<__nv_bfloat16>();
    case Dtype::kHalf:
      return f.template operator()<__half>();
    default:
      throw std::runtime_error("segnext_kernels: the CUDA kernels are for float32, bfloat16 and float16");
  }
}

// Calls f<T, kLast>() with the storage type and whether channels come last.
template <class F>
void with_kernel(const Image& x, const F& f) {
  with_storage(x.dtype,
               [&]<class T>() { x.channels_last ? f.template operator()<T, true>() : f.template operator()<T, false>(); });
}

}  // namespace segnext::cuda
