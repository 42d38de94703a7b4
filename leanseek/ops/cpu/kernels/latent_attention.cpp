// Absorbed MLA attention over the paged cache of latents: every head attends to one shared row per token, whose first
// `value_width` columns are also its value.
//
// A context is cut into chunks of CHUNK keys; each chunk has its own softmax, and chunks are merged in order. The
// arithmetic of one query is the same whether its chunks run on one thread or on many, alone or in a batch. Two
// arithmetics, as in product.h: exact in FP32, where sixteen (AVX2: eight) heads lie across the lanes of a vector and a
// cached value is broadcast to all of them; and narrow, where query, cache and softmax weights are multiplied in BF16.
#include <algorithm>
#include <cmath>
#include <vector>

#include "latent_attention.h"
#include "product.h"

namespace {

constexpr long CHUNK = 256;  // keys that share a softmax maximum before chunks are merged
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
    float* values;
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
    std::fill_n(out.values, heads * V, 0.0f);
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
        for (; h + 4 <= heads; h += 4) add_values<4>(score + h, keys, n, W, V, out.values + h * V);
        for (; h < heads; h++) add_values<1>(score + h, keys, n, W, V, out.values + h * V);
    }
    store(out.maximum, maximum);
    store(out.sum, sum);
}

#if defined(__AVX512BF16__)

// Two keys' columns by turns, so that one dot product takes both: pairs [n / 2][V][2] of rows [n][W].
void pair_keys(const bf16* keys, long n, long W, long V, bf16* out) {
    alignas(64) int16_t low[32], high[32];
    for (int i = 0; i < 32; i++) low[i] = int16_t(i / 2 + (i % 2) * 32), high[i] = int16_t(i / 2 + 16 + (i % 2) * 32);
    const __m512i first = _mm512_load_si512(low), second = _mm512_load_si512(high);
    for (long key = 0; key < n; key += 2)
        for (long v = 0; v < V; v += 32) {
            const __m512i a = _mm512_loadu_si512(keys + key * W + v), b = _mm512_loadu_si512(keys + (key + 1) * W + v);
            _mm512_storeu_si512(out + (key / 2 * V + v) * 2, _mm512_permutex2var_epi16(a, first, b));
            _mm512_storeu_si512(out + (key / 2 * V + v) * 2 + 32, _mm512_permutex2var_epi16(a, second, b));
        }
}

