// What AddressSanitizer does not see by itself is told to it here (make sanitize); otherwise this is nothing. Masked loads
// and stores are compiler builtins, which it leaves alone, and memory kept from call to call is larger than what was asked.
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

// n elements from p on are about to be read or written.
template <class T>
static inline void touch(const T* p, int n) {
    if constexpr (SANITIZED) {
        void* bad = __asan_region_is_poisoned(const_cast<T*>(p), size_t(n) * sizeof(T));
        if (bad) (void)*static_cast<volatile char*>(bad);  // reported by the compiler's own check of this read
    }
}
