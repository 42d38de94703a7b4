// Absorbed MLA attention over the paged cache of latents, as one call.
#pragma once
#include "arena.h"
#include "stored.h"

// One layer's cache [slots, width]; a row's first value_width columns are its value.
struct LatentCache {
    int64_t kind;
    const void* data;
    long width, value_width, page_size;
};

// New tokens of several sequences: rows row_offsets[s] .. row_offsets[s + 1] belong to sequence s.
struct Batch {
    const int64_t *positions, *row_offsets, *pages;
    long tokens, sequences, pages_per_sequence;
};

// out[n][H][V] = softmax(q[n][H][W] . rows * scale) rows[:, :V] for the batch's rows [first, last), each query over its own
// past; q and out start at row `first`. `narrow`: q may be rounded to BF16 if the cache is BF16 and the CPU supports it.
void attend(Arena& arena, const LatentCache& cache, const Batch& batch, long first, long last, bool narrow, const float* q,
            long H, float scale, float* out);
