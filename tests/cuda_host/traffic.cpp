// Counts what a kernel asks of memory: bytes, sectors, wavefronts of shared memory. Compiled without sanitizers.
#include "traffic.h"

#include <algorithm>
#include <cstdint>
#include <unordered_set>
#include <vector>

#include "host_run.h"

namespace host_run {
namespace {

constexpr size_t kSites = 512 * 8;  // lines, times four sizes, times load and store

struct Access {
  uintptr_t address;
  size_t bytes;
};
// Lanes of a warp that come by the same place for the same time make one instruction.
struct Traced {
  uint64_t place;  // warp, site, occurrence, lane
  Access access;
};
constexpr unsigned kWarp = 59, kSite = 47, kOccurrence = 5;  // where these begin in a place
static_assert(kSites == 1 << (kWarp - kSite));
std::vector<Traced> traced;
std::unordered_set<uintptr_t> sectors_read;
Traffic total;
std::vector<std::vector<uint64_t>> occurrences;  // of a thread's sites since the last barrier

bool is_shared(uintptr_t address) {
  const auto base = reinterpret_cast<uintptr_t>(shared_memory());
  return address >= base && address < base + shared_bytes();
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
  std::sort(traced.begin(), traced.end(), [](const Traced& a, const Traced& b) { return a.place < b.place; });
  std::vector<Access> lanes;
  for (size_t i = 0; i < traced.size(); ++i) {
    const uint64_t place = traced[i].place, site = (place >> kSite) % kSites;
    lanes.push_back(traced[i].access);
    occurrences[(place >> kWarp) * 32 + place % 32][site] = 0;
    if (i + 1 < traced.size() && traced[i + 1].place >> kOccurrence == place >> kOccurrence) continue;
    count(lanes, site % 2 == 1);
    lanes.clear();
  }
  traced.clear();
}

}  // namespace

void trace(const void* address, size_t bytes, bool store, unsigned site) {
  if (!settings.traced) return;
  const uint64_t at = (site * 8 + (bytes >= 16 ? 3 : bytes >> 2) * 2 + store) % kSites;  // 2, 4, 8, 16 bytes
  const unsigned thread = threadIdx.x;
  while (occurrences.size() <= thread) occurrences.emplace_back(kSites);
  const uint64_t warp = thread / 32, lane = thread % 32, occurrence = occurrences[thread][at]++;
  const uint64_t place = warp << kWarp | at << kSite | occurrence << kOccurrence | lane;
  traced.push_back({place, {reinterpret_cast<uintptr_t>(address), bytes}});
}

void end_traced_phase() {
  if (settings.traced) count_instructions();
}

void end_traced_launch() {
  total.distinct_read_sectors += static_cast<long>(sectors_read.size());
  sectors_read.clear();
}

Traffic traffic() { return total; }
void reset_traffic() { total = {}; }

}  // namespace host_run
