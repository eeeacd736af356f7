// CUDA C++ under g++: included before every .cu file (-include host_run.h), with SEGNEXT_HOST_RUN for the few places that
// differ. One CUDA thread is a fiber, blocks run one after another. NVIDIA's headers bring the types; this brings what a kernel
// calls.
#pragma once
#define SEGNEXT_HOST_RUN 1
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>

#include <algorithm>
#include <functional>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
using std::max;
using std::min;

namespace host_run {

void barrier(unsigned site);
void warp_barrier(unsigned site);
unsigned char* shared_memory();
size_t shared_bytes();
// A region that nobody may touch, between two arrays in shared memory.
void guard(void* from, size_t bytes);
// Lands as late as is legal: in wait_async() of the same thread.
struct Copy {
  void* to;
  const void* from;
};
void copy_async(void* shared, const void* global, unsigned site);
std::vector<Copy> take_copies();
inline void wait_async() {  // here, so that the sanitizers see it
  for (const Copy& copy : take_copies()) *static_cast<uint4*>(copy.to) = *static_cast<const uint4*>(copy.from);
}
void trace(const void* address, size_t bytes, bool store, unsigned site);

void run(dim3 blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& body);

// How the last launch was cut, for module.cpp; other arguments than a tiling are of no interest.
struct Cut {
  int channels, columns, rows, groups, column_tiles, row_parts, block_images;
  unsigned blocks, threads;
  size_t shared_bytes;
};
extern std::vector<Cut> cuts;  // of the launches since reset() that have one
template <class T>
void note([[maybe_unused]] const cudaLaunchConfig_t& config, [[maybe_unused]] const T& argument) {
  if constexpr (requires { argument.tile_channels; }) {
    cuts.push_back({argument.tile_channels, argument.tile_columns, argument.part_rows, argument.groups, argument.column_tiles,
                    argument.row_parts, argument.block_images, config.gridDim.x, config.blockDim.x, config.dynamicSmemBytes});
  }
}

template <class... Parameters, class... Arguments>
cudaError_t launch(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  (note(*config, arguments), ...);
  run(config->gridDim, config->blockDim.x, config->dynamicSmemBytes, [&] { kernel(static_cast<Parameters>(arguments)...); });
  return cudaSuccess;
}

// What module.cpp sets and reads.
struct Settings {
  unsigned order = 0;             // of the threads between two barriers: 0 as they are numbered, 1 reversed, else drawn
  int shared_limit = 227 * 1024;  // of a block, in bytes
  unsigned first = 0, step = 1, count = ~0u;  // the blocks of a launch that run
  int launch = -1;                            // only this one of the launches since reset() runs; -1: all
  bool traced = false;
};
extern Settings settings;

// Of the traced launches since reset().
struct Traffic {
  long read_bytes, written_bytes;                             // that lanes asked for, each byte of a warp's instruction once
  long read_sectors, written_sectors;                         // of 32 bytes, each one of a warp's instruction once
  long distinct_read_sectors;                                 // of a launch: what comes from DRAM if the L2 keeps everything
  long shared_instructions, shared_wavefronts, shared_ideal;  // ideal: 128 bytes a wavefront
};
Traffic traffic();
void reset();

}  // namespace host_run

inline void __syncthreads(unsigned site = __builtin_LINE()) { host_run::barrier(site); }
inline void __syncwarp(unsigned site = __builtin_LINE()) { host_run::warp_barrier(site); }
#define cudaLaunchKernelEx host_run::launch
