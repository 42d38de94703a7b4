// Causal attention over expanded keys and values, forward and backward, in blocks that fit in the CPU cache. The scores of
// a whole sequence are never stored (Dao, arXiv 2307.08691).
//
// A key consists of the head's own part and a rotary part that all heads share (2.1.1, eq. 4); a query is [nope + rope]
// wide. Rotary parts are rotated while they are copied into a block, so rotated queries and assembled keys are never
// stored. With rope = 0 this is plain attention. Query head h reads key head h / (heads / kv_heads).
#include <cmath>

#include "gemm.h"

namespace {

constexpr int64_t BLOCK = 64;    // queries, and keys, per block of scores
constexpr int64_t CHUNK = 1024;  // queries per forward task
constexpr float LOG2E = 1.44269504f;
constexpr float MASKED = -1e30f;

struct Strides {
    int64_t batch, row, head;
};

struct Problem {  // attention.py passes these numbers in this order
    int64_t batch, length, heads, kv_heads, nope, rope, value, interleave;
    int64_t angle_stride;  // batch stride of cos and sin [batch or 1, length, rope / 2]
    Strides q, k, shared, v, dk, dv;

    int64_t width() const { return nope + rope; }
    int64_t ldk() const { return whole_vectors(width()); }  // row stride of queries and keys in scratch memory
    int64_t ldv() const { return whole_vectors(value); }
};

template <class T>
struct Inputs {
    const T *q, *k, *shared, *v;
    const float *cos, *sin;
};

// ---- rows: from tensors to FP32 scratch and back ----

template <class T>
void copy_row(const T* in, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(out + i, load(in + i));
    if (i < n) store(out + i, load(in + i, int(n - i)), int(n - i));
}

template <class T>
void write_row(const float* in, int64_t n, float factor, T* out) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(out + i, load(in + i) * set1(factor));
    if (i < n) store(out + i, load(in + i, int(n - i)) * set1(factor), int(n - i));
}

// Pairs (a, b) of `in` become (a cos - b sin, b cos + a sin), all first halves before all second halves.
template <class T>
void rotate_row(const T* __restrict in, const float* __restrict cos, const float* __restrict sin, int64_t rope,
                bool interleave, float* __restrict out) {
    const int64_t half = rope / 2, step = interleave ? 2 : 1, other = interleave ? 1 : half;
    for (int64_t i = 0; i < half; i++) {
        const float a = to_float(in[i * step]), b = to_float(in[i * step + other]);
        out[i] = a * cos[i] - b * sin[i];
        out[half + i] = b * cos[i] + a * sin[i];
    }
}

// The derivative of rotate_row: the inverse rotation, for the token at t.
template <class T>
void unrotate(const Problem& p, const Inputs<T>& in, int64_t b, int64_t t, const float* __restrict x, float factor,
              T* __restrict out) {
    const int64_t half = p.rope / 2, step = p.interleave ? 2 : 1, other = p.interleave ? 1 : half;
    const float *cos = in.cos + b * p.angle_stride + t * half, *sin = in.sin + b * p.angle_stride + t * half;
    for (int64_t i = 0; i < half; i++) {
        const float u = x[i] * factor, v = x[half + i] * factor;
        put(out + i * step, u * cos[i] + v * sin[i]);
        put(out + i * step + other, v * cos[i] - u * sin[i]);
    }
}

// A query or key: `own` values and then the rotary part, padded with zeros to ldk.
template <class T>
void load_row(const Problem& p, const Inputs<T>& in, const T* own, const T* rotary, int64_t b, int64_t t, float* out) {
    copy_row(own, p.nope, out);
    const int64_t angles = b * p.angle_stride + t * (p.rope / 2);
    if (p.rope) rotate_row(rotary, in.cos + angles, in.sin + angles, p.rope, p.interleave, out + p.nope);
    for (int64_t i = p.width(); i < p.ldk(); i++) out[i] = 0;
}

template <class T>
void load_queries(const Problem& p, const Inputs<T>& in, int64_t b, int64_t h, int64_t begin, int64_t rows, float* out) {
    for (int64_t r = 0; r < rows; r++) {
        const T* q = in.q + b * p.q.batch + (begin + r) * p.q.row + h * p.q.head;
        load_row(p, in, q, q + p.nope, b, begin + r, out + r * p.ldk());
    }
}