// values[h][v] = values[h][v] * shrink[h] + sum over key pairs of p[h] * pairs, for HEADS heads and V columns.
template <int HEADS>
void add_pairs(const bf16* p, const bf16* pairs_of_keys, long n, long V, const float* shrink, float* values) {
    constexpr int VECS = 4;
    for (long v = 0; v < V; v += VECS * LANES) {
        vec sum[HEADS][VECS];
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
            for (int c = 0; c < VECS; c++) sum[h][c] = load(values + h * V + v + c * LANES) * set1(shrink[h]);
        for (long pair = 0; pair < n / 2; pair++) {
            pairs column[VECS];
#pragma GCC unroll 4
            for (int c = 0; c < VECS; c++) column[c] = pairs(_mm512_loadu_si512(pairs_of_keys + (pair * V + v + c * LANES) * 2));
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) {
                int32_t two;
                std::memcpy(&two, p + h * KEYS + pair * 2, 4);
                const pairs weight = pairs(_mm512_set1_epi32(two));
#pragma GCC unroll 4
                for (int c = 0; c < VECS; c++) sum[h][c] = _mm512_dpbf16_ps(sum[h][c], weight, column[c]);
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
            for (int c = 0; c < VECS; c++) store(values + h * V + v + c * LANES, sum[h][c]);
    }
}

// One head's scores of KEYS keys become softmax weights in BF16; its maximum and sum go on, and what held is shrunk by
// the returned factor.
float soften(float* score, long n, float scale, float& maximum, float& sum, bf16* weights) {
    vec top = set1(maximum);
    for (long i = 0; i < KEYS; i += LANES) {
        const vec s = load(score + i) * set1(scale);
        const vec seen = keep_first(s, int(std::clamp<long>(n - i, 0, LANES)), set1(-1e30f));
        store(score + i, seen);
        top = max(top, seen);
    }
    const float best = reduce_max(top);
    vec mass = zero();
    for (long i = 0; i < KEYS; i += LANES) {
        const vec p = keep_first(exp(max(load(score + i) - set1(best), set1(-80.0f))), int(std::clamp<long>(n - i, 0, LANES)), zero());
        store(weights + i, p);
        mass = mass + p;
    }
    const float shrink = std::exp(std::max(maximum - best, -200.0f));
    sum = sum * shrink + reduce_add(mass);
    maximum = best;
    return shrink;
}

// As attend_chunk, with q in BF16 [heads][width].
void attend_narrow(const LatentCache& cache, const int64_t* pages, const bf16* q, long width, long first, long last,
                   long heads, float scale, float* space, Partial& out) {
    const long W = cache.width, V = cache.value_width;
    bf16* keys = reinterpret_cast<bf16*>(space);       // [KEYS][width]
    bf16* paired = keys + KEYS * width;                // [KEYS / 2][V][2]
    bf16* weights = paired + KEYS * V;                 // [LANES][KEYS]
    float* score = reinterpret_cast<float*>(weights + LANES * KEYS);  // [LANES][KEYS]
    float shrink[LANES];
    std::fill_n(out.maximum, LANES, -1e30f);
    std::fill_n(out.sum, LANES, 0.0f);
    std::fill_n(out.values, heads * V, 0.0f);
    for (long start = first; start < last; start += KEYS) {
        const long n = std::min(KEYS, last - start), even = (n + 1) / 2 * 2;
        for (long i = 0; i < n; i++) {
            const long row = pages[(start + i) / cache.page_size] * cache.page_size + (start + i) % cache.page_size;
            std::copy_n(static_cast<const bf16*>(cache.data) + row * W, W, keys + i * width);
            std::fill(keys + i * width + W, keys + (i + 1) * width, bf16{0});
        }
        if (even > n) std::fill_n(keys + n * width, width, bf16{0});
        narrow_strips<false>(WideSource{keys, width}, n, width, q, width, heads, nullptr, score, KEYS);
        for (long h = 0; h < heads; h++)
            shrink[h] = soften(score + h * KEYS, n, scale, out.maximum[h], out.sum[h], weights + h * KEYS);
        pair_keys(keys, even, width, V, paired);
        long h = 0;
        for (; h + 4 <= heads; h += 4) add_pairs<4>(weights + h * KEYS, paired, even, V, shrink + h, out.values + h * V);
        for (; h < heads; h++) add_pairs<1>(weights + h * KEYS, paired, even, V, shrink + h, out.values + h * V);
    }
}

inline bool pairs_fit(const LatentCache& cache) { return cache.kind == BF16 && cache.value_width % 64 == 0; }
#endif

// Chunk `next` follows what `state` holds: softmax over both.
void merge(Partial& state, const Partial& next, long heads, long V) {
    for (long h = 0; h < heads; h++) {
        const float top = std::max(state.maximum[h], next.maximum[h]);
        const float keep = std::exp(state.maximum[h] - top), take = std::exp(next.maximum[h] - top);
        state.sum[h] = state.sum[h] * keep + next.sum[h] * take;
        state.maximum[h] = top;
        float* values = state.values + h * V;
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
void attend(Arena& arena, const LatentCache& cache, const Batch& batch, [[maybe_unused]] bool narrow, const float* q, long H,
            float scale, float* out) {
    const long W = cache.width, V = cache.value_width, groups = (H + LANES - 1) / LANES, queries = batch.tokens * groups;
    std::vector<long> sequence(batch.tokens);
    for (long s = 0; s < batch.sequences; s++)
        std::fill(sequence.begin() + batch.row_offsets[s], sequence.begin() + batch.row_offsets[s + 1], s);
    std::vector<long> first_task(queries + 1, 0);  // a task is one chunk of one (query, head group)
    for (long i = 0; i < queries; i++) first_task[i + 1] = first_task[i] + batch.positions[i / groups] / CHUNK + 1;
    std::vector<long> owner(first_task.back());
    for (long i = 0; i < queries; i++) std::fill(owner.begin() + first_task[i], owner.begin() + first_task[i + 1], i);
    Partial* partial = arena.take<Partial>(first_task.back());
    for (long task = 0; task < first_task.back(); task++)
        partial[task].values = arena.take<float>(std::min<long>(LANES, H) * V);
    parallel_for(first_task.back(), [&](int64_t task) {
        const long i = owner[task], n = i / groups, head = i % groups * LANES, heads = std::min<long>(LANES, H - head);
        const long begin = (task - first_task[i]) * CHUNK, end = std::min(begin + CHUNK, batch.positions[n] + 1);
        const int64_t* pages = batch.pages + sequence[n] * batch.pages_per_sequence;
        [[maybe_unused]] const float* rows = q + (n * H + head) * W;
#if defined(__AVX512BF16__)
        if (narrow && pairs_fit(cache)) {
            const long width = padded(W);
            float* space = scratch(4, (KEYS * (width + V + LANES) + LANES * width) / 2 + LANES * KEYS);
            bf16* query = reinterpret_cast<bf16*>(space + LANES * KEYS + KEYS * (width + V + LANES) / 2);
            for (long h = 0; h < heads; h++) prepare_row(rows + h * W, W, BF16, true, query + h * width);
            return attend_narrow(cache, pages, query, width, begin, end, heads, scale, space, partial[task]);
        }
#endif
        float* space = scratch(4, KEYS * (W + LANES) + W * LANES);
        float* transposed = space + KEYS * (W + LANES);
        transpose_heads(q + n * H * W, head, heads, W, transposed);
        attend_chunk(cache, pages, transposed, begin, end, heads, scale, space, partial[task]);
    });
    parallel_for(queries, [&](int64_t i) {
        const long n = i / groups, head = i % groups * LANES, heads = std::min<long>(LANES, H - head);
        Partial& state = partial[first_task[i]];
        for (long task = first_task[i] + 1; task < first_task[i + 1]; task++) merge(state, partial[task], heads, V);
        for (long h = 0; h < heads; h++) {
            const vec inverse = set1(1.0f / state.sum[h]);
            lanes_of(V, [&](int64_t v, int lanes) {
                store(out + (n * H + head + h) * V + v, load(state.values + h * V + v, lanes) * inverse, lanes);
            });
        }
    });
}

KERNEL latent_attention(int64_t kind, const void* cache, int64_t width, int64_t value_width, int64_t page_size,
                        const int64_t* positions, const int64_t* row_offsets, const int64_t* pages, int64_t tokens,
                        int64_t sequences, int64_t pages_per_sequence, int64_t narrow, const float* q, int64_t heads, float scale,
                        float* out) {
    attend(Arena::start(), {kind, cache, width, value_width, page_size},
           {positions, row_offsets, pages, tokens, sequences, pages_per_sequence}, narrow, q, heads, scale, out);
}
