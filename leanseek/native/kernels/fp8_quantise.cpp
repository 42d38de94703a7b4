// The arithmetic of FP8 training (3.3) without FP8 hardware: values are rounded to what an 8-bit code and its tile's scale
// can hold and written back in the compute type, where products follow. With power-of-two scales BF16 holds each of them
// exactly: e4m3 has four significant bits. Codes and scales are written where something is kept for backward.
//
// The inner loops are plain C over 128 values, which the compiler turns into vectors for each instruction set.
#include "kernels.h"
#include "swiglu.h"

namespace {

constexpr int64_t TILE = 128;

inline uint32_t bits_of(float a) {
    uint32_t bits;
    std::memcpy(&bits, &a, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float a;
    std::memcpy(&a, &bits, 4);
    return a;
}

// A format by its largest value, its smallest normal number and what times a power of two has that power's last bit.
struct Format {
    float largest;
    uint32_t smallest_normal;  // bits of a float
    float magic;               // 1.5 · 2^(23 - mantissa bits)
};
constexpr Format FORMATS[] = {
    {448.0f, 0x3c800000, 1572864.0f},    // e4m3
    {65024.0f, 0x38800000, 196608.0f},   // e5m6
};
constexpr int64_t E4M3 = 0;  // E5M6 is 1: native/fp8.py

inline uint32_t magnitude(float a) {  // bits of |a|, of 0 where it is not finite
    const uint32_t bits = bits_of(a) & 0x7fffffff;
    return bits < 0x7f800000 ? bits : 0;
}

inline float tile_scale(uint32_t amax, const Format& f, bool power_of_two) {
    float scale = float_of(amax) / f.largest;
    if (power_of_two) scale = float_of((bits_of(scale) + 0x7fffff) & 0x7f800000);  // up, so that nothing saturates
    return scale > 0 ? scale : 1.0f;
}

// v / scale rounded to the format, ties to even, saturated; NaN for what is not finite.
inline float encode(float v, float scale, const Format& f) {
    float q = v / scale;
    q = q > f.largest ? f.largest : q;
    q = q < -f.largest ? -f.largest : q;
    const uint32_t exponent = bits_of(q) & 0x7f800000;
    const float magic = float_of(exponent > f.smallest_normal ? exponent : f.smallest_normal) * f.magic;
    const uint32_t rounded = bits_of((q + magic) - magic) | (bits_of(q) & 0x80000000);  // -0 stays
    return float_of((bits_of(v) & 0x7fffffff) < 0x7f800000 ? rounded : 0x7fc00000);
}

inline uint8_t e4m3_code(float q) {  // of a value on the grid
    const uint32_t bits = bits_of(q) & 0x7fffffff;
    const uint32_t normal = (bits >> 20) - (120 << 3);
    const uint32_t subnormal = uint32_t(int32_t(float_of(std::min(bits, 0x3c800000u)) * 512.0f));
    const uint32_t code = bits >= 0x3c800000 ? normal : subnormal;
    return uint8_t((bits > 0x7f800000 ? 0x7f : code) | (bits_of(q) >> 24 & 0x80));
}

inline float e4m3_value(uint8_t code) {
    const uint32_t low = code & 0x7f;
    const float normal = float_of((low << 20) + (120u << 23)), subnormal = float(int32_t(low)) * 0x1p-9f;
    float value = low < 8 ? subnormal : normal;
    value = low == 0x7f ? float_of(0x7fc00000) : value;
    return float_of(bits_of(value) | uint32_t(code & 0x80) << 24);
}

inline uint32_t largest(const float* x, int64_t n) {
    uint32_t amax = 0;
    for (int64_t i = 0; i < n; i++) amax = std::max(amax, magnitude(x[i]));
    return amax;
}

// One tile of a row: x becomes codes (or not) and values (or not).
template <class V>
inline void write_tile(const float* x, int64_t n, float scale, const Format& f, uint8_t* codes, V* values) {
    float q[TILE];
    for (int64_t i = 0; i < n; i++) q[i] = encode(x[i], scale, f);
    if (codes)
        for (int64_t i = 0; i < n; i++) codes[i] = e4m3_code(q[i]);
    if (values)
        for (int64_t i = 0; i < n; i++) put(values + i, q[i] * scale);
}

// 128 rows (or fewer) of 128 columns (or fewer) in FP32, as they pass from one kernel's input to its outputs.
struct Square {
    float* at;  // [TILE][TILE]
    int64_t rows, columns;

    float* row(int64_t r) const { return at + r * TILE; }
};

// Values in 1×128 tiles.
template <class V>
void write_rows(const Square& s, bool power_of_two, V* out, int64_t ldo) {
    for (int64_t r = 0; r < s.rows; r++) {
        const float scale = tile_scale(largest(s.row(r), s.columns), FORMATS[E4M3], power_of_two);
        write_tile(s.row(r), s.columns, scale, FORMATS[E4M3], nullptr, out + r * ldo);
    }
}

// Values in 128×1 tiles: each column of the square has a scale.
template <class V>
void write_turned(const Square& s, bool power_of_two, V* out, int64_t ldo) {
    uint32_t amax[TILE] = {};
    float scale[TILE];
    for (int64_t r = 0; r < s.rows; r++)
        for (int64_t c = 0; c < s.columns; c++) amax[c] = std::max(amax[c], magnitude(s.row(r)[c]));
    for (int64_t c = 0; c < s.columns; c++) scale[c] = tile_scale(amax[c], FORMATS[E4M3], power_of_two);
    for (int64_t r = 0; r < s.rows; r++)
        for (int64_t c = 0; c < s.columns; c++)
            put(out + r * ldo + c, encode(s.row(r)[c], scale[c], FORMATS[E4M3]) * scale[c]);
}

inline int64_t tiles_of(int64_t n) { return (n + TILE - 1) / TILE; }

// Rows of codes with their 1×128 scales.
struct Codes {
    const uint8_t* codes;
    const float* scales;
    int64_t columns, tiles;

    void read(int64_t row, int64_t tile, int64_t first, int64_t n, float* to) const {
        const uint8_t* from = codes + row * columns + first;
        const float scale = scales[row * tiles + tile];
        for (int64_t i = 0; i < n; i++) to[i] = e4m3_value(from[i]) * scale;
    }
};

}  // namespace

// 1×128 tiles of x [rows, columns], row stride ldx. codes [rows, columns], scales [rows, ceil(columns/128)] and values
// [rows, columns] of `values_type` may be null; codes are e4m3's alone. `fixed`, unless null, is the one scale of all.
KERNEL fp8_rows(int64_t dtype, int64_t values_type, int64_t format, int64_t power_of_two, const void* x_, int64_t ldx,
                int64_t rows, int64_t columns, const float* fixed, uint8_t* codes, float* scales, void* values_) {
    const int64_t tiles = tiles_of(columns);
    const Format f = FORMATS[format];
    with_types(dtype, values_type, [&](auto* type, auto* out_type) {
        using T = ELEMENT(type);
        using V = ELEMENT(out_type);
        parallel_ranges(rows, 64, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; r++)
                for (int64_t t = 0; t < tiles; t++) {
                    const int64_t at = t * TILE, n = std::min(TILE, columns - at);
                    const T* in = (const T*)x_ + r * ldx + at;
                    float x[TILE];
                    for (int64_t i = 0; i < n; i++) x[i] = to_float(in[i]);
                    const float scale = fixed ? *fixed : tile_scale(largest(x, n), f, power_of_two);
                    if (scales) scales[r * tiles + t] = scale;
                    write_tile(x, n, scale, f, codes ? codes + r * columns + at : nullptr,
                               values_ ? (V*)values_ + r * columns + at : nullptr);
                }
        });
    });
}

