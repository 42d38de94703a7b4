// The network over a step's new tokens, planned once and run as one call: embedding, blocks, last norm. A block is absorbed
// MLA over the latent cache (2.1.1), then the experts the gate chose and the shared ones, or a dense layer (2.1.2). Between
// products everything is FP32; x is rounded to BF16 where it meets weights that are multiplied in BF16.
#include <cmath>

#include "feed_forward.h"
#include "latent_attention.h"

namespace {

struct Norm {
    int64_t type;
    const void* weight;
    double eps;
};

// leanseek/native/stack.py fills both in, field by field. A matrix without data is not there.
struct BlockPlan {
    Matrix q_a, q_b, kv_a, o;
    Matrix w_uk, w_uv;  // stacks of heads: [kv_lora_rank, nope], [v, kv_lora_rank]
    Matrix gate, gated, down;
    Matrix mlp_gated, mlp_down;  // the shared experts, or the dense layer
    Norm input_norm, q_norm, kv_norm, post_norm;
    const float* bias;
    int64_t heads, nope, rope, v, interleave;
    int64_t experts, top_k, groups, topk_group, group_best, softmax, norm_topk;
    double softmax_scale, routed_scaling_factor;
};

struct StackPlan {
    int64_t type;  // of embedding, hidden states and the result
    const void* embedding;
    const float* inv_freq;
    double rotary_scale;
    Matrix join;  // an MTP module's eh_proj, of [enorm(embedding); hnorm(hidden)]
    Norm enorm, hnorm, norm;
    const BlockPlan* blocks;
    int64_t count;
};

// out = x / rms(x) * weight
void rms_norm(const float* x, long n, const Norm& norm, float* out) {
    vec squares = zero();
    lanes_of(n, [&](int64_t i, int lanes) {
        const vec v = load(x + i, lanes);
        squares = fma(v, v, squares);
    });
    const vec factor = set1(1.0f / std::sqrt(reduce_add(squares) / float(n) + float(norm.eps)));
    with_type(norm.type, [&](auto* type) {
        const auto* weight = static_cast<const ELEMENT(type)*>(norm.weight);
        lanes_of(n, [&](int64_t i, int lanes) { store(out + i, load(x + i, lanes) * factor * load(weight + i, lanes), lanes); });
    });
}

// As ops.rotate: pairs (2i, 2i + 1) with `interleave`, else (i, i + n / 2); first halves, then second halves.
void rotate(const float* x, long n, const float* cos, const float* sin, bool interleave, float* out) {
    const long half = n / 2, step = interleave ? 2 : 1, other = interleave ? 1 : half;
    for (long i = 0; i < half; i++) {
        const float a = x[i * step], b = x[i * step + other];
        out[i] = a * cos[i] - b * sin[i];
        out[half + i] = b * cos[i] + a * sin[i];
    }
}

// ---- attention ----

// out[n][h][..] = W of head h times x[n][h][..], whose rows are ldx values apart, head h's at ldh * h.
void heads_linear(Arena& arena, const Matrix& w, long H, bool narrow, const float* x, long ldx, long ldh, long N, float* out,
                  long ldo) {
    PreparedRows rows(arena, H * N, w, narrow);  // a head's rows together
    parallel_rows(N * H, w.columns, [&](int64_t i) { rows.set(i % H * N + i / H, x + i / H * ldx + i % H * ldh, 0, w.columns); });
    std::vector<Product> products;
    for (long h = 0; h < H; h++) products.push_back({expert_of(w, h), rows.rows(h * N), N, out + h * ldo, H * ldo});
    multiply(products);
}

struct Step {  // a step's tokens and the cache they are written to
    Batch batch;
    const int64_t* slots;
    const float *cos, *sin;
    LatentCache cache;
};

constexpr long ABSORBED_VALUES = 1 << 20, LEAST_ROWS = 64;  // of a step's rows that are absorbed at a time

// h += attention of its norm, h [N][D].
void attention(Arena& arena, const BlockPlan& p, bool narrow, const Step& step, float* normed, float* h) {
    const long N = step.batch.tokens, D = p.kv_a.columns, H = p.heads, C = p.w_uv.columns, W = C + p.rope;
    const long head = p.nope + p.rope, half = p.rope / 2;
    const bool compressed = p.q_a.data != nullptr;
    parallel_rows(N, D, [&](int64_t n) { rms_norm(h + n * D, D, p.input_norm, normed + n * D); });
    float* query = arena.take<float>(N * H * head);
    float* latent = arena.take<float>(N * W);
    const Matrix& down = compressed ? p.q_a : p.q_b;
    const PreparedRows for_kv = prepared(arena, p.kv_a, narrow, normed, N);
    const PreparedRows for_q = form_of(down.kind, narrow) == form_of(p.kv_a.kind, narrow) ? for_kv : prepared(arena, down, narrow, normed, N);
    float* small = compressed ? arena.take<float>(N * p.q_a.rows) : query;
    multiply({{down, for_q.rows(), N, small, down.rows}, {p.kv_a, for_kv.rows(), N, latent, W}});
    if (compressed) {
        parallel_rows(N, p.q_a.rows, [&](int64_t n) { rms_norm(small + n * p.q_a.rows, p.q_a.rows, p.q_norm, small + n * p.q_a.rows); });
        linear(p.q_b, prepared(arena, p.q_b, narrow, small, N).rows(), N, query);
    }
    parallel_rows(N, 2 * W, [&](int64_t n) {
        const float *cos = step.cos + n * half, *sin = step.sin + n * half;
        float* row = scratch(0, W);
        rms_norm(latent + n * W, C, p.kv_norm, row);
        rotate(latent + n * W + C, p.rope, cos, sin, p.interleave, row + C);
        with_type(step.cache.kind, [&](auto* type) {
            auto* to = static_cast<ELEMENT(type)*>(const_cast<void*>(step.cache.data)) + step.slots[n] * W;
            lanes_of(W, [&](int64_t i, int lanes) { store(to + i, load(row + i, lanes), lanes); });
        });
    });
    float* heads = arena.take<float>(N * H * p.v);
    const long rows = std::max(LEAST_ROWS, ABSORBED_VALUES / (H * W));
    for (long first = 0; first < N; first += rows)
        arena.within([&] {  // queries and what they read are many times as wide as the rest: a part of the rows is in the cache
            const long last = std::min(first + rows, N), count = last - first;
            const float* part = query + first * H * head;
            float* q = arena.take<float>(count * H * W);
            parallel_rows(count, 4 * H * p.rope, [&](int64_t n) {
                const float *cos = step.cos + (first + n) * half, *sin = step.sin + (first + n) * half;
                for (long i = n * H; i < (n + 1) * H; i++)
                    rotate(part + i * head + p.nope, p.rope, cos, sin, p.interleave, q + i * W + C);
            });
            heads_linear(arena, p.w_uk, H, narrow, part, H * head, head, count, q, W);  // (W_UKᵀ q_C)
            float* read = arena.take<float>(count * H * C);
            attend(arena, step.cache, step.batch, first, last, narrow, q, H, float(p.softmax_scale), read);
            heads_linear(arena, p.w_uv, H, narrow, read, H * C, C, count, heads + first * H * p.v, p.v);
        });
    linear(p.o, prepared(arena, p.o, narrow, heads, N).rows(), N, normed);
    parallel_rows(N, D, [&](int64_t n) {
        lanes_of(D, [&](int64_t d, int lanes) { store(h + n * D + d, load(h + n * D + d, lanes) + load(normed + n * D + d, lanes), lanes); });
    });
}

// ---- gate ----

// The largest value's index, the first among equals; `taken` is put in its place.
long take_largest(float* values, long n) {
    const long best = std::max_element(values, values + n) - values;
    values[best] = -INFINITY;
    return best;
}

// Groups that are not among the topk_group best lose their experts (eq. 16 as node-limited in 2.1.2).
void mask_groups(const BlockPlan& p, float* choice) {
    const long size = p.experts / p.groups;
    std::vector<float> score(p.groups), copy(size);
    for (long g = 0; g < p.groups; g++) {
        std::copy_n(choice + g * size, size, copy.begin());
        for (long i = 0; i < p.group_best; i++) {
            const float best = *std::max_element(copy.begin(), copy.end());
            score[g] += best;
            take_largest(copy.data(), size);
        }
    }
    std::vector<bool> kept(p.groups, false);
    for (long i = 0; i < p.topk_group; i++) kept[take_largest(score.data(), p.groups)] = true;
    for (long g = 0; g < p.groups; g++)
        if (!kept[g]) std::fill_n(choice + g * size, size, -INFINITY);
}

// eq. 13 to 16 for one token: its experts and their weights from the gate's logits.
void choose(const BlockPlan& p, float* logits, int64_t* indices, float* weights) {
    if (p.softmax) {
        const float top = *std::max_element(logits, logits + p.experts);
        float sum = 0;
        for (long e = 0; e < p.experts; e++) sum += logits[e] = std::exp(logits[e] - top);
        for (long e = 0; e < p.experts; e++) logits[e] /= sum;
    } else {
        for (long e = 0; e < p.experts; e++) logits[e] = 1.0f / (1.0f + std::exp(-logits[e]));
    }
    std::vector<float> choice(logits, logits + p.experts);
    if (p.bias)
        for (long e = 0; e < p.experts; e++) choice[e] += p.bias[e];
    if (p.groups > 1) mask_groups(p, choice.data());
    float sum = 1e-20f;
    for (long k = 0; k < p.top_k; k++) {
        indices[k] = take_largest(choice.data(), p.experts);
        sum += weights[k] = logits[indices[k]];
    }
    for (long k = 0; k < p.top_k; k++) weights[k] *= (p.norm_topk ? 1.0f / sum : 1.0f) * float(p.routed_scaling_factor);
}

// ---- feed-forward ----

// h += the block's feed-forward of its norm; `normed` [N][D] is space. The experts chosen go to `indices` [N][top_k], unless null.
void feed_forward_of(Arena& arena, const BlockPlan& p, bool narrow, long N, float* normed, float* h, int64_t* indices) {
    const long D = p.kv_a.columns;
    parallel_rows(N, D, [&](int64_t n) { rms_norm(h + n * D, D, p.post_norm, normed + n * D); });
    std::vector<Group> groups;
    long* place = nullptr;
    const bool always = p.mlp_gated.data != nullptr;
    const PreparedRows rows = prepared(arena, p.gate.data ? p.gated : p.mlp_gated, narrow, normed, N);
    if (p.gate.data) {
        const RoutedExperts experts{p.gated, p.down, p.experts};
        float* logits = arena.take<float>(N * p.experts);
        linear(p.gate, prepared(arena, p.gate, false, normed, N).rows(), N, logits);  // in FP32
        if (!indices) indices = arena.take<int64_t>(N * p.top_k);
        auto* weights = arena.take<float>(N * p.top_k);
        parallel_rows(N, 16 * p.experts, [&](int64_t n) { choose(p, logits + n * p.experts, indices + n * p.top_k, weights + n * p.top_k); });
        groups.push_back(experts.group(arena, rows, narrow, {indices, weights, N, p.top_k}, place));
    }
    const bool apart = always && p.gate.data && form_of(p.mlp_gated.kind, narrow) != form_of(p.gated.kind, narrow);
    const PreparedRows for_mlp = apart ? prepared(arena, p.mlp_gated, narrow, normed, N) : rows;
    PreparedRows act(arena, N, always ? p.mlp_down : p.down, narrow);
    if (always) groups.push_back({{{p.mlp_gated, p.mlp_down, 0, N}}, &for_mlp, nullptr, &act, arena.take<float>(N * D)});
    feed_forward(groups);
    parallel_rows(N, (p.top_k + 1) * D, [&](int64_t n) {  // a token's experts add in the order of its choices
        lanes_of(D, [&](int64_t d, int lanes) {
            vec sum = zero();
            if (place)
                for (long k = 0; k < p.top_k; k++) sum = sum + load(groups[0].out + place[n * p.top_k + k] * D + d, lanes);
            if (always) sum = sum + load(groups.back().out + n * D + d, lanes);
            store(h + n * D + d, load(h + n * D + d, lanes) + sum, lanes);
        });
    });
}

// ---- before the first block ----

// cos and sin of each position's angles [N][half].
void angles(const StackPlan& p, const int64_t* positions, long N, long half, float* cos, float* sin) {
    parallel_rows(N, 16 * half, [&](int64_t n) {
        for (long i = 0; i < half; i++) {
            const float angle = float(positions[n]) * p.inv_freq[i];
            cos[n * half + i] = std::cos(angle) * float(p.rotary_scale);
            sin[n * half + i] = std::sin(angle) * float(p.rotary_scale);
        }
    });
}

// What the blocks begin with, h [N][D]: the tokens' embeddings, or those joined with the hidden states (eq. 21).
void begin(Arena& arena, const StackPlan& p, long N, long D, const int64_t* tokens, const void* hidden, float* h) {
    const bool joined = p.join.data != nullptr;
    const long width = joined ? 2 * D : D;
    float* rows = joined ? arena.take<float>(N * width) : h;
    with_type(p.type, [&](auto* type) {
        using T = ELEMENT(type);
        parallel_rows(N, width, [&](int64_t n) {
            const T* from = static_cast<const T*>(p.embedding) + tokens[n] * D;
            float *to = rows + n * width, *second = to + D;
            lanes_of(D, [&](int64_t d, int lanes) { store(to + d, load(from + d, lanes), lanes); });
            if (!joined) return;
            rms_norm(to, D, p.enorm, to);
            const T* state = static_cast<const T*>(hidden) + n * D;
            lanes_of(D, [&](int64_t d, int lanes) { store(second + d, load(state + d, lanes), lanes); });
            rms_norm(second, D, p.hnorm, second);
        });
    });
    if (joined) linear(p.join, prepared(arena, p.join, p.type == BF16, rows, N).rows(), N, h);
}
}  // namespace

