// Scratch memory that outlives the calls that need it.
#pragma once
#include <cstdint>
#include <new>
#include <utility>

#include "cpu/simd.h"

namespace segnext {

// Freed blocks of scratch memory, kept by every thread for its next calls: fresh pages of the system cost more than the kernels
// that fill them. Under AddressSanitizer nothing is kept, so that it sees every block.
class FreeBlocks {
 public:
  struct Block {
    void* data;
    size_t size;
  };

  static Block take(size_t size) {
    for (Block& kept : mine().blocks_) {
      if (kept.size < size || kept.size > 2 * size) continue;
      mine().total_ -= kept.size;
      return std::exchange(kept, {});
    }
    return {::operator new(size, kAlignment), size};
  }

  static void give(Block block) {
    FreeBlocks& free = mine();
    for (Block& kept : free.blocks_) {
      if (!kKeep || kept.data != nullptr || free.total_ + block.size > kMost) continue;
      kept = block;
      free.total_ += block.size;
      return;
    }
    free.keep_instead(block);
  }

 private:
  static constexpr bool kKeep = !SEGNEXT_ADDRESS_SANITIZER;
  static constexpr size_t kMost = 64 << 20, kCount = 16;
  static constexpr std::align_val_t kAlignment{64};

  // Where there is no room for a block, others go, each in its turn: they may be of sizes that no call has any longer.
  SEGNEXT_NOINLINE void keep_instead(Block block) {
    if (!kKeep || block.size > kMost) return ::operator delete(block.data, kAlignment);
    Block* place = nullptr;
    do {
      place = &blocks_[turn_++ % kCount];
      total_ -= place->size;
      ::operator delete(std::exchange(*place, {}).data, kAlignment);
    } while (total_ + block.size > kMost);
    *place = block;
    total_ += block.size;
  }

  static FreeBlocks& mine() {
    thread_local FreeBlocks blocks;
    return blocks;
  }
  ~FreeBlocks() {
    for (Block& kept : blocks_) ::operator delete(kept.data, kAlignment);
  }

  Block blocks_[kCount] = {};
  size_t total_ = 0, turn_ = 0;
};

// Aligned scratch memory that frees itself.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t size) : block_(FreeBlocks::take(bytes(size))) {}
  ~Buffer() { FreeBlocks::give(block_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator A*() const { return static_cast<A*>(block_.data); }

 private:
  static size_t bytes(int64_t size) {
    if (size < 0 || size > static_cast<int64_t>(PTRDIFF_MAX / sizeof(A))) throw std::bad_alloc();
    return static_cast<size_t>(size > 0 ? size : 1) * sizeof(A);
  }
  FreeBlocks::Block block_;
};

}  // namespace segnext
