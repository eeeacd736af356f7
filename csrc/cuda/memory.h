// Every access to memory goes through here: what the kernels read and write is counted at these functions when they run on the
// host (tests/cuda_host), and is one instruction of up to 16 bytes on the device.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "arguments.h"

#ifdef SEGNEXT_HOST_RUN
#define SEGNEXT_SHARED(name) unsigned char* name = host_run::shared_memory()
#define SEGNEXT_TRACE(...) host_run::trace(__VA_ARGS__)
#else
#define SEGNEXT_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define SEGNEXT_TRACE(...)
#endif

namespace segnext::cuda {

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T at[N];
  __device__ T& operator[](int i) { return at[i]; }
  __device__ T operator[](int i) const { return at[i]; }
};

// `site` tells accesses of different places apart; lanes of a warp that come by together make one instruction.
template <int N, class T>
__device__ __forceinline__ Vec<T, N> read(const T* from, [[maybe_unused]] unsigned site = __builtin_LINE()) {
  SEGNEXT_TRACE(from, sizeof(T) * N, false, site);
  return *reinterpret_cast<const Vec<T, N>*>(from);
}
template <int N, class T>
__device__ __forceinline__ void write(T* to, const Vec<T, N>& value, [[maybe_unused]] unsigned site = __builtin_LINE()) {
  SEGNEXT_TRACE(to, sizeof(T) * N, true, site);
  *reinterpret_cast<Vec<T, N>*>(to) = value;
}

// Copies 16 bytes, which others have written as another type before a barrier.
__device__ __forceinline__ void copy_unit(void* to, const void* from, [[maybe_unused]] unsigned site = __builtin_LINE()) {
  SEGNEXT_TRACE(from, 16, false, site);
  SEGNEXT_TRACE(to, 16, true, site);
  *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

// The i-th number of a filter of an image of T, whose dtype is T's or float32.
template <class T>
__device__ __forceinline__ float read_tap(const void* taps, Dtype dtype, int64_t i) {
  if (sizeof(T) < sizeof(float) && dtype != Dtype::kFloat32) return to_float(read<1>(static_cast<const T*>(taps) + i)[0]);
  return read<1>(static_cast<const float*>(taps) + i)[0];
}

__device__ __forceinline__ void round_to(float v, float& out) { out = v; }
__device__ __forceinline__ void round_to(float v, __half& out) { out = __float2half_rn(v); }
__device__ __forceinline__ void round_to(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }

// Copies 16 bytes from global to shared memory. They are there for the thread that copied them after wait_async(); for others
// after a barrier that follows. Before sm_80 the copy is an ordinary one.
__device__ __forceinline__ void copy_async(void* shared, const void* global,
                                           [[maybe_unused]] unsigned site = __builtin_LINE()) {
#ifdef SEGNEXT_HOST_RUN
  host_run::copy_async(shared, global, site);
#elif __CUDA_ARCH__ >= 800
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
  asm volatile("" ::: "memory");  // it is read as another type
#endif
}
__device__ __forceinline__ void wait_async() {
#ifdef SEGNEXT_HOST_RUN
  host_run::wait_async();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#else
  asm volatile("" ::: "memory");
#endif
}

}  // namespace segnext::cuda
