// The runtime behind host_run.h. Compiled without sanitizers, which it tells of its stacks and barriers.
#include "host_run.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "traffic.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

#define WEAK extern "C" __attribute__((weak))
WEAK void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
WEAK void __asan_poison_memory_region(const volatile void* from, size_t bytes);
WEAK void __asan_unpoison_memory_region(const volatile void* from, size_t bytes);
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
WEAK void __tsan_acquire(void* tag);
WEAK void __tsan_release(void* tag);

// Saves what the callee must keep, then goes on where `to` was saved.
extern "C" void switch_stacks(void** from, void* to);
asm(R"(
.text
.globl switch_stacks
.hidden switch_stacks
switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace host_run {

Settings settings;
std::vector<Cut> cuts;

namespace {

constexpr size_t kStack = 256 * 1024;
enum class State { kReady, kAtBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* pointer = nullptr;  // of its stack, while it does not run
  void *tsan = nullptr, *asan = nullptr;
  State state = State::kDone;
  unsigned site = 0, index = 0;
  std::vector<Copy> copies;
};

std::vector<std::unique_ptr<Fiber>> fibers;
Fiber* current = nullptr;
void *main_pointer, *main_tsan, *main_asan;
const void* main_bottom;
size_t main_size;
const std::function<void()>* kernel;
std::unique_ptr<unsigned char, decltype(&std::free)> shared{nullptr, &std::free};
size_t shared_size;
char tags[2];  // of barriers, in turn: one tag for all would let a barrier stand for the next
int tag;
struct Warp {
  char tags[2];
  int tag;
};
Warp warps[32];

int launches;
std::string problem;  // that the kernel has, thrown at the next barrier

void switch_to_main() {
  Fiber* self = current;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&self->asan, main_bottom, main_size);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(main_tsan, 1);
  switch_stacks(&self->pointer, main_pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(self->asan, &main_bottom, &main_size);
}

void fiber_main() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &main_bottom, &main_size);
  if (__tsan_acquire) __tsan_acquire(&tags[tag]);
  (*kernel)();
  if (__tsan_release) __tsan_release(&tags[tag ^ 1]);
  current->state = State::kDone;
  switch_to_main();
  __builtin_unreachable();
}

void start(Fiber& fiber, unsigned index) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(fiber.stack.get(), kStack);
  if (__tsan_create_fiber && fiber.tsan == nullptr) fiber.tsan = __tsan_create_fiber(0);
  auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStack) & ~uintptr_t{63};
  auto* frame = reinterpret_cast<void**>(top) - 8;  // six registers, the return address, and where that one would return to
  std::memset(frame, 0, 8 * sizeof(void*));
  frame[6] = reinterpret_cast<void*>(&fiber_main);
  fiber.pointer = frame;
  fiber.state = State::kReady;
  fiber.index = index;
  fiber.copies.clear();
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = {fiber.index, 0, 0};
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&main_asan, fiber.stack.get(), kStack);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fiber.tsan, 1);
  switch_stacks(&main_pointer, fiber.pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(main_asan, nullptr, nullptr);
  current = nullptr;
}

// Lets the warps go on all of whose threads have come to a barrier of theirs; says whether there is one.
bool release_warps(unsigned threads) {
  bool released = false;
  for (unsigned first = 0; first < threads; first += 32) {
    const unsigned last = std::min(first + 32, threads);
    unsigned waiting = 0;
    for (unsigned i = first; i < last; ++i) waiting += fibers[i]->state == State::kAtWarpBarrier;
    if (waiting == 0) continue;
    for (unsigned i = first; i < last; ++i) {
      if (fibers[i]->state != State::kAtWarpBarrier || fibers[i]->site != fibers[first]->site) {
        problem = "divergent barrier: a warp's threads wait in line " + std::to_string(fibers[i]->site) + " and elsewhere";
      }
      fibers[i]->state = State::kReady;
    }
    warps[first / 32].tag ^= 1;
    released = true;
  }
  return released;
}

// Runs every thread to the next barrier of the block or to its end.
void run_phase(unsigned threads, const std::vector<unsigned>& order) {
  for (unsigned i = 0; i < threads; ++i) {
    if (fibers[i]->state == State::kAtBarrier) fibers[i]->state = State::kReady;
  }
  do {
    for (const unsigned i : order) {
      Fiber& fiber = *fibers[i];
      if (fiber.state != State::kReady) continue;
      resume(fiber);
      if (fiber.state == State::kDone && !fiber.copies.empty()) problem = "a thread returned before its copies landed";
    }
  } while (release_warps(threads) && problem.empty());
}