// The values [rows, columns] of e4m3 codes, row stride ldc, and their 1×128 scales.
KERNEL fp8_wide(int64_t dtype, const uint8_t* codes, int64_t ldc, const float* scales, int64_t rows, int64_t columns,
                void* values_) {
    const int64_t tiles = tiles_of(columns);
    with_type(dtype, [&](auto* type) {
        using T = ELEMENT(type);
        parallel_ranges(rows, 64, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; r++)
                for (int64_t t = 0; t < tiles; t++) {
                    const int64_t at = t * TILE, n = std::min(TILE, columns - at);
                    const uint8_t* from = codes + r * ldc + at;
                    T* to = (T*)values_ + r * columns + at;
                    const float scale = scales[r * tiles + t];
                    float x[TILE];
                    for (int64_t i = 0; i < n; i++) x[i] = e4m3_value(from[i]) * scale;
                    for (int64_t i = 0; i < n; i++) put(to + i, x[i]);
                }
        });
    });
}

// For the products of backward, from x [.., columns] of `dtype`, or from e4m3 codes and their 1×128 scales (x null): row
// r of the outputs is row index[r] of the input (r where index is null). `by_rows` has 1×128 tiles; `turned` has tiles of
// one column and the rows of a band, [bands[b], bands[b + 1]), at most 128. Either may be null.
KERNEL fp8_turn(int64_t dtype, int64_t values_type, int64_t power_of_two, const void* x_, const uint8_t* codes,
                const float* scales, const int64_t* index, const int64_t* bands, int64_t count, int64_t columns,
                void* by_rows, void* turned) {
    const int64_t tiles = tiles_of(columns);
    const Codes kept{codes, scales, columns, tiles};
    with_types(dtype, values_type, [&](auto* type, auto* out_type) {
        using T = ELEMENT(type);
        using V = ELEMENT(out_type);
        parallel_for(count * tiles, [&](int64_t task) {
            const int64_t begin = bands[task / tiles], tile = task % tiles, at = tile * TILE;
            const Square s{scratch(0, TILE * TILE), bands[task / tiles + 1] - begin, std::min(TILE, columns - at)};
            for (int64_t r = 0; r < s.rows; r++) {
                const int64_t row = index ? index[begin + r] : begin + r;
                if (x_) {
                    const T* in = (const T*)x_ + row * columns + at;
                    for (int64_t i = 0; i < s.columns; i++) s.row(r)[i] = to_float(in[i]);
                } else {
                    kept.read(row, tile, at, s.columns, s.row(r));
                }
            }
            if (by_rows) write_rows(s, power_of_two, (V*)by_rows + begin * columns + at, columns);
            if (turned) write_turned(s, power_of_two, (V*)turned + begin * columns + at, columns);
        });
    });
}

