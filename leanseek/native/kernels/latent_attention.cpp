// Absorbed MLA attention over the paged cache of latents: every head attends to one shared row per token, whose first
// `value_width` columns are also its value.
//
// A context is split into chunks of CHUNK keys; each chunk has its own softmax, and chunks are merged in order. The
// arithmetic of one query is the same whether its chunks run on one thread or on many, alone or in a batch. There are two
// arithmetics, as in panel.h: exact, in FP32, with sixteen (AVX2: eight) heads in the lanes of a vector and a cached value
// broadcast to all of them; and narrow, which multiplies query, cache and softmax weights in BF16.
#include <algorithm>
#include <cmath>
#include <vector>

#include "latent_attention.h"
#include "panel.h"

namespace {

constexpr long CHUNK = 256;  // keys that share a softmax maximum before chunks are merged
constexpr long BLOCK_UNITS = 8, MANY_UNITS = 64;  // units that share a chunk of keys; units that count as many: see attend
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

// One query's state for LANES heads: running maximum and sum of weights, one head per lane, and weighted values
// [LANES][value_width].
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

// Attends to keys [first, last) of a sequence's context for one query and LANES heads, into a fresh Partial.
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

constexpr long NARROW_KEYS = 128;  // keys scored at a time
constexpr int SCORE_UNITS = 4;     // units whose scores stay in registers and share each load of a key
constexpr int SCORE_TILE[SCORE_UNITS + 1] = {0, 8, 8, 6, 6};  // keys whose scores do, by the number of units

// score[unit][key][lane] = q[unit][lane] . key for `TILE` keys; q [pairs of columns][LANES][2]. A pair of a key's columns is
// multiplied with all heads at once. The next keys are prefetched: rows are too short for the CPU to detect the streams.
template <int UNITS, int TILE>
void score_narrow(const bf16* const* keys, const bf16* const* next, const bf16* const* q, long pairs, float* score) {
    vec sum[UNITS][TILE];
#pragma GCC unroll 4
    for (int u = 0; u < UNITS; u++)
#pragma GCC unroll 8
        for (int i = 0; i < TILE; i++) sum[u][i] = zero();
    for (long p = 0; p < pairs; p++) {
        if (p % 16 == 0)
#pragma GCC unroll 8
            for (int i = 0; i < TILE; i++) __builtin_prefetch(next[i] + 2 * p);
        pairs_of_bf16 query[UNITS];
#pragma GCC unroll 4
        for (int u = 0; u < UNITS; u++) query[u] = pairs_of_bf16(_mm512_loadu_si512(q[u] + p * 2 * LANES));
#pragma GCC unroll 8
        for (int i = 0; i < TILE; i++) {
            const pairs_of_bf16 key = broadcast_pair(keys[i] + 2 * p);
#pragma GCC unroll 4
            for (int u = 0; u < UNITS; u++) sum[u][i] = _mm512_dpbf16_ps(sum[u][i], query[u], key);
        }
    }
#pragma GCC unroll 4
    for (int u = 0; u < UNITS; u++)
#pragma GCC unroll 8
        for (int i = 0; i < TILE; i++) store(score + (u * NARROW_KEYS + i) * LANES, sum[u][i]);
}

// Turns scores into softmax weights in BF16, as pairs of keys [pairs][LANES][2]; an odd last key is paired with a zero.
// Updates maximum and sum, and returns the factor that scales earlier values down.
vec soften(float* score, long n, float scale, vec& maximum, vec& sum, bf16* weights) {
    vec top = maximum;
    for (long i = 0; i < n; i++) top = max(top, load(score + i * LANES) * set1(scale));
    const vec shrink = exp(max(maximum - top, set1(-80.0f)));
    vec mass = zero();
    for (long i = 0; i < n; i += 2) {
        const vec even = exp(max(load(score + i * LANES) * set1(scale) - top, set1(-80.0f)));
        const vec odd = i + 1 < n ? exp(max(load(score + (i + 1) * LANES) * set1(scale) - top, set1(-80.0f))) : zero();
        mass = mass + even + odd;
        const __m512i low = _mm512_cvtepu16_epi32(narrow(even)), high = _mm512_cvtepu16_epi32(narrow(odd));
        _mm512_storeu_si512(weights + i * LANES, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    sum = fma(sum, shrink, mass);
    maximum = top;
    return shrink;
}

constexpr int VALUE_VECS = 4;
constexpr long VALUE_COLUMNS = VALUE_VECS * LANES;

// Copies VALUE_COLUMNS columns of `n` keys with two keys' values side by side: [pairs of keys][VALUE_COLUMNS][2].
void pair_keys(const bf16* const* keys, long n, long v, bf16* out) {
    alignas(64) uint16_t order[2][32];
    for (int i = 0; i < 32; i++) {
        order[0][i] = uint16_t(i / 2 + (i % 2 ? 32 : 0));
        order[1][i] = uint16_t(16 + i / 2 + (i % 2 ? 32 : 0));
    }
    const __m512i first = _mm512_load_si512(order[0]), second = _mm512_load_si512(order[1]);
    for (long key = 0; key < n; key += 2)
        for (long c = 0; c < VALUE_COLUMNS; c += 32) {
            const __m512i a = _mm512_loadu_si512(keys[key] + v + c);
            const __m512i b = key + 1 < n ? _mm512_loadu_si512(keys[key + 1] + v + c) : _mm512_setzero_si512();
            bf16* to = out + key * VALUE_COLUMNS + 2 * c;
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, first, b));
            _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(a, second, b));
        }
}