// Keys [BLOCK, ldk] and values [BLOCK, ldv] from `begin` on; rows past the sequence's end are zero.
template <class T>
void load_keys(const Problem& p, const Inputs<T>& in, int64_t b, int64_t kv, int64_t begin, float* keys, float* values) {
    const int64_t rows = std::min(BLOCK, p.length - begin), ldk = p.ldk(), ldv = p.ldv();
    for (int64_t r = 0; r < rows; r++) {
        const int64_t t = begin + r;
        load_row(p, in, in.k + b * p.k.batch + t * p.k.row + kv * p.k.head,
                 in.shared + b * p.shared.batch + t * p.shared.row, b, t, keys + r * ldk);
        copy_row(in.v + b * p.v.batch + t * p.v.row + kv * p.v.head, p.value, values + r * ldv);
        for (int64_t i = p.value; i < ldv; i++) values[r * ldv + i] = 0;
    }
    std::fill(keys + rows * ldk, keys + BLOCK * ldk, 0.0f);
    std::fill(values + rows * ldv, values + BLOCK * ldv, 0.0f);
}

// out [width, BLOCK] = factor · in [BLOCK, width] transposed; width whole vectors.
void transpose_block(const float* in, int64_t width, float factor, float* out) {
    for (int64_t r = 0; r < BLOCK; r += LANES)
        for (int64_t c = 0; c < width; c += LANES) {
            vec rows[LANES];
            for (int i = 0; i < LANES; i++) rows[i] = load(in + (r + i) * width + c) * set1(factor);
            transpose(rows);
            for (int i = 0; i < LANES; i++) store(out + (c + i) * BLOCK + r, rows[i]);
        }
}

// ---- forward ----

// What a block of queries has accumulated over the keys so far.
struct Sums {
    float top[BLOCK];          // the largest score of each row
    vec mass[BLOCK];           // Σ 2^(score - top), one partial sum per lane
    float* values;             // Σ 2^(score - top) · value, [BLOCK, ldv]
};

// Replaces scores [rows, width] (stride BLOCK) of queries from `row` on by 2^(score - top), and scales down what was summed
// under a lower top. With `diagonal`, row r sees the first r + 1 lanes of the last vector.
void online_softmax(float* scores, int64_t row, int64_t rows, int64_t width, bool diagonal, int64_t ldv, Sums& sums) {
    for (int64_t r = 0; r < rows; r++, scores += BLOCK) {
        if (diagonal) {
            float* last = scores + width - LANES;
            store(last, keep_first(load(last), int(r + 1), set1(MASKED)));
        }
        vec top = load(scores);
        for (int64_t c = LANES; c < width; c += LANES) top = max(top, load(scores + c));
        const float old = sums.top[row + r], now = std::max(old, reduce_max(top));
        vec mass = sums.mass[row + r];
        if (now > old) {
            const vec down = exp2(set1(old - now));
            mass = mass * down;
            float* values = sums.values + (row + r) * ldv;
            for (int64_t i = 0; i < ldv; i += LANES) store(values + i, load(values + i) * down);
            sums.top[row + r] = now;
        }
        for (int64_t c = 0; c < width; c += LANES) {
            const vec weight = exp2(load(scores + c) - set1(now));
            store(scores + c, weight);
            mass = mass + weight;
        }
        sums.mass[row + r] = mass;
    }
}

