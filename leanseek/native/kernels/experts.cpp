// The routed experts in training, forward and backward: out[n] = Σ_k w[n][k] · down_e(silu(gate_e x_n) · up_e x_n),
// e = the token's k-th choice. In FP32 a task is an expert: its rows go from the gather to the last product in blocks that
// stay in the cache, and only what the backward needs is written. In BF16 each product is a grouped one (bf16_gemm.h).
//
// `grouped` holds the (token, choice) pairs sorted by expert, those of expert e at [first[e], first[e + 1]), and `place`
// is its inverse. The gate value w multiplies the activation, I wide, instead of the output, D wide: down is linear.
#include "bf16_gemm.h"

namespace {

constexpr int64_t ROWS = 8 * TILE_ROWS;  // of a block

struct Pairs {
    const int64_t *grouped, *place, *first;  // [N K], [N K], [E + 1]
    int64_t tokens, top_k, experts, D, I;

    int64_t token(int64_t at) const { return grouped[at] / top_k; }
};

// out[token] = the sum of the rows of its K pairs, in the order of its choices.
template <class T>
void combine(const Pairs& p, const float* rows, T* out) {
    parallel_ranges(p.tokens, 64, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; n++)
            lanes_of(p.D, [&](int64_t d, int lanes) {
                vec sum = zero();
                for (int64_t k = 0; k < p.top_k; k++) sum = sum + load(rows + p.place[n * p.top_k + k] * p.D + d, lanes);
                store(out + n * p.D + d, sum, lanes);
            });
    });
}

// The rows of x that n pairs from `begin` on belong to, [n, D].
template <class T>
void gather(const Pairs& p, const T* x, int64_t begin, int64_t n, float* out) {
    for (int64_t r = 0; r < n; r++) {
        const T* row = x + p.token(begin + r) * p.D;
        lanes_of(p.D, [&](int64_t d, int lanes) { store(out + r * p.D + d, load(row + d, lanes), lanes); });
    }
}

// ---- forward ----

// hidden [n, 2I] of a block becomes act [n, I] = silu(gate) · up · w, and is stored for the backward.
template <class T>
void activate(const Pairs& p, const float* weights, int64_t begin, int64_t n, const float* hidden, T* kept, float* act) {
    for (int64_t r = 0; r < n; r++) {
        const vec w = set1(weights[p.grouped[begin + r]]);
        const float *gate = hidden + r * 2 * p.I, *up = gate + p.I;
        T* keep = kept + (begin + r) * 2 * p.I;
        lanes_of(p.I, [&](int64_t i, int lanes) {
            const vec g = load(gate + i, lanes), u = load(up + i, lanes);
            store(keep + i, g, lanes);
            store(keep + p.I + i, u, lanes);
            store(act + r * p.I + i, g * sigmoid(g) * u * w, lanes);
        });
    }
}

template <class T, class W>
void forward_task(const Pairs& p, int64_t e, int64_t begin, int64_t end, const T* x, const float* weights, const W* gate_up,
                  const W* down, T* hidden, float* result) {
    const int64_t D = p.D, I = p.I;
    float* up_panels = scratch(0, panels_size(D, 2 * I));
    float* down_panels = scratch(1, panels_size(I, D));
    pack_transposed(gate_up + e * 2 * I * D, D, D, 2 * I, up_panels);
    pack_transposed(down + e * D * I, I, I, D, down_panels);
    float *rows = scratch(2, ROWS * D), *block = scratch(3, ROWS * 2 * I), *act = scratch(4, ROWS * I);
    for (int64_t at = begin; at < end; at += ROWS) {
        const int64_t n = std::min(ROWS, end - at);
        gather(p, x, at, n, rows);
        multiply_packed(n, 2 * I, D, rows, D, 1, up_panels, block, 2 * I, false);
        activate(p, weights, at, n, block, hidden, act);
        multiply_packed(n, D, I, act, I, 1, down_panels, result + at * D, D, false);
    }
}

// ---- backward ----

// From d(act · w) [n, I] and the kept pre-activations: act · w in panels, d(hidden) [n, 2I] and each pair's d(w).
template <class T>
void activate_backward(const Pairs& p, const float* weights, int64_t begin, int64_t n, const T* kept, const float* dact,
                       float* act_panels, float* dhidden, float* dweights) {
    for (int64_t r = 0; r < n; r++, dact += p.I) {
        const vec w = set1(weights[p.grouped[begin + r]]);
        const T *gate = kept + (begin + r) * 2 * p.I, *up = gate + p.I;
        float *dgate = dhidden + r * 2 * p.I, *dup = dgate + p.I;
        vec dw = zero();
        lanes_of(p.I, [&](int64_t i, int lanes) {
            const vec g = load(gate + i, lanes), u = load(up + i, lanes), d = load(dact + i, lanes);
            const vec s = sigmoid(g), silu = g * s, act = silu * u, da = d * w;
            dw = fma(d, act, dw);
            store(act_panels + in_panel(n, r, i), act * w);
            store(dgate + i, da * u * fma(silu, set1(1.0f) - s, s), lanes);  // silu' = s + silu (1 - s)
            store(dup + i, da * silu, lanes);
        });
        dweights[p.grouped[begin + r]] = reduce_add(dw);
    }
}

