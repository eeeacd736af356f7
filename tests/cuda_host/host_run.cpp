// The runtime behind host_run.h. Compiled without sanitizers, which it tells of its stacks and barriers.
#include "host_run.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_set>
#include <utility>
#include <vector>

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
constexpr size_t kSites = 512 * 8;  // lines, times four sizes, times load and store
enum class State { kReady, kAtBarrier, kDone };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* pointer = nullptr;  // of its stack, while it does not run
  void *tsan = nullptr, *asan = nullptr;
  State state = State::kDone;
  unsigned site = 0, index = 0;
  std::vector<Copy> copies;
  std::vector<unsigned> occurrences = std::vector<unsigned>(kSites);  // of sites since the last barrier
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

struct Access {
  uintptr_t address;
  size_t bytes;
};
// Lanes of a warp that come by the same place for the same time make one instruction.
struct Traced {
  uint64_t instruction;  // warp, site, occurrence
  unsigned lane;
  bool store;
  Access access;
};
std::vector<Traced> traced;
std::unordered_set<uintptr_t> sectors_read;
Traffic total;
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
  std::fill(fiber.occurrences.begin(), fiber.occurrences.end(), 0u);
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

bool is_shared(uintptr_t address) {
  const auto base = reinterpret_cast<uintptr_t>(shared.get());
  return address >= base && address < base + shared_size;
}

// The units of some size that lanes [first, last) touch, each once, in order.
std::vector<uintptr_t> touched(const std::vector<Access>& lanes, size_t first, size_t last, size_t size) {
  std::vector<uintptr_t> units;
  for (size_t i = first; i < last; ++i) {
    const uintptr_t end = (lanes[i].address + lanes[i].bytes - 1) / size;
    for (uintptr_t unit = lanes[i].address / size; unit <= end; ++unit) units.push_back(unit);
  }
  std::sort(units.begin(), units.end());
  units.erase(std::unique(units.begin(), units.end()), units.end());
  return units;
}

// 32 banks of 4 bytes. Wide accesses go by halves or quarters of a warp; one that touches just what another does is free.
long wavefronts(const std::vector<Access>& lanes) {
  const size_t together = std::max<size_t>(1, 128 / lanes[0].bytes);
  long count = 0;
  std::vector<uintptr_t> before;
  for (size_t first = 0; first < lanes.size(); first += together) {
    const std::vector<uintptr_t> words = touched(lanes, first, std::min(first + together, lanes.size()), 4);
    if (words == before) continue;
    int banks[32] = {};
    for (const uintptr_t word : words) ++banks[word % 32];
    count += *std::max_element(banks, banks + 32);
    before = words;
  }
  return count;
}

void count(const std::vector<Access>& lanes, bool store) {
  if (is_shared(lanes[0].address)) {
    ++total.shared_instructions;
    total.shared_wavefronts += wavefronts(lanes);
    total.shared_ideal += (static_cast<long>(touched(lanes, 0, lanes.size(), 4).size()) + 31) / 32;
    return;
  }
  const std::vector<uintptr_t> sectors = touched(lanes, 0, lanes.size(), 32);
  const long bytes = 2 * static_cast<long>(touched(lanes, 0, lanes.size(), 2).size());  // no element is smaller
  (store ? total.written_bytes : total.read_bytes) += bytes;
  (store ? total.written_sectors : total.read_sectors) += static_cast<long>(sectors.size());
  if (!store) sectors_read.insert(sectors.begin(), sectors.end());
}

void count_instructions() {
  std::sort(traced.begin(), traced.end(),
            [](const Traced& a, const Traced& b) { return std::tie(a.instruction, a.lane) < std::tie(b.instruction, b.lane); });
  std::vector<Access> lanes;
  for (size_t i = 0; i < traced.size(); ++i) {
    lanes.push_back(traced[i].access);
    if (i + 1 < traced.size() && traced[i + 1].instruction == traced[i].instruction) continue;
    count(lanes, traced[i].store);
    lanes.clear();
  }
  traced.clear();
}

void finish_phase() {
  if (settings.traced) count_instructions();
  tag ^= 1;
}

void run_block(unsigned threads, std::mt19937& random) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(shared.get(), shared_size);
  std::memset(shared.get(), 0xFF, shared_size);  // NaN in every dtype
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  if (settings.order == 1) std::reverse(order.begin(), order.end());
  if (__tsan_release) __tsan_release(&tags[tag]);
  for (unsigned i = 0; i < threads; ++i) start(*fibers[i], i);
  for (unsigned left = threads; left > 0;) {
    if (settings.order > 1) std::shuffle(order.begin(), order.end(), random);
    left = 0;
    unsigned done = 0;
    const Fiber* waiting = nullptr;
    for (const unsigned i : order) {
      Fiber& fiber = *fibers[i];
      if (fiber.state == State::kDone) {
        ++done;
        continue;
      }
      resume(fiber);
      if (fiber.state == State::kDone) {
        ++done;
        if (!fiber.copies.empty()) problem = "a thread returned before its copies landed";
        continue;
      }
      ++left;
      if (waiting != nullptr && waiting->site != fiber.site) {
        problem =
            "divergent barrier: threads wait in lines " + std::to_string(waiting->site) + " and " + std::to_string(fiber.site);
      }
      waiting = &fiber;
    }
    if (left > 0 && done > 0) {
      problem = "divergent barrier: threads wait in line " + std::to_string(waiting->site) + " for threads that have returned";
    }
    if (__tsan_acquire) __tsan_acquire(&tags[tag ^ 1]);
    finish_phase();
    if (!problem.empty()) throw std::runtime_error(std::exchange(problem, {}));
  }
}

}  // namespace

void barrier(unsigned site) {
  Fiber* self = current;
  self->state = State::kAtBarrier;
  self->site = site;
  if (settings.traced) std::fill(self->occurrences.begin(), self->occurrences.end(), 0u);
  if (__tsan_release) __tsan_release(&tags[tag ^ 1]);
  switch_to_main();
  if (__tsan_acquire) __tsan_acquire(&tags[tag]);
}

unsigned char* shared_memory() { return shared.get(); }

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

void trace(const void* address, size_t bytes, bool store, unsigned site) {
  if (!settings.traced) return;
  const uint64_t key = (site * 8 + (bytes >= 16 ? 3 : bytes >> 2) * 2 + store) % kSites;  // 2, 4, 8, 16 bytes
  const uint64_t warp = current->index / 32, occurrence = current->occurrences[key]++;
  traced.push_back(
      {warp << 54 | key << 32 | occurrence, current->index % 32, store, {reinterpret_cast<uintptr_t>(address), bytes}});
}

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
  total.distinct_read_sectors += static_cast<long>(sectors_read.size());
  sectors_read.clear();
}

Traffic traffic() { return total; }
void reset() {
  total = {};
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
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "error"; }
}
