// Loops on several threads. Each thread begins with a part of its own, of neighbours in order, and then takes half of what is
// left of the longest part, so that a thread whose core is slower or busy keeps the others waiting for its last few items at
// most.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

namespace segnext {

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// The items of a loop that no thread has begun.
class Shares {
 public:
  // Fewer than `least` neighbours are not taken out of a part, nor is a part begun with fewer.
  Shares(int64_t items, int64_t threads, int64_t least)
      : least_(std::max<int64_t>(least, 1)), parts_(std::clamp<int64_t>(items / least_, 1, threads)) {
    for (int64_t t = 0; t < count(); ++t) parts_[t].set({t * items / count(), (t + 1) * items / count()});
  }
  int64_t count() const { return static_cast<int64_t>(parts_.size()); }
  bool empty() const {
    return std::all_of(parts_.begin(), parts_.end(), [](const Part& part) { return part.rest() <= 0; });
  }

  // Of the thread's own part or of what it takes from another: `most` items, or an eighth if that is 0. Empty at the end.
  Range next(int64_t thread, int64_t most) {
    Range range = parts_[thread].next(most);
    while (range.empty()) {
      Part* part = longest();
      if (part == nullptr) break;
      const Range taken = part->take_half(least_);
      range = first_of(taken, most);
      parts_[thread].set({range.end, taken.end});
    }
    return range;
  }

 private:
  static Range first_of(Range range, int64_t most) {
    const int64_t size = range.end - range.begin;
    return {range.begin, range.begin + std::min(size, most > 0 ? most : (size + 7) / 8)};
  }

  // Its ends change under the lock alone; without it they tell about how much is left.
  class alignas(64) Part {
   public:
    void set(Range range) {
      const std::lock_guard lock(mutex_);
      begin_ = range.begin;
      end_ = range.end;
    }
    int64_t rest() const { return end_ - begin_; }
    Range next(int64_t most) {
      const std::lock_guard lock(mutex_);
      const Range range = first_of({begin_, end_}, most);
      begin_ = range.end;
      return range;
    }
    Range take_half(int64_t least) {
      const std::lock_guard lock(mutex_);
      const int64_t end = end_, count = rest() < least ? 0 : rest() < 2 * least ? rest() : rest() / 2;
      end_ = end - count;
      return {end - count, end};
    }

   private:
    std::mutex mutex_;
    std::atomic<int64_t> begin_{0}, end_{0};
  };

  // The part that has most left; null when none has enough.
  Part* longest() {
    Part* longest = nullptr;
    int64_t most = least_ - 1;
    for (Part& part : parts_) {
      const int64_t rest = part.rest();
      if (rest > most) longest = &part, most = rest;
    }
    return longest;
  }

  const int64_t least_;
  std::vector<Part> parts_;
};

// From which end of its part a thread begins.
enum class Order { kForward, kBackward };

struct Loop {
  int64_t items, least = 1;  // least: neighbours that a thread begins with
  Order order = Order::kForward;
};

// What one thread does of a loop: `for (int64_t item : share)`, or several neighbours at a time with next().
class Share {
 public:
  Share(Shares& shares, int64_t thread, const Loop& loop)
      : shares_(shares), thread_(loop.order == Order::kForward ? thread : shares.count() - 1 - thread), loop_(loop) {}

  // At most `most` neighbours, of a loop that goes forward.
  Range next(int64_t most) { return shares_.next(thread_, most); }

  struct End {};
  class Iterator {
   public:
    explicit Iterator(Share& share) : share_(share), range_(share.next(0)) {}
    int64_t operator*() const {
      return share_.loop_.order == Order::kForward ? range_.begin : share_.loop_.items - 1 - range_.begin;
    }
    void operator++() {
      if (++range_.begin == range_.end) range_ = share_.next(0);
    }
    bool operator!=(End) const { return !range_.empty(); }

   private:
    Share& share_;
    Range range_;
  };
  Iterator begin() { return Iterator(*this); }
  End end() const { return {}; }

 private:
  Shares& shares_;
  const int64_t thread_;
  const Loop loop_;
};

// Calls body(share) on up to `threads` threads at the same time, which together go through all items.
struct Parallel {
  using Body = std::function<void(Share&)>;
  int64_t threads;
  void (*run)(int64_t count, const std::function<void(int64_t)>& f);  // f(i) for all i below count; throws what an f threw

  void operator()(int64_t items, const Body& body) const { (*this)(Loop{items}, body); }
  void operator()(const Loop& loop, const Body& body) const {
    if (loop.items <= 0) return;
    Shares shares(loop.items, threads, loop.least);
    run(shares.count(), [&](int64_t thread) {
      if (shares.empty()) return;
      Share share(shares, thread, loop);
      body(share);
    });
  }
};

}  // namespace segnext
