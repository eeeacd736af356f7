// Torch's threads, for the bindings of the CPU kernels.
#pragma once
#include <exception>
#include <mutex>

#include "cpu/kernels.h"
#include "tensors.h"

namespace segnext::tensors {

// Torch's loop makes any exception a RuntimeError, and prints it; what the first of them threw is thrown again, so that a lack
// of memory stays one.
inline Parallel parallel() {
  return {torch::stable::get_num_threads(), [](int64_t count, const std::function<void(int64_t)>& f) {
            std::exception_ptr thrown;
            std::mutex mutex;
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              try {
                for (int64_t i = begin; i < end; ++i) f(i);
              } catch (...) {
                const std::lock_guard lock(mutex);
                if (!thrown) thrown = std::current_exception();
              }
            });
            if (thrown) std::rethrow_exception(thrown);
          }};
}

}  // namespace segnext::tensors
