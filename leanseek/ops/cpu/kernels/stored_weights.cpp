// Linear layers and routed experts over weights as they are stored, one op at a time.
#include "feed_forward.h"

namespace {

// x [M][K] of either type.
PreparedRows prepared(Arena& arena, const Matrix& w, int64_t x_type, const void* x, long M) {
    PreparedRows rows(arena, M, w, x_type == BF16);
    with_type(x_type, [&](auto* type) {
        const auto* from = static_cast<const ELEMENT(type)*>(x);
        parallel_for(M, [&](int64_t m) { rows.set(m, from + m * w.columns, 0, w.columns); });
    });
    return rows;
}

// A token's experts add in the order of its choices.
void combine(const Routing& route, const long* place, const float* parts, long D, float* out) {
    parallel_for(route.tokens, [&](int64_t n) {
        lanes_of(D, [&](int64_t d, int lanes) {
            vec sum = zero();
            for (long k = 0; k < route.top_k; k++) sum = sum + load(parts + place[n * route.top_k + k] * D + d, lanes);
            store(out + n * D + d, sum, lanes);
        });
    });
}

// ---- whole weights ----

// FP8 blocks to FP32 or BF16, for products large enough to go to a GEMM library.
template <class T>
void dequantize_to(const Matrix& w, T* out) {
    const uint8_t* data = static_cast<const uint8_t*>(w.data);
    const long K = w.columns, blocks = (K + BLOCK - 1) / BLOCK;
    parallel_for(w.rows, [&](int64_t n) {
        for (long b = 0; b < blocks; b++) {
            const float factor = w.scale[n / BLOCK * blocks + b] * 256.0f;
            const long stop = std::min(K, (b + 1) * BLOCK);
            long k = b * BLOCK;
            for (; k + 2 * LANES <= stop; k += 2 * LANES) {
                vec low, high;
                decode(data + n * K + k, low, high);
                store(out + n * K + k, low * set1(factor));
                store(out + n * K + k + LANES, high * set1(factor));
            }
            for (; k < stop; k++) store(out + n * K + k, set1(decode(data[n * K + k]) * factor), 1);
        }
    });
}
}  // namespace

KERNEL stored_linear(int64_t kind, const void* weight, const float* scale, int64_t N, int64_t K, int64_t x_type,
                     const void* x, int64_t M, float* y) {
    Arena& arena = Arena::start();
    const Matrix w{kind, weight, scale, N, K};
    linear(w, prepared(arena, w, x_type, x, M).rows(), M, y);
}

KERNEL stored_experts(int64_t kind, const void* gate_up, const float* gate_up_scale, const void* down,
                      const float* down_scale, int64_t E, int64_t I, int64_t D, int64_t x_type, const void* x,
                      const int64_t* indices, const float* weights, int64_t tokens, int64_t top_k, float* out) {
    Arena& arena = Arena::start();
    const RoutedExperts experts{{kind, gate_up, gate_up_scale, 2 * I, D}, {kind, down, down_scale, D, I}, E};
    const Routing route{indices, weights, tokens, top_k};
    const PreparedRows rows = prepared(arena, experts.gate_up, x_type, x, tokens);
    long* place;
    const std::vector<Group> groups{experts.group(arena, rows, x_type == BF16, route, place)};
    feed_forward(groups);
    combine(route, place, groups[0].out, D, out);
}

KERNEL dequantize(int64_t dtype, const void* weight, const float* scale, int64_t N, int64_t K, void* out) {
    with_type(dtype, [&](auto* type) { dequantize_to({FP8, weight, scale, N, K}, static_cast<ELEMENT(type)*>(out)); });
}
