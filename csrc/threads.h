// Torch's threads, for the bindings of the CPU kernels.
#pragma once
#include "cpu/kernels.h"
#include "tensors.h"

namespace segnext::tensors {

inline Parallel parallel() {
  return {torch::stable::get_num_threads(), [](int64_t count, const std::function<void(int64_t)>& f) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) f(i);
            });
          }};
}

}  // namespace segnext::tensors
