// Memory for one kernel call, reused by the next: after the first step nothing is allocated.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#include "sanitize.h"

class Arena {
  public:
    // Returns the calling thread's arena, emptied. One kernel uses it at a time. Arena 1 is for memory that must outlive
    // the parts of a call, each of which starts arena 0.
    static Arena& start(int which = 0) {
        thread_local Arena arena[2];
        arena[which].reset();
        return arena[which];
    }
    template <class T>
    T* take(long count) {  // 64-byte aligned, contents undefined
        const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64 + 64;
        if (blocks_.empty() || used_ + bytes > sizes_.back()) grow(bytes);
        char* place = blocks_.back() + used_;
        used_ += bytes;
        __asan_unpoison_memory_region(place, size_t(count) * sizeof(T));
        return reinterpret_cast<T*>(place);
    }
    // Frees what `body` takes when it returns.
    template <class Body>
    void within(const Body& body) {
        const size_t used = used_, blocks = blocks_.size();
        body();
        if (blocks_.size() == blocks) used_ = used;  // if it grew, nothing is freed; the next call finds one block
    }
    ~Arena() { release(); }

  private:
    void grow(size_t bytes) {
        const size_t size = std::max(bytes, size_t(1) << 20);
        void* block = std::aligned_alloc(64, size);
        if (!block) throw std::bad_alloc();
        blocks_.push_back(static_cast<char*>(block));
        sizes_.push_back(size / 64 * 64);
        __asan_poison_memory_region(block, size);
        used_ = 0;
    }
    void reset() {  // merges several blocks into one of the same total size
        size_t total = 0;
        for (size_t size : sizes_) total += size;
        if (blocks_.size() > 1) {
            release();
            grow(total);
        }
        if (!blocks_.empty()) __asan_poison_memory_region(blocks_.back(), sizes_.back());
        used_ = 0;
    }
    void release() {
        for (char* block : blocks_) std::free(block);
        blocks_.clear();
        sizes_.clear();
    }
    std::vector<char*> blocks_;
    std::vector<size_t> sizes_;
    size_t used_ = 0;
};