template <class T>
void forward_task(const Problem& p, const Inputs<T>& in, int64_t b, int64_t h, int64_t begin, float scale, T* out,
                  float* lse) {
    const int64_t end = std::min(p.length, begin + CHUNK), ldk = p.ldk(), ldv = p.ldv();
    const int64_t blocks = (end + BLOCK - 1) / BLOCK;
    float* keys = scratch(0, blocks * ldk * BLOCK);  // transposed, one block after another
    float* values = scratch(1, blocks * BLOCK * ldv);
    float* block = scratch(2, BLOCK * ldk);
    for (int64_t j = 0; j < blocks; j++) {
        load_keys(p, in, b, h / (p.heads / p.kv_heads), j * BLOCK, block, values + j * BLOCK * ldv);
        transpose_block(block, ldk, scale * LOG2E, keys + j * ldk * BLOCK);
    }
    float* scores = scratch(3, BLOCK * BLOCK);
    Sums sums;
    sums.values = scratch(4, BLOCK * ldv);
    for (int64_t first = begin; first < end; first += BLOCK) {
        const int64_t rows = std::min(BLOCK, end - first), diagonal = first / BLOCK;
        load_queries(p, in, b, h, first, rows, block);
        std::fill(sums.top, sums.top + BLOCK, MASKED);
        std::fill(sums.mass, sums.mass + BLOCK, zero());
        std::fill(sums.values, sums.values + BLOCK * ldv, 0.0f);
        const auto strip = [&](int64_t j, int64_t row, int64_t count, int64_t width) {
            multiply(count, width, p.width(), block + row * ldk, ldk, 1, keys + j * ldk * BLOCK, BLOCK, scores, BLOCK, false);
            online_softmax(scores, row, count, width, j == diagonal, ldv, sums);
            multiply(count, ldv, width, scores, BLOCK, 1, values + j * BLOCK * ldv, ldv, sums.values + row * ldv, ldv, true);
        };
        for (int64_t j = 0; j < diagonal; j++) strip(j, 0, rows, BLOCK);
        for (int64_t r = 0; r < rows; r += LANES) strip(diagonal, r, std::min<int64_t>(LANES, rows - r), r + LANES);
        for (int64_t r = 0; r < rows; r++) {
            const float mass = reduce_add(sums.mass[r]);
            write_row(sums.values + r * ldv, p.value, 1 / mass, out + ((b * p.length + first + r) * p.heads + h) * p.value);
            lse[(b * p.heads + h) * p.length + first + r] = sums.top[r] + std::log2(mass);
        }
    }
}

// ---- backward ----

// One head's queries, and what their gradients need. All are [rows rounded up to whole blocks, ld] but `lse` and `dot`.
struct QueryBlocks {
    float *q, *grad, *dq;  // dq accumulates Σ_keys dS · key
    float *lse, *dot;      // log2 of each row's sum; grad · out, the derivative's mean
};

template <class T>
void load_gradients(const Problem& p, const Inputs<T>& in, int64_t b, int64_t h, const T* out, const float* lse,
                    const T* grad, const QueryBlocks& to) {
    const int64_t ldv = p.ldv();
    load_queries(p, in, b, h, 0, p.length, to.q);
    std::fill(to.dq, to.dq + p.length * p.ldk(), 0.0f);
    std::copy_n(lse + (b * p.heads + h) * p.length, p.length, to.lse);
    for (int64_t t = 0; t < p.length; t++) {
        const int64_t row = ((b * p.length + t) * p.heads + h) * p.value;
        vec dot = zero();
        for (int64_t i = 0; i < p.value; i += LANES) {
            const int lanes = int(std::min<int64_t>(LANES, p.value - i));
            const vec g = load(grad + row + i, lanes);
            dot = fma(g, load(out + row + i, lanes), dot);
            store(to.grad + t * ldv + i, g);  // zeros up to ldv
        }
        to.dot[t] = reduce_add(dot);
    }
}

// From a strip's scores and dP = grad · valueᵀ, computes P = 2^(score - lse) and dS = P (dP - dot), each in place.
void score_gradients(float* scores, float* dscores, int64_t rows, int64_t width, bool diagonal, const float* lse,
                     const float* dot) {
    for (int64_t r = 0; r < rows; r++, scores += BLOCK, dscores += BLOCK) {
        if (diagonal) {
            float* last = scores + width - LANES;
            store(last, keep_first(load(last), int(r + 1), set1(MASKED)));
        }
        const vec l = set1(lse[r]), d = set1(dot[r]);
        for (int64_t c = 0; c < width; c += LANES) {
            const vec weight = exp2(load(scores + c) - l);
            store(scores + c, weight);
            store(dscores + c, weight * (load(dscores + c) - d));
        }
    }
}