// values[h][VALUE_COLUMNS] = values[h] * shrink[h] + sum over pairs of keys of weights * values, for HEADS heads.
template <int HEADS>
void add_pairs(const bf16* weights, const bf16* paired, long pairs, long V, const float* shrink, float* values) {
    vec sum[HEADS][VALUE_VECS];
#pragma GCC unroll 8
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
        for (int c = 0; c < VALUE_VECS; c++) sum[h][c] = load(values + h * V + c * LANES) * set1(shrink[h]);
    for (long p = 0; p < pairs; p++) {
        pairs_of_bf16 column[VALUE_VECS];
#pragma GCC unroll 4
        for (int c = 0; c < VALUE_VECS; c++)
            column[c] = pairs_of_bf16(_mm512_loadu_si512(paired + (p * VALUE_COLUMNS + c * LANES) * 2));
#pragma GCC unroll 8
        for (int h = 0; h < HEADS; h++) {
            const pairs_of_bf16 weight = broadcast_pair(weights + (p * LANES + h) * 2);
#pragma GCC unroll 4
            for (int c = 0; c < VALUE_VECS; c++) sum[h][c] = _mm512_dpbf16_ps(sum[h][c], weight, column[c]);
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
        for (int c = 0; c < VALUE_VECS; c++) store(values + h * V + c * LANES, sum[h][c]);
}

struct Query {
    const bf16* q;  // [pairs of columns][LANES][2]
    long last, heads;
    Partial* to;
};

// Like attend_chunk, for up to BLOCK_UNITS queries of one sequence, each over keys [first, its last): all share one read of
// each key, straight from the cache. The longest context ends at `end`.
void attend_narrow(const LatentCache& cache, const int64_t* pages, const Query* query, long count, long first, long end, float scale) {
    const long V = cache.value_width;
    float* score = scratch(4, NARROW_KEYS * ((SCORE_UNITS + BLOCK_UNITS) * LANES + VALUE_COLUMNS));  // [SCORE_UNITS][NARROW_KEYS][LANES]
    bf16* weights = reinterpret_cast<bf16*>(score + SCORE_UNITS * NARROW_KEYS * LANES);  // [BLOCK_UNITS][NARROW_KEYS / 2][LANES][2]
    bf16* paired = weights + BLOCK_UNITS * NARROW_KEYS * LANES;                          // [NARROW_KEYS / 2][VALUE_COLUMNS][2]
    vec maximum[BLOCK_UNITS], sum[BLOCK_UNITS];
    long last = 0;
    for (long u = 0; u < count; u++) {
        maximum[u] = set1(-1e30f), sum[u] = zero();
        std::fill_n(query[u].to->values, query[u].heads * V, 0.0f);
        last = std::max(last, query[u].last);
    }
    for (long start = first; start < last; start += NARROW_KEYS) {
        const long most = std::min(NARROW_KEYS, last - start);
        const bf16* keys[NARROW_KEYS + SCORE_TILE[1]];  // and those that are prefetched
        for (long i = 0; i < most + SCORE_TILE[1]; i++) {
            const long key = std::min(start + i, end - 1);
            const long row = pages[key / cache.page_size] * cache.page_size + key % cache.page_size;
            keys[i] = static_cast<const bf16*>(cache.data) + row * cache.width;
        }
        const auto keys_of = [&](long u) { return std::clamp(query[u].last - start, 0l, most); };
        float shrink[BLOCK_UNITS][LANES];
        row_tiles<SCORE_UNITS>(count, [&](auto units, long u) {
            const bf16* q[units.value];
            for (int k = 0; k < units.value; k++) q[k] = query[u + k].q;
            row_tiles<SCORE_TILE[units.value]>(most, [&](auto tile, long i) {
                score_narrow<units.value, tile.value>(keys + i, keys + i + tile.value, q, cache.width / 2, score + i * LANES);
            });
            for (long k = 0; k < units.value; k++)
                if (const long n = keys_of(u + k))
                    store(shrink[u + k], soften(score + k * NARROW_KEYS * LANES, n, scale, maximum[u + k], sum[u + k],
                                                weights + (u + k) * NARROW_KEYS * LANES));
        });
        for (long v = 0; v < V; v += VALUE_COLUMNS) {
            pair_keys(keys, most, v, paired);
            for (long u = 0; u < count; u++)  // a key after a query's last one has the weight 0
                row_tiles<6>(query[u].heads, [&](auto tile, long h) {
                    if (const long n = keys_of(u))
                        add_pairs<tile.value>(weights + u * NARROW_KEYS * LANES + 2 * h, paired, (n + 1) / 2, V, shrink[u] + h,
                                              query[u].to->values + h * V + v);
                });
        }
    }
    for (long u = 0; u < count; u++) {
        store(query[u].to->maximum, maximum[u]);
        store(query[u].to->sum, sum[u]);
    }
}

inline bool narrow_fits(const LatentCache& cache) {
    return cache.kind == BF16 && cache.value_width % VALUE_COLUMNS == 0 && cache.width % 2 == 0;
}

// Copies heads [first, first + heads) of one query, [H][W] at q, to [W / 2][LANES][2], with zeros past the last head.
void pair_heads(const float* q, long first, long heads, long W, bf16* out) {
    for (long w = 0; w < W; w += 2 * LANES) {
        const int low = int(std::min<long>(LANES, W - w)), high = int(std::min<long>(LANES, W - w - low));
        vec rows[LANES];  // a head's columns from w on, in pairs
        for (long h = 0; h < LANES; h++) {
            const float* from = q + (first + h) * W + w;
            rows[h] = h < heads ? vec(narrow_two(load(from, low), high ? load(from + LANES, high) : zero())) : zero();
        }
        transpose(rows);
        for (long p = 0; p < (low + high) / 2; p++) _mm512_storeu_ps(out + (w / 2 + p) * 2 * LANES, rows[p]);
    }
}
#endif

// Merges chunk `next` into `state`, which holds the chunks before it.
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

// Transposes LANES heads of one query, [H, W] at q, to [W][LANES], with zeros past the last head.
void transpose_heads(const float* q, long first, long heads, long W, float* out) {
    for (long w = 0; w < W; w++)
        for (long h = 0; h < LANES; h++) out[w * LANES + h] = h < heads ? q[(first + h) * W + w] : 0.0f;
}
}  // namespace

// A unit is LANES heads of one query. Units of one sequence process a chunk of keys together, so that it is read once. With
// few units every chunk is a task, so that one long context can use all threads; with many, a task takes a block of units
// through the whole context.
void attend(Arena& arena, const LatentCache& cache, const Batch& batch, long first_row, long last_row,
            [[maybe_unused]] bool narrow, const float* q, long H, float scale, float* out) {
    const long W = cache.width, V = cache.value_width, groups = (H + LANES - 1) / LANES, units = (last_row - first_row) * groups;
    struct Unit {
        long n, head, heads, context, chunks;
        const int64_t* pages;
    };
    std::vector<Unit> unit;
    Partial* state = arena.take<Partial>(units);  // first holds chunk 0, then everything; its values are in `out`
    long parts = 0;
    for (long s = 0; s < batch.sequences; s++)
        for (long row = std::max(first_row, batch.row_offsets[s]); row < std::min(last_row, batch.row_offsets[s + 1]); row++)
            for (long head = 0; head < H; head += LANES) {
                const long n = row - first_row, context = batch.positions[row] + 1, chunks = (context + CHUNK - 1) / CHUNK;
                state[unit.size()].values = out + (n * H + head) * V;
                unit.push_back({n, head, std::min<long>(LANES, H - head), context, chunks, batch.pages + s * batch.pages_per_sequence});
                parts += chunks;
            }
#if defined(__AVX512BF16__)
    bf16* paired = nullptr;  // the queries in attend_narrow's layout
    if (narrow && narrow_fits(cache)) {
        paired = arena.take<bf16>(units * W * LANES);
        parallel_rows(units, 4 * W * LANES, [&](int64_t i) {
            pair_heads(q + unit[i].n * H * W, unit[i].head, unit[i].heads, W, paired + i * W * LANES);
        });
    }
#endif
    // Attends to one chunk for those of units [first, last), all of one sequence, that have it; to(i) is unit i's result.
    const auto attend_to = [&](long first, long last, long chunk, const auto& to) {
        const long begin = chunk * CHUNK;
#if defined(__AVX512BF16__)
        if (paired) {
            Query query[BLOCK_UNITS];
            long count = 0, end = 0;
            for (long i = first; i < last; i++) {
                if (chunk >= unit[i].chunks) continue;
                query[count++] = {paired + i * W * LANES, std::min(begin + CHUNK, unit[i].context), unit[i].heads, &to(i)};
                end = std::max(end, unit[i].context);
            }
            return attend_narrow(cache, unit[first].pages, query, count, begin, end, scale);
        }
#endif
        float* space = scratch(4, KEYS * (W + LANES) + W * LANES);
        float* transposed = space + KEYS * (W + LANES);
        for (long i = first; i < last; i++) {
            if (chunk >= unit[i].chunks) continue;
            transpose_heads(q + unit[i].n * H * W, unit[i].head, unit[i].heads, W, transposed);
            attend_chunk(cache, unit[i].pages, transposed, begin, std::min(begin + CHUNK, unit[i].context), unit[i].heads, scale, space, to(i));
        }
    };
    const auto finish = [&](long i) {
        for (long h = 0; h < unit[i].heads; h++) {
            const vec inverse = set1(1.0f / state[i].sum[h]);
            float* values = state[i].values + h * V;
            lanes_of(V, [&](int64_t v, int lanes) { store(values + v, load(values + v, lanes) * inverse, lanes); });
        }
    };
    const bool many = units >= MANY_UNITS;
    const long most = many ? BLOCK_UNITS : std::clamp<long>(parts / (4 * omp_get_max_threads()), 1, BLOCK_UNITS);
    struct Block {
        long first, last, chunks;
    };
    std::vector<Block> blocks;  // each holds units of one sequence
    for (long i = 0; i < units; i++) {
        if (blocks.empty() || unit[i].pages != unit[blocks.back().first].pages || i - blocks.back().first == most) blocks.push_back({i, i, 0});
        blocks.back().last = i + 1;
        blocks.back().chunks = std::max(blocks.back().chunks, unit[i].chunks);
    }
    if (many) {
        parallel_for(int64_t(blocks.size()), [&](int64_t b) {
            const auto& [first, last, chunks] = blocks[b];
            Partial next[BLOCK_UNITS];
            float* values = scratch(7, BLOCK_UNITS * LANES * V);
            for (long k = 0; k < BLOCK_UNITS; k++) next[k].values = values + k * LANES * V;
            for (long chunk = 0; chunk < chunks; chunk++) {
                attend_to(first, last, chunk, [&](long i) -> Partial& { return chunk ? next[i - first] : state[i]; });
                for (long i = first; chunk && i < last; i++)
                    if (chunk < unit[i].chunks) merge(state[i], next[i - first], unit[i].heads, V);
            }
            for (long i = first; i < last; i++) finish(i);
        });
        return;
    }
    std::vector<Partial*> part;  // one per unit and chunk
    std::vector<long> offset;
    for (long i = 0; i < units; i++) {
        offset.push_back(long(part.size()));
        for (long chunk = 0; chunk < unit[i].chunks; chunk++) {
            part.push_back(chunk ? arena.take<Partial>(1) : state + i);
            if (chunk) part.back()->values = arena.take<float>(unit[i].heads * V);
        }
    }
    std::vector<std::pair<long, long>> tasks;  // block, chunk
    for (long b = 0; b < long(blocks.size()); b++)
        for (long chunk = 0; chunk < blocks[b].chunks; chunk++) tasks.push_back({b, chunk});
    parallel_for(int64_t(tasks.size()), [&](int64_t t) {
        const auto [b, chunk] = tasks[t];
        attend_to(blocks[b].first, blocks[b].last, chunk, [&, chunk = chunk](long i) -> Partial& { return *part[offset[i] + chunk]; });
    });
    parallel_rows(units, LANES * V, [&](int64_t i) {
        for (long chunk = 1; chunk < unit[i].chunks; chunk++) merge(state[i], *part[offset[i] + chunk], unit[i].heads, V);
        finish(i);
    });
}

KERNEL latent_attention(int64_t kind, const void* cache, int64_t width, int64_t value_width, int64_t page_size,
                        const int64_t* positions, const int64_t* row_offsets, const int64_t* pages, int64_t tokens,
                        int64_t sequences, int64_t pages_per_sequence, int64_t narrow, const float* q, int64_t heads, float scale,
                        float* out) {
    attend(Arena::start(), {kind, cache, width, value_width, page_size},
           {positions, row_offsets, pages, tokens, sequences, pages_per_sequence}, 0, tokens, narrow, q, heads, scale, out);
}
