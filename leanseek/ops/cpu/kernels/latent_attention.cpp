// Absorbed MLA attention over the paged cache of latents: every head attends to one shared row per token, whose first
// `value_width` columns are also its value.
//
// Sixteen (AVX2: eight) heads lie across the lanes of a vector, so a cached value is broadcast to all of them at once.
// A context is cut into chunks of CHUNK keys; each chunk has its own softmax, and chunks are merged in order. The
// arithmetic of one query is the same whether its chunks run on one thread or on many, alone or in a batch.
#include <algorithm>
#include <cmath>
#include <vector>

#include "latent_attention.h"

namespace {

constexpr long CHUNK = 512;  // keys that share a softmax maximum before chunks are merged
constexpr long KEYS = 64;    // keys held in FP32 at a time (64 x 576 floats: in L2)

// One row of the cache, in FP32.
void copy_row(const LatentCache& cache, long row, float* out) {
    with_type(cache.kind, [&](auto* type) {
        const auto* data = static_cast<const ELEMENT(type)*>(cache.data) + row * cache.width;
        long w = 0;
        for (; w + LANES <= cache.width; w += LANES) store(out + w, load(data + w));
        if (w < cache.width) store(out + w, load(data + w, int(cache.width - w)), int(cache.width - w));
    });
}

// One query's state for LANES heads: running maximum, sum of weights and weighted values, heads across the lanes
// for the first two and [LANES][value_width] for the last.
struct Partial {
    float maximum[LANES], sum[LANES];
    std::vector<float> values;
};

// Scores of `n` keys: score[key][lane] = q[lane] . key, from q transposed [W][LANES].
void score_keys(const float* q, const float* keys, long n, long W, float scale, float* score) {
    constexpr int TILE = 8;
    for (long key = 0; key < n; key += TILE) {
        const int tile = int(std::min<long>(TILE, n - key));
        vec sum[TILE];
        for (int i = 0; i < TILE; i++) sum[i] = zero();
        const float* row[TILE];
        for (int i = 0; i < TILE; i++) row[i] = keys + (key + std::min(i, tile - 1)) * W;
        for (long w = 0; w < W; w++) {
            const vec lane = load(q + w * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < TILE; i++) sum[i] = fma(lane, set1(row[i][w]), sum[i]);
        }
        for (int i = 0; i < tile; i++) store(score + (key + i) * LANES, sum[i] * set1(scale));
    }
}

// values[lane][v] += sum over keys of p[key][lane] * keys[key][v]
template <int HEADS>
void add_values(const float* p, const float* keys, long n, long W, long V, float* values) {
    constexpr int COLUMNS = 4;
    long v = 0;
    for (; v + COLUMNS * LANES <= V; v += COLUMNS * LANES) {
        vec sum[HEADS][COLUMNS];
        for (int h = 0; h < HEADS; h++)
            for (int c = 0; c < COLUMNS; c++) sum[h][c] = load(values + h * V + v + c * LANES);
        for (long key = 0; key < n; key++) {
            vec column[COLUMNS];
            for (int c = 0; c < COLUMNS; c++) column[c] = load(keys + key * W + v + c * LANES);
            for (int h = 0; h < HEADS; h++) {
                const vec weight = set1(p[key * LANES + h]);
                for (int c = 0; c < COLUMNS; c++) sum[h][c] = fma(weight, column[c], sum[h][c]);
            }
        }
        for (int h = 0; h < HEADS; h++)
            for (int c = 0; c < COLUMNS; c++) store(values + h * V + v + c * LANES, sum[h][c]);
    }
    for (; v < V; v++)
        for (long key = 0; key < n; key++)
            for (int h = 0; h < HEADS; h++) values[h * V + v] += p[key * LANES + h] * keys[key * W + v];
}

// Keys [first, last) of a sequence's context for one query and LANES heads, into a fresh Partial.
void attend_chunk(const LatentCache& cache, const int64_t* pages, const float* q, long first, long last,
                         long heads, float scale, float* scratch, Partial& out) {
    const long W = cache.width, V = cache.value_width;
    float* keys = scratch;                 // [KEYS][W]
    float* score = scratch + KEYS * W;     // [KEYS][LANES]
    vec maximum = set1(-1e30f), sum = zero();
    std::fill(out.values.begin(), out.values.end(), 0.0f);
    for (long start = first; start < last; start += KEYS) {
        const long n = std::min(KEYS, last - start);
        for (long i = 0; i < n; i++) {
            const long row = pages[(start + i) / cache.page_size] * cache.page_size + (start + i) % cache.page_size;
            copy_row(cache, row, keys + i * W);
        }
        score_keys(q, keys, n, W, scale, score);
        vec top = maximum;
        for (long i = 0; i < n; i++) top = max(top, load(score + i * LANES));
        const vec shrink = exp(max(maximum - top, set1(-200.0f)));  // 0 at first
        sum = sum * shrink;
        for (long i = 0; i < n; i++) {
            const vec p = exp(load(score + i * LANES) - top);
            store(score + i * LANES, p);
            sum = sum + p;
        }
        maximum = top;
        float factor[LANES];
        store(factor, shrink);
        if (start > first)
            for (long h = 0; h < heads; h++)
                for (long v = 0; v < V; v++) out.values[h * V + v] *= factor[h];
        long h = 0;
        for (; h + 4 <= heads; h += 4) add_values<4>(score + h, keys, n, W, V, out.values.data() + h * V);
        for (; h < heads; h++) add_values<1>(score + h, keys, n, W, V, out.values.data() + h * V);
    }
    store(out.maximum, maximum);
    store(out.sum, sum);
}

// Chunk `next` follows what `state` holds: softmax over both.
void merge(Partial& state, const Partial& next, long heads, long V) {
    for (long h = 0; h < heads; h++) {
        const float top = std::max(state.maximum[h], next.maximum[h]);
        const float keep = std::exp(state.maximum[h] - top), take = std::exp(next.maximum[h] - top);
        state.sum[h] = state.sum[h] * keep + next.sum[h] * take;
        state.maximum[h] = top;
        float* values = state.values.data() + h * V;
        for (long v = 0; v < V; v++) values[v] = values[v] * keep + next.values[h * V + v] * take;
    }
}

// A group of LANES heads of one query, [H, W] at q, transposed to [W][LANES] with zeros past the last head.
void transpose_heads(const float* q, long first, long heads, long W, float* out) {
    for (long w = 0; w < W; w++)
        for (long h = 0; h < LANES; h++) out[w * LANES + h] = h < heads ? q[(first + h) * W + w] : 0.0f;
}
}  // namespace