// cache: the first block's; the next one's is `layer_stride` values on. states [blocks + 1][N][D], unless null: what each block
// begins with, and what the last one ends with; routes [blocks][N][top_k], unless null: the experts chosen, where a block has any.
KERNEL stack_step(const StackPlan* plan, const int64_t* tokens, const void* hidden, int64_t cache_type, void* cache,
                  int64_t layer_stride, int64_t page_size, const int64_t* positions, const int64_t* slots,
                  const int64_t* row_offsets, const int64_t* pages, int64_t N, int64_t sequences, int64_t pages_per_sequence,
                  void* out, float* states, int64_t* routes, int64_t top_k) {
    const StackPlan& p = *plan;
    const BlockPlan& some = *p.blocks;
    const long D = some.kv_a.columns, C = some.w_uv.columns, half = some.rope / 2;
    const bool narrow = p.type == BF16;
    Arena& lasting = Arena::start(1);
    float *h = lasting.take<float>(N * D), *normed = lasting.take<float>(N * D);
    float *cos = lasting.take<float>(N * half), *sin = lasting.take<float>(N * half);
    angles(p, positions, N, half, cos, sin);
    begin(Arena::start(), p, N, D, tokens, hidden, h);
    const auto keep = [&](long layer) {
        if (states) std::copy_n(h, N * D, states + layer * N * D);
    };
    for (long layer = 0; layer < p.count; layer++) {
        auto* own = static_cast<char*>(cache) + layer * layer_stride * value_bytes(cache_type);
        const Step step{{positions, row_offsets, pages, N, sequences, pages_per_sequence}, slots, cos, sin,
                        {cache_type, own, C + some.rope, C, page_size}};
        Arena& arena = Arena::start();
        keep(layer);
        attention(arena, p.blocks[layer], narrow, step, normed, h);
        feed_forward_of(arena, p.blocks[layer], narrow, N, normed, h, routes ? routes + layer * N * top_k : nullptr);
    }
    keep(p.count);
    with_type(p.type, [&](auto* type) {
        using T = ELEMENT(type);
        parallel_rows(N, D, [&](int64_t n) {
            rms_norm(h + n * D, D, p.norm, normed + n * D);
            lanes_of(D, [&](int64_t d, int lanes) { store(static_cast<T*>(out) + n * D + d, load(normed + n * D + d, lanes), lanes); });
        });
    });
}
