// Absorbed MLA attention over the paged cache of latents, as one call.
#pragma once
#include "arena.h"
#include "stored.h"

// One layer's cache [slots, width]; the value of a row is its first value_width columns.
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

// out[n][H][V] = softmax(q[n][H][W] . rows * scale) rows[:, :V] for the batch's rows [first, last), which q and out begin
// with, each query over its own past. `narrow`: q may be rounded to BF16 where the cache is BF16 and the CPU multiplies it.
void attend(Arena& arena, const LatentCache& cache, const Batch& batch, long first, long last, bool narrow, const float* q,
            long H, float scale, float* out);