// 128×128 blocks of `count` weights [rows, columns]. codes and scales, or values, may be null; `fixed`, unless null, are
// scales for whole weights.
KERNEL fp8_blocks(int64_t dtype, int64_t values_type, int64_t power_of_two, const void* w_, int64_t count, int64_t rows,
                  int64_t columns, const float* fixed, uint8_t* codes, float* scales, void* values_) {
    const int64_t down = tiles_of(rows), across = tiles_of(columns);
    with_types(dtype, values_type, [&](auto* type, auto* out_type) {
        using T = ELEMENT(type);
        using V = ELEMENT(out_type);
        parallel_for(count * down * across, [&](int64_t task) {
            const int64_t block_row = task / across % down, first = task / across / down * rows + block_row * TILE;
            const int64_t n = std::min(TILE, rows - block_row * TILE), at = task % across * TILE;
            const int64_t width = std::min(TILE, columns - at);
            const Square s{scratch(0, TILE * TILE), n, width};
            uint32_t amax = 0;
            for (int64_t r = 0; r < n; r++) {
                const T* in = (const T*)w_ + (first + r) * columns + at;
                for (int64_t i = 0; i < width; i++) s.row(r)[i] = to_float(in[i]);
                amax = std::max(amax, largest(s.row(r), width));
            }
            const float scale = fixed ? fixed[task / across / down] : tile_scale(amax, FORMATS[E4M3], power_of_two);
            if (scales) scales[task] = scale;
            for (int64_t r = 0; r < n; r++)
                write_tile(s.row(r), width, scale, FORMATS[E4M3], codes ? codes + (first + r) * columns + at : nullptr,
                           values_ ? (V*)values_ + (first + r) * columns + at : nullptr);
        });
    });
}

