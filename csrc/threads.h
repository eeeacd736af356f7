// Torch's threads, for the bindings of the CPU kernels.
#pragma once
#include "cpu/kernels.h"
#include "tensors.h"

namespace segnext::tensors {

inline Parallel parallel() {
  return {torch::stable::get_num_threads(), [](int64_t items, const Range& body) {
            if (items > 0) torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) { body(begin, end); });
          }};
}

}  // namespace segnext::tensors