template <class W>
struct WeightGradients {
    W *gate_up, *down;  // [E, 2I, D], [E, D, I]
};

// Sums of weight gradients are FP32: kept in place where the gradient is, else in scratch memory until they are done.
inline float* sums(float* gradient, int, int64_t) { return gradient; }
inline float* sums(bf16*, int slot, int64_t n) { return scratch(slot, n); }
inline void finish(const float*, float*, int64_t) {}
inline void finish(const float* sum, bf16* gradient, int64_t n) {
    lanes_of(n, [&](int64_t i, int lanes) { store(gradient + i, load(sum + i, lanes), lanes); });
}

template <class T, class W>
void backward_task(const Pairs& p, int64_t e, const T* x, const float* weights, const W* gate_up, const W* down,
                   const T* hidden, const T* grad, float* result, float* dweights, const WeightGradients<W>& to) {
    const int64_t D = p.D, I = p.I;
    float* up_panels = scratch(0, panels_size(2 * I, D));
    float* down_panels = scratch(1, panels_size(D, I));
    pack(gate_up + e * 2 * I * D, D, 2 * I, D, up_panels);
    pack(down + e * D * I, I, D, I, down_panels);
    W *dgate_up = to.gate_up + e * 2 * I * D, *ddown = to.down + e * D * I;
    float *dgate_up_sum = sums(dgate_up, 2, 2 * I * D), *ddown_sum = sums(ddown, 3, D * I);
    const int64_t begin = p.first[e], end = p.first[e + 1];
    if (begin == end) {  // nobody chose it
        std::fill_n(dgate_up_sum, 2 * I * D, 0.0f);
        std::fill_n(ddown_sum, D * I, 0.0f);
    }
    float *grads = scratch(4, ROWS * D), *rows = scratch(5, panels_size(ROWS, D)), *act = scratch(6, panels_size(ROWS, I));
    float *dact = scratch(7, ROWS * 3 * I), *dhidden = dact + ROWS * I;
    for (int64_t at = begin; at < end; at += ROWS) {
        const int64_t n = std::min(ROWS, end - at);
        gather(p, grad, at, n, grads);
        multiply_packed(n, I, D, grads, D, 1, down_panels, dact, I, false);
        activate_backward(p, weights, at, n, hidden, dact, act, dhidden, dweights);
        multiply_packed(n, D, 2 * I, dhidden, 2 * I, 1, up_panels, result + at * D, D, false);
        multiply_packed(D, I, n, grads, 1, D, act, ddown_sum, I, at > begin);  // grads' · act
        for (int64_t r = 0; r < n; r++) pack_row(x + p.token(at + r) * D, n, r, D, rows);
        multiply_packed(2 * I, D, n, dhidden, 1, 2 * I, rows, dgate_up_sum, D, at > begin);  // dhidden' · x
    }
    finish(dgate_up_sum, dgate_up, 2 * I * D);
    finish(ddown_sum, ddown, D * I);
}

#if defined(__AVX512BF16__)
// ---- BF16: what a product reads is rounded to BF16, as the reference's is ----

struct Narrow {
    const Pairs& p;
    const float* weights;
    int64_t rows = p.tokens * p.top_k, width = steps(p.I) * STEP;  // of the activation
    Groups groups{p.first, p.experts};

