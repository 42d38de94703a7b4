// Every kernel file includes this. A kernel is a C function over pointers and sizes; it uses no torch headers, so one build
// works with every version of torch. Strides count elements. The callers (leanseek/native/*.py) check the shapes.
#pragma once
#include <cstdlib>
#include <new>
#include <type_traits>

#include "parallel.h"
#include "simd.h"

#define KERNEL extern "C" __attribute__((visibility("default"))) void

// Element types as library.py numbers them.
enum Dtype : int64_t { FP32 = 0, BF16 = 1 };

// Calls body with a null pointer of the element type: with_type(dtype, [&](auto* t) { using T = ...; }).
template <class Body>
static auto with_type(int64_t dtype, const Body& body) {
    if (dtype == BF16) return body(static_cast<bf16*>(nullptr));
    return body(static_cast<float*>(nullptr));
}

template <class Body>
static void with_types(int64_t dtype, int64_t other, const Body& body) {
    with_type(dtype, [&](auto* type) { with_type(other, [&](auto* second) { body(type, second); }); });
}

#define ELEMENT(pointer) std::remove_pointer_t<decltype(pointer)>

// Memory of the calling thread, 64-byte aligned, reused from call to call. Buffers in use at the same time need different
// slots.
static inline void* scratch_bytes(int slot, size_t bytes) {
    struct Buffer {
        void* data = nullptr;
        size_t size = 0;
        ~Buffer() { std::free(data); }
    };
    thread_local Buffer buffers[8];
    Buffer& buffer = buffers[slot];
    if (buffer.size < bytes || SANITIZED) {
        std::free(buffer.data);
        buffer.size = (bytes + 63) / 64 * 64;
        buffer.data = std::aligned_alloc(64, buffer.size);
        if (!buffer.data) throw std::bad_alloc();
        __asan_poison_memory_region(static_cast<char*>(buffer.data) + bytes, buffer.size - bytes);
    }
    return buffer.data;
}
template <class T = float>
static inline T* scratch(int slot, int64_t count) {
    return static_cast<T*>(scratch_bytes(slot, size_t(count) * sizeof(T)));
}

// Calls body(offset, lanes) over [0, width): full vectors first, then the remaining lanes.
template <class Body>
static inline void lanes_of(int64_t width, const Body& body) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) body(i, LANES);
    if (i < width) body(i, int(width - i));
}

static inline int64_t whole_vectors(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
