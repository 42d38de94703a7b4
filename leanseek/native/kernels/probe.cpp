// Memory bandwidth with all threads reading: the limit we compare decoding with.
#include "kernels.h"

KERNEL read_memory(const void* data, int64_t bytes, int64_t* sum) {
    constexpr int64_t PIECE = 1 << 20, AHEAD = 4096;
    std::atomic<uint64_t> total{0};  // unsigned, because sums wrap around
    parallel_for(bytes / PIECE, [&](int64_t piece) {
        const char* p = static_cast<const char*>(data) + piece * PIECE;
        __m256i sums[8] = {};
        for (int64_t i = 0; i < PIECE; i += 256) {
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                if (j % 2 == 0) __builtin_prefetch(p + i + j * 32 + AHEAD);
                sums[j] = _mm256_add_epi64(sums[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i + j * 32)));
            }
        }
        uint64_t lanes[4], own = 0;
        for (const __m256i& s : sums) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), s);
            for (uint64_t lane : lanes) own += lane;
        }
        total += own;
    });
    *sum = int64_t(total);
}
