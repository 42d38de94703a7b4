// Tells AddressSanitizer (make sanitize) what it does not see by itself; empty in other builds. It does not check masked
// loads and stores, which are compiler builtins, and buffers that we reuse may be larger than the current request.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
constexpr bool SANITIZED = true;
#else
constexpr bool SANITIZED = false;
#define __asan_region_is_poisoned(p, bytes) nullptr
#define __asan_poison_memory_region(p, bytes) ((void)(p))
#define __asan_unpoison_memory_region(p, bytes) ((void)(p))
#endif

// Call before reading or writing n elements at p.
template <class T>
static inline void touch(const T* p, int n) {
    if constexpr (SANITIZED) {
        void* bad = __asan_region_is_poisoned(const_cast<T*>(p), size_t(n) * sizeof(T));
        if (bad) (void)*static_cast<volatile char*>(bad);  // reported by the compiler's own check of this read
    }
}
