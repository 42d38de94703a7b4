// Packing weights into panels, and a linear layer over them.
#include "feed_forward.h"

namespace {

// One panel: value k of row n, for which rows[n] is the address of its first value (0: a row of zeros).
template <class T>
void pack_panel(const int64_t* rows, int64_t offset, int64_t k_stride, int64_t kind, int64_t K, T* out) {
    constexpr int64_t SOME = 32;  // pairs at a time: their part of the panel stays in L1
    const int64_t pairs = (K + 1) / 2;
    for (int64_t start = 0; start < pairs; start += SOME)
        for (int64_t n = 0; n < PANEL_ROWS; n++) {
            const T* from = rows[n] ? reinterpret_cast<const T*>(rows[n]) + offset : nullptr;
            T* to = out + 2 * place_of(kind, n);
            for (int64_t p = start; p < std::min(pairs, start + SOME); p++)
                for (int64_t i = 0; i < 2; i++)
                    to[p * 2 * PANEL_ROWS + i] = from && 2 * p + i < K ? from[(2 * p + i) * k_stride] : T(0);
        }
}

// x [M][K] of either type.
PreparedRows prepared(Arena& arena, const Matrix& w, int64_t x_type, const void* x, long M) {
    return with_type(x_type, [&](auto* type) { return prepared(arena, w, x_type == BF16, static_cast<const ELEMENT(type)*>(x), M); });
}
}  // namespace

// `count` matrices of K columns whose padded rows [panels * 64] start at the addresses `rows`; the next matrix is `next`
// values on, the next column k_stride. Where `group` is not 0, `out` is the weight itself, each `group` panels of which
// hold the rows that they are made of.
KERNEL pack_panels(int64_t kind, const int64_t* rows, int64_t panels, int64_t K, int64_t k_stride, int64_t count, int64_t next,
                   int64_t group, void* out) {
    const int64_t size = (K + 1) / 2 * 2 * PANEL_ROWS, some = group ? group : 1, groups = panels / some;
    const auto pack = [&](auto* type) {
        using T = ELEMENT(type);
        parallel_for(count * groups, [&](int64_t i) {
            T* to = static_cast<T*>(out) + i * some * size;
            int64_t offset = i / groups * next;
            if (group) {  // read from a copy
                T* copy = scratch<T>(0, some * size);
                std::copy_n(to, some * size, copy);
                offset += copy - to;
            }
            for (int64_t p = 0; p < some; p++)
                pack_panel(rows + (i % groups * some + p) * PANEL_ROWS, offset, k_stride, kind, K, to + p * size);
        });
    };
    if (value_bytes(kind) == 1) pack(static_cast<uint8_t*>(nullptr));
    else if (kind == BF16) pack(static_cast<uint16_t*>(nullptr));
    else pack(static_cast<float*>(nullptr));
}

// codes [rows][K] with a sign bit and 7 bits of magnitude, and a scale a row: NaN for a row that is not finite.
KERNEL quantize_rows(int64_t dtype, const void* weight, int64_t rows, int64_t K, uint8_t* codes, float* scales) {
    with_type(dtype, [&](auto* type) {
        const auto* data = static_cast<const ELEMENT(type)*>(weight);
        parallel_for(rows, [&](int64_t r) {
            float* row = scratch(0, K);
            vec most = zero(), nothing = zero();  // the latter a NaN by any value that is not finite
            lanes_of(K, [&](int64_t k, int lanes) {
                const vec v = load(data + r * K + k, lanes);
                store(row + k, v, lanes);
                most = max(most, max(v, zero() - v));
                nothing = fma(v, zero(), nothing);
            });
            scales[r] = reduce_max(most) / 127.0f + reduce_add(nothing);
            if (!(scales[r] == scales[r])) {
                std::fill_n(codes + r * K, K, uint8_t(0));
                return;
            }
            const float divisor = scales[r] > 0 ? scales[r] : 1.0f;
            for (int64_t k = 0; k < K; k++) {
                const float q = row[k] / divisor;
                codes[r * K + k] = uint8_t(uint8_t(__builtin_rintf(q < 0 ? -q : q)) | (q < 0 ? 0x80 : 0));
            }
        });
    });
}

KERNEL packed_linear(const Matrix* w, int64_t x_type, const void* x, int64_t M, float* y) {
    Arena& arena = Arena::start();
    linear(*w, prepared(arena, *w, x_type, x, M).rows(), M, y);
}