// Whether threads wait for the next phase, all in the same line and none has returned: else the kernel has a problem.
bool goes_on(unsigned threads) {
  const Fiber* waiting = nullptr;
  unsigned done = 0;
  for (unsigned i = 0; i < threads; ++i) {
    const Fiber& fiber = *fibers[i];
    done += fiber.state == State::kDone;
    if (fiber.state == State::kDone) continue;
    if (waiting != nullptr && waiting->site != fiber.site) {
      problem =
          "divergent barrier: threads wait in lines " + std::to_string(waiting->site) + " and " + std::to_string(fiber.site);
    }
    waiting = &fiber;
  }
  if (waiting != nullptr && done > 0) {
    problem = "divergent barrier: threads wait in line " + std::to_string(waiting->site) + " for threads that have returned";
  }
  return waiting != nullptr;
}

void run_block(unsigned threads, std::mt19937& random) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(shared.get(), shared_size);
  std::memset(shared.get(), 0xFF, shared_size);  // NaN in every dtype
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  if (settings.order == 1) std::reverse(order.begin(), order.end());
  if (__tsan_release) __tsan_release(&tags[tag]);
  for (unsigned i = 0; i < threads; ++i) start(*fibers[i], i);
  bool more = true;
  while (more) {
    if (settings.order > 1) std::shuffle(order.begin(), order.end(), random);
    run_phase(threads, order);
    more = goes_on(threads);
    if (__tsan_acquire) __tsan_acquire(&tags[tag ^ 1]);
    end_traced_phase();
    tag ^= 1;
    if (!problem.empty()) throw std::runtime_error(std::exchange(problem, {}));
  }
}

}  // namespace

void barrier(unsigned site) {
  Fiber* self = current;
  self->state = State::kAtBarrier;
  self->site = site;
  if (__tsan_release) __tsan_release(&tags[tag ^ 1]);
  switch_to_main();
  if (__tsan_acquire) __tsan_acquire(&tags[tag]);
}

void warp_barrier(unsigned site) {
  Fiber* self = current;
  Warp& warp = warps[self->index / 32];
  self->state = State::kAtWarpBarrier;
  self->site = site;
  if (__tsan_release) __tsan_release(&warp.tags[warp.tag ^ 1]);
  switch_to_main();
  if (__tsan_acquire) __tsan_acquire(&warp.tags[warp.tag]);
}

unsigned char* shared_memory() { return shared.get(); }
size_t shared_bytes() { return shared_size; }

void guard(void* from, size_t bytes) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(from, bytes);
}

void copy_async(void* to, const void* from, unsigned site) {
  trace(from, 16, false, site);
  trace(to, 16, true, site);
  for (const Copy& pending : current->copies) {
    if (pending.to == to) problem = "a copy in line " + std::to_string(site) + " goes where another is still to land";
  }
  current->copies.push_back({to, from});
}

std::vector<Copy> take_copies() { return std::exchange(current->copies, {}); }

void run(dim3 blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& body) {
  if (const int number = launches++; settings.launch >= 0 && number != settings.launch) return;
  if (shared_bytes > static_cast<size_t>(settings.shared_limit) || threads > 1024 || threads == 0) {
    throw std::runtime_error("a launch asks for too much");
  }
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  shared_size = shared_bytes;
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, shared_bytes) != 0) throw std::bad_alloc();
  shared.reset(static_cast<unsigned char*>(memory));
  main_tsan = __tsan_get_current_fiber ? __tsan_get_current_fiber() : nullptr;
  kernel = &body;
  gridDim = blocks;
  blockDim = dim3(threads);
  std::mt19937 random(settings.order);
  unsigned ran = 0;
  for (unsigned block = settings.first; block < blocks.x * blocks.y && ran < settings.count; block += settings.step, ++ran) {
    blockIdx = {block % blocks.x, block / blocks.x, 0};
    run_block(threads, random);
  }
  end_traced_launch();
}

void reset() {
  reset_traffic();
  launches = 0;
  cuts.clear();
}

}  // namespace host_run

// What launch.h asks of CUDA's runtime.
extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = host_run::settings.shared_limit, cudaSuccess;
}
// Another value than the device's would hold for the calls of other threads, too.
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return value == host_run::settings.shared_limit ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "error"; }
}