// A block of keys and values in every layout that the products read, and memory for a block of scores.
struct KeyBlock {
    float *keys, *values;          // [BLOCK, ldk], [BLOCK, ldv]
    float *keys_t, *values_t;      // [ldk, BLOCK] times scale · log2 e, [ldv, BLOCK]
    float *scores, *dscores;       // [BLOCK, BLOCK]
};

// Adds what this block of keys and these `rows` queries contribute to dq, dk [BLOCK, ldk] and dv [BLOCK, ldv]. On the
// diagonal only the strips below it are computed, and nothing else is read.
void backward_pair(const Problem& p, const KeyBlock& b, const QueryBlocks& q, int64_t rows, bool diagonal, float* dk,
                   float* dv) {
    const int64_t ldk = p.ldk(), ldv = p.ldv();
    const auto strip = [&](int64_t r, int64_t count, int64_t width) {
        float *s = b.scores + r * BLOCK, *ds = b.dscores + r * BLOCK;
        multiply(count, width, p.width(), q.q + r * ldk, ldk, 1, b.keys_t, BLOCK, s, BLOCK, false);
        multiply(count, width, p.value, q.grad + r * ldv, ldv, 1, b.values_t, BLOCK, ds, BLOCK, false);
        score_gradients(s, ds, count, width, diagonal, q.lse + r, q.dot + r);
        multiply(count, ldk, width, ds, BLOCK, 1, b.keys, ldk, q.dq + r * ldk, ldk, true);
    };
    const auto keys = [&](int64_t c, int64_t count) {  // queries from c on see key c
        const int64_t from = diagonal ? c : 0;
        multiply(count, ldv, rows - from, b.scores + from * BLOCK + c, 1, BLOCK, q.grad + from * ldv, ldv, dv + c * ldv, ldv, true);
        multiply(count, ldk, rows - from, b.dscores + from * BLOCK + c, 1, BLOCK, q.q + from * ldk, ldk, dk + c * ldk, ldk, true);
    };
    if (!diagonal) {
        strip(0, rows, BLOCK);
        keys(0, BLOCK);
        return;
    }
    for (int64_t r = 0; r < rows; r += LANES) strip(r, std::min<int64_t>(LANES, rows - r), r + LANES);
    for (int64_t c = 0; c < rows; c += LANES) keys(c, std::min<int64_t>(LANES, rows - c));
}

template <class T>
struct Gradients {
    T *dq, *dk, *dv;
    float* shared;  // [B, Hkv, T, rope]: the rotary part of dk, still rotated, before the sum over the heads
};

// One key head kv of sequence b: its dk and dv, and dq of the query heads that read it.
template <class T>
void backward_task(const Problem& p, const Inputs<T>& in, int64_t b, int64_t kv, float scale, const T* out, const float* lse,
                   const T* grad, const Gradients<T>& to) {
    const int64_t group = p.heads / p.kv_heads, ldk = p.ldk(), ldv = p.ldv();
    const int64_t blocks = (p.length + BLOCK - 1) / BLOCK, rows = blocks * BLOCK;
    float* dk = scratch(0, rows * (ldk + ldv));
    float* dv = dk + rows * ldk;
    std::fill(dk, dk + rows * (ldk + ldv), 0.0f);
    float* queries = scratch(1, rows * (2 * ldk + ldv + 2));
    const QueryBlocks all{queries, queries + rows * 2 * ldk, queries + rows * ldk, queries + rows * (2 * ldk + ldv),
                          queries + rows * (2 * ldk + ldv + 1)};
    float* block = scratch(2, 2 * BLOCK * (ldk + ldv) + 2 * BLOCK * BLOCK);
    KeyBlock key{block, block + BLOCK * ldk, block + BLOCK * (ldk + ldv), block + BLOCK * (2 * ldk + ldv),
                 block + 2 * BLOCK * (ldk + ldv), block + 2 * BLOCK * (ldk + ldv) + BLOCK * BLOCK};
    for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
        load_gradients(p, in, b, h, out, lse, grad, all);
        for (int64_t j = 0; j < blocks; j++) {
            load_keys(p, in, b, kv, j * BLOCK, key.keys, key.values);
            transpose_block(key.keys, ldk, scale * LOG2E, key.keys_t);
            transpose_block(key.values, ldv, 1.0f, key.values_t);
            for (int64_t i = j; i < blocks; i++) {
                const int64_t r = i * BLOCK;
                const QueryBlocks q{all.q + r * ldk, all.grad + r * ldv, all.dq + r * ldk, all.lse + r, all.dot + r};
                backward_pair(p, key, q, std::min(BLOCK, p.length - r), i == j, dk + j * BLOCK * ldk, dv + j * BLOCK * ldv);
            }
        }
        for (int64_t t = 0; t < p.length; t++) {
            T* dq = to.dq + ((b * p.length + t) * p.heads + h) * p.width();
            write_row(all.dq + t * ldk, p.nope, scale, dq);
            if (p.rope) unrotate(p, in, b, t, all.dq + t * ldk + p.nope, scale, dq + p.nope);
        }
    }
    for (int64_t t = 0; t < p.length; t++) {
        write_row(dk + t * ldk, p.nope, scale, to.dk + b * p.dk.batch + t * p.dk.row + kv * p.dk.head);
        write_row(dv + t * ldv, p.value, 1.0f, to.dv + b * p.dv.batch + t * p.dv.row + kv * p.dv.head);
        if (p.rope) write_row(dk + t * ldk + p.nope, p.rope, scale, to.shared + ((b * p.kv_heads + kv) * p.length + t) * p.rope);
    }
}

}  // namespace