// hidden [rows, 2I], gate then up, each half with tiles of its own: kept as codes and scales [rows, 2 ceil(I/128)]; and
// act [rows, I] = w · silu(gate) · up in 1×128 tiles. w [rows] may be null.
KERNEL fp8_swiglu(int64_t dtype, int64_t values_type, int64_t power_of_two, const void* hidden_, const float* weights,
                  int64_t rows, int64_t I, uint8_t* codes, float* scales, void* act_) {
    const int64_t tiles = tiles_of(I);
    const Format f = FORMATS[E4M3];
    with_types(dtype, values_type, [&](auto* type, auto* out_type) {
        using T = ELEMENT(type);
        using V = ELEMENT(out_type);
        parallel_ranges(rows, 32, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; r++)
                for (int64_t t = 0; t < tiles; t++) {
                    const int64_t at = t * TILE, n = std::min(TILE, I - at);
                    float part[2][TILE], act[TILE];
                    for (int half = 0; half < 2; half++) {
                        const int64_t from = r * 2 * I + half * I + at;
                        for (int64_t i = 0; i < n; i++) part[half][i] = to_float(((const T*)hidden_)[from + i]);
                        const float scale = tile_scale(largest(part[half], n), f, power_of_two);
                        scales[r * 2 * tiles + half * tiles + t] = scale;
                        write_tile(part[half], n, scale, f, codes + from, (V*)nullptr);
                    }
                    const vec w = set1(weights ? weights[r] : 1.0f);
                    lanes_of(n, [&](int64_t i, int lanes) {
                        const vec g = load(part[0] + i, lanes);
                        store(act + i, g * sigmoid(g) * load(part[1] + i, lanes) * w, lanes);
                    });
                    const float scale = tile_scale(largest(act, n), f, power_of_two);
                    write_tile(act, n, scale, f, nullptr, (V*)act_ + r * I + at);
                }
        });
    });
}

// From grad [rows, I] of act and the kept hidden: the gradient of hidden [rows, 2I] in 1×128 tiles and turned, act [rows,
// I] computed again and turned, and dweights [rows] (null where weights are). Bands as in fp8_turn.
KERNEL fp8_swiglu_backward(int64_t dtype, int64_t values_type, int64_t power_of_two, const void* grad_,
                           const uint8_t* codes, const float* scales, const float* weights, const int64_t* bands,
                           int64_t count, int64_t I, void* by_rows_, void* turned_, void* act_turned_, float* dweights) {
    const int64_t tiles = tiles_of(I);
    const Codes kept{codes, scales, 2 * I, 2 * tiles};
    with_types(dtype, values_type, [&](auto* type, auto* out_type) {
        using T = ELEMENT(type);
        using V = ELEMENT(out_type);
        V *by_rows = (V*)by_rows_, *turned = (V*)turned_, *act_turned = (V*)act_turned_;
        parallel_for(count, [&](int64_t band) {
            const int64_t begin = bands[band], rows = bands[band + 1] - begin;
            float* memory = scratch(0, 3 * TILE * TILE);
            if (dweights) std::fill_n(dweights + begin, rows, 0.0f);
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t at = t * TILE, n = std::min(TILE, I - at);
                const Square gate{memory, rows, n}, up{memory + TILE * TILE, rows, n}, act{memory + 2 * TILE * TILE, rows, n};
                for (int64_t r = 0; r < rows; r++) {
                    const T* grad = (const T*)grad_ + (begin + r) * I + at;
                    kept.read(begin + r, t, at, n, gate.row(r));
                    kept.read(begin + r, tiles + t, I + at, n, up.row(r));
                    const vec w = set1(weights ? weights[begin + r] : 1.0f);
                    vec dw = zero();
                    lanes_of(n, [&](int64_t i, int lanes) {
                        const SwiGLU s(load(gate.row(r) + i, lanes), load(up.row(r) + i, lanes), load(grad + i, lanes), w);
                        dw = dw + s.dweight;
                        store(act.row(r) + i, s.act, lanes);
                        store(gate.row(r) + i, s.dgate, lanes);
                        store(up.row(r) + i, s.dup, lanes);
                    });
                    if (dweights) dweights[begin + r] += reduce_add(dw);
                }
                const int64_t from = begin * 2 * I + at;
                write_rows(gate, power_of_two, by_rows + from, 2 * I);
                write_rows(up, power_of_two, by_rows + from + I, 2 * I);
                write_turned(gate, power_of_two, turned + from, 2 * I);
                write_turned(up, power_of_two, turned + from + I, 2 * I);
                write_turned(act, power_of_two, act_turned + begin * I + at, I);
            }
        });
    });
}