    Left gather(const bf16* x, int slot) const {
        return copy_rows([&](int64_t r) { return x + p.token(r) * p.D; }, rows, p.D, scratch<Cell>(slot, left_size(rows, p.D)));
    }
    template <class Body>
    void each_row(const Body& body) const {
        parallel_ranges(rows, 64, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; r++) body(r);
        });
    }

    template <class W>
    void forward(const bf16* x, const W* gate_up, const W* down, bf16* hidden, float* result) const {
        grouped_product(groups, gather(x, 2), p.D, gate_up, false, 2 * p.I, hidden);
        bf16* act = scratch<Cell>(3, rows * width);
        each_row([&](int64_t r) {
            const vec w = set1(weights[p.grouped[r]]);
            const bf16 *gate = hidden + r * 2 * p.I, *up = gate + p.I;
            bf16* to = act + r * width;
            if (width > p.I) put(to + p.I, 0.0f);
            lanes_of(p.I, [&](int64_t i, int lanes) {
                const vec g = load(gate + i, lanes);
                store(to + i, g * sigmoid(g) * load(up + i, lanes) * w, lanes);
            });
        });
        grouped_product(groups, Left{act, width}, p.I, down, false, p.D, result);
    }

    template <class W>
    void backward(const bf16* x, const W* gate_up, const W* down, const bf16* hidden, const bf16* grad, float* result,
                  float* dweights, const WeightGradients<W>& to) const {
        const Left grads = gather(grad, 2);
        bf16 *act = scratch<Cell>(3, rows * p.I), *dact = scratch<Cell>(4, rows * p.I);
        bf16* dhidden = scratch<Cell>(5, rows * 2 * p.I);
        grouped_product(groups, grads, p.D, down, true, p.I, dact);
        each_row([&](int64_t r) {
            const vec w = set1(weights[p.grouped[r]]);
            const bf16 *gate = hidden + r * 2 * p.I, *up = gate + p.I;
            vec dw = zero();
            lanes_of(p.I, [&](int64_t i, int lanes) {
                const vec g = load(gate + i, lanes), u = load(up + i, lanes), d = load(dact + r * p.I + i, lanes);
                const vec s = sigmoid(g), silu = g * s, a = silu * u, da = d * w;
                dw = fma(d, a, dw);
                store(act + r * p.I + i, a * w, lanes);
                store(dhidden + r * 2 * p.I + i, da * u * fma(silu, set1(1.0f) - s, s), lanes);
                store(dhidden + (2 * r + 1) * p.I + i, da * silu, lanes);
            });
            dweights[p.grouped[r]] = reduce_add(dw);
        });
        grouped_product(groups, Left{dhidden, 2 * p.I}, 2 * p.I, gate_up, true, p.D, result);
        Cell* turned = scratch<Cell>(1, turned_size(groups, std::max(p.D, 2 * p.I)));
        grouped_gradient(
            groups, [&](int64_t r) { return grads.data + r * grads.stride; }, p.D, [&](int64_t r) { return act + r * p.I; }, p.I,
            turned, to.down);
        grouped_gradient(
            groups, [&](int64_t r) { return dhidden + r * 2 * p.I; }, 2 * p.I, [&](int64_t r) { return x + p.token(r) * p.D; },
            p.D, turned, to.gate_up);
    }
};
#endif

}  // namespace

// x, out [N, D] and hidden [N K, 2I] of `dtype`; gate_up [E, 2I, D] and down [E, D, I] of `weight_dtype`; weights [N, K].
// shape: N, K, E, D, I. result [N K, D] is working memory.
KERNEL experts_forward(int64_t dtype, int64_t weight_dtype, const int64_t* shape, const int64_t* grouped,
                       const int64_t* place, const int64_t* first, const void* x, const float* weights, const void* gate_up,
                       const void* down, void* hidden, float* result, void* out) {
    const Pairs p{grouped, place, first, shape[0], shape[1], shape[2], shape[3], shape[4]};
    with_types(dtype, weight_dtype, [&](auto* type, auto* weight_type) {
        using T = ELEMENT(type);
        using W = ELEMENT(weight_type);
#if defined(__AVX512BF16__)
        if constexpr (std::is_same_v<T, bf16>) {
            Narrow{p, weights}.forward((const T*)x, (const W*)gate_up, (const W*)down, (T*)hidden, result);
            return combine(p, result, (T*)out);
        }
#endif
        const int64_t parts = (p.tokens + TASK_ROWS - 1) / TASK_ROWS;  // no expert has more rows than there are tokens
        parallel_for(p.experts * parts, [&](int64_t i) {
            const int64_t e = i / parts, begin = first[e] + i % parts * TASK_ROWS;
            const int64_t end = std::min(first[e + 1], begin + TASK_ROWS);
            if (begin < end)
                forward_task(p, e, begin, end, (const T*)x, weights, (const W*)gate_up, (const W*)down, (T*)hidden, result);
        });
        combine(p, result, (T*)out);
    });
}

// Gradients of x, weights, gate_up and down, from grad [N, D] and the hidden that the forward left.
KERNEL experts_backward(int64_t dtype, int64_t weight_dtype, const int64_t* shape, const int64_t* grouped,
                        const int64_t* place, const int64_t* first, const void* x, const float* weights, const void* gate_up,
                        const void* down, const void* hidden, const void* grad, float* result, void* dx, float* dweights,
                        void* dgate_up, void* ddown) {
    const Pairs p{grouped, place, first, shape[0], shape[1], shape[2], shape[3], shape[4]};
    with_types(dtype, weight_dtype, [&](auto* type, auto* weight_type) {
        using T = ELEMENT(type);
        using W = ELEMENT(weight_type);
        const WeightGradients<W> to{(W*)dgate_up, (W*)ddown};
#if defined(__AVX512BF16__)
        if constexpr (std::is_same_v<T, bf16>) {
            Narrow{p, weights}.backward((const T*)x, (const W*)gate_up, (const W*)down, (const T*)hidden, (const T*)grad, result,
                                        dweights, to);
            return combine(p, result, (T*)dx);
        }
#endif
        parallel_for(p.experts, [&](int64_t e) {
            backward_task(p, e, (const T*)x, weights, (const W*)gate_up, (const W*)down, (const T*)hidden, (const T*)grad,
                          result, dweights, to);
        });
        combine(p, result, (T*)dx);
    });
}