// q [B, T, H, nope + rope], k [B, T, Hkv, nope], shared [B, T, rope], v [B, T, Hkv, value]; out [B, T, H, value]
// contiguous; lse [B, H, T] = log2 Σ 2^(score · log2 e), for the backward.
KERNEL attention_forward(int64_t dtype, const int64_t* problem, const void* q, const void* k, const void* shared,
                         const void* v, const float* cos, const float* sin, float scale, void* out, float* lse) {
    with_type(dtype, [&](auto* type) {
        using T = ELEMENT(type);
        const Problem p = *reinterpret_cast<const Problem*>(problem);
        const Inputs<T> in{(const T*)q, (const T*)k, (const T*)shared, (const T*)v, cos, sin};
        const int64_t chunks = (p.length + CHUNK - 1) / CHUNK, heads = p.batch * p.heads;
        parallel_for(chunks * heads, [&](int64_t i) {  // the longest first
            const int64_t head = i % heads, chunk = chunks - 1 - i / heads;
            forward_task(p, in, head / p.heads, head % p.heads, chunk * CHUNK, scale, (T*)out, lse);
        });
    });
}

// dq [B, T, H, nope + rope] contiguous; dk, dv by their strides; dshared [B, T, rope] contiguous. workspace [B, Hkv, T, rope].
KERNEL attention_backward(int64_t dtype, const int64_t* problem, const void* q, const void* k, const void* shared,
                          const void* v, const float* cos, const float* sin, float scale, const void* out, const float* lse,
                          const void* grad, void* dq, void* dk, void* dshared, void* dv, float* workspace) {
    with_type(dtype, [&](auto* type) {
        using T = ELEMENT(type);
        const Problem p = *reinterpret_cast<const Problem*>(problem);
        const Inputs<T> in{(const T*)q, (const T*)k, (const T*)shared, (const T*)v, cos, sin};
        const Gradients<T> to{(T*)dq, (T*)dk, (T*)dv, workspace};
        parallel_for(p.batch * p.kv_heads, [&](int64_t i) {
            backward_task(p, in, i / p.kv_heads, i % p.kv_heads, scale, (const T*)out, lse, (const T*)grad, to);
        });
        if (p.rope) parallel_ranges(p.batch * p.length, BLOCK, [&](int64_t begin, int64_t end) {
            float* sum = scratch(0, p.rope);
            for (int64_t i = begin; i < end; i++) {
                const int64_t b = i / p.length, t = i % p.length;
                std::fill(sum, sum + p.rope, 0.0f);
                for (int64_t h = 0; h < p.kv_heads; h++)
                    for (int64_t c = 0; c < p.rope; c++)
                        sum[c] += workspace[((b * p.kv_heads + h) * p.length + t) * p.rope + c];
                unrotate(p, in, b, t, sum, 1.0f, (T*)dshared + i * p.rope);
            }
        });
    });
}