// out[N][H][V] = softmax(q[N][H][W] . rows * scale) rows[:, :V], each query over its own past.
void attend(const LatentCache& cache, const Batch& batch, const float* q, long H, float scale, float* out) {
    const long W = cache.width, V = cache.value_width, groups = (H + LANES - 1) / LANES;
    std::vector<long> sequence(batch.tokens);
    for (long s = 0; s < batch.sequences; s++)
        std::fill(sequence.begin() + batch.row_offsets[s], sequence.begin() + batch.row_offsets[s + 1], s);
    std::vector<long> first_task(batch.tokens * groups + 1, 0);  // a task is one chunk of one (query, head group)
    for (long i = 0; i < batch.tokens * groups; i++)
        first_task[i + 1] = first_task[i] + batch.positions[i / groups] / CHUNK + 1;
    std::vector<Partial> partial(first_task.back());
    std::vector<long> owner(first_task.back());
    for (long i = 0; i < batch.tokens * groups; i++) std::fill(owner.begin() + first_task[i], owner.begin() + first_task[i + 1], i);
    parallel_for(int64_t(partial.size()), [&](int64_t task) {
        thread_local std::vector<float> scratch;
        scratch.resize(KEYS * (W + LANES) + W * LANES);
        float* transposed = scratch.data() + KEYS * (W + LANES);
        const long i = owner[task], n = i / groups, head = i % groups * LANES, heads = std::min<long>(LANES, H - head);
        const long begin = (task - first_task[i]) * CHUNK, end = std::min(begin + CHUNK, batch.positions[n] + 1);
        transpose_heads(q + n * H * W, head, heads, W, transposed);
        partial[task].values.resize(heads * V);
        attend_chunk(cache, batch.pages + sequence[n] * batch.pages_per_sequence, transposed, begin, end, heads, scale,
                     scratch.data(), partial[task]);
    });
    parallel_for(batch.tokens * groups, [&](int64_t i) {
        const long n = i / groups, head = i % groups * LANES, heads = std::min<long>(LANES, H - head);
        Partial& state = partial[first_task[i]];
        for (long task = first_task[i] + 1; task < first_task[i + 1]; task++) merge(state, partial[task], heads, V);
        for (long h = 0; h < heads; h++)
            for (long v = 0; v < V; v++) out[(n * H + head + h) * V + v] = state.values[h * V + v] / state.sum[h];
    });
}

KERNEL latent_attention(int64_t kind, const void* cache, int64_t width, int64_t value_width, int64_t page_size,
                        const int64_t* positions, const int64_t* row_offsets, const int64_t* pages, int64_t tokens,
                        int64_t sequences, int64_t pages_per_sequence, const float* q, int64_t heads, float scale,
                        float* out) {
    attend({kind, cache, width, value_width, page_size},
           {positions, row_offsets, pages, tokens, sequences, pages_per_sequence}, q, heads, scale, out);
}
