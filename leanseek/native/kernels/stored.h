// Weights for serving: the published bytes, packed once at load into panels of PANEL_ROWS outputs.
//
// A panel holds, for each pair of columns (2p, 2p + 1), its 64 rows' two values side by side: what a BF16 dot product
// takes against one broadcast pair of x. Its bytes are read from end to end whatever the number of rows of x. In vectors
// of 8-bit codes the rows stand in the order in which interleaving the low and high bytes of their BF16 spreads them.
// leanseek/native/panels.py makes the rows and scales of a panel, panel.h multiplies.
#pragma once
#include "kernels.h"

constexpr int64_t FP8 = 2;       // continues Dtype: e4m3 codes, one scale per 128x128 block
constexpr int64_t INT8 = 3;      // sign and 7 bits of magnitude, one scale per row
constexpr int64_t BLOCK = 128;   // columns that share a scale
constexpr int64_t PANEL_ROWS = 64, HALF_ROWS = 32;

// A packed weight [rows, columns], or a stack of experts' weights of that shape. scale: for FP8 [panels][blocks of
// columns][2], one per half of a panel; for INT8 [panels][PANEL_ROWS]; else null. FP8 may have `checked` [panels], which
// starts as 0 and stores what has_nan found.
struct Matrix {
    int64_t kind;
    const void* data;
    const float* scale;
    int64_t rows, columns;
    uint8_t* checked;
};

constexpr int64_t value_bytes(int64_t kind) { return kind == FP32 ? 4 : kind == BF16 ? 2 : 1; }
inline int64_t pairs_of(const Matrix& w) { return (w.columns + 1) / 2; }
inline int64_t blocks_of(const Matrix& w) { return (w.columns + BLOCK - 1) / BLOCK; }
inline int64_t panels_of(const Matrix& w) { return (w.rows + PANEL_ROWS - 1) / PANEL_ROWS; }
inline int64_t panel_bytes(const Matrix& w) { return pairs_of(w) * 2 * PANEL_ROWS * value_bytes(w.kind); }
inline int64_t panel_scales(const Matrix& w) { return w.kind == FP8 ? 2 * blocks_of(w) : w.kind == INT8 ? PANEL_ROWS : 0; }

inline Matrix expert_of(const Matrix& stacked, int64_t e) {  // one matrix of a stack
    Matrix one = stacked;
    one.data = static_cast<const char*>(stacked.data) + e * panels_of(stacked) * panel_bytes(stacked);
    if (one.scale) one.scale += e * panels_of(stacked) * panel_scales(stacked);
    if (one.checked) one.checked += e * panels_of(stacked);
    return one;
}

// The place of row n of a panel among its pairs.
constexpr int64_t place_of(int64_t kind, int64_t n) {
    if (value_bytes(kind) > 1) return n;
    return n / 32 * 32 + n % 16 / 4 * 8 + n % 32 / 16 * 4 + n % 4;
}

// ---- decoding to FP32 ----

// INT8 is stored as sign and magnitude, so that a table of 128 entries decodes it, like e4m3.
struct signed_byte {
    uint8_t code;
};

// The two columns of 2 LANES rows that are adjacent in memory, in the order of the sums: see sum_of.
struct Spread {
    vec even[2], odd[2];
};

constexpr float FP8_UNIT = 0x1p120f, INT8_UNIT = 0x1p-24f;  // factors that `spread` leaves out

// An e4m3 code moved to a float's bits (sign to bit 31, exponent and mantissa from bit 20) reads as value / 2^120. This is
// exact for every finite code; e4m3 subnormals become float subnormals. It is wrong for NaN, 0x7f and 0xff: see has_nan.
static inline Spread spread(const uint8_t* p) {
    const ints codes = load_ints(p), kept = words(0x87f0), high = lanes_with(0xffff0000);
    const ints odd = right16<4>(codes) & kept, even = right16<4>(left16<8>(codes)) & kept;  // as BF16
    return {{as_floats(left32<16>(even)), as_floats(even & high)}, {as_floats(left32<16>(odd)), as_floats(odd & high)}};
}
static inline Spread spread(const signed_byte* p) {  // times 2^24
    const ints codes = load_ints(p), top = lanes_with(0xff000000);
    const ints v = negated_where(codes & words(0x7f7f), codes);
    return {{to_floats(left32<24>(v)), to_floats(left32<8>(v) & top)}, {to_floats(left32<16>(v) & top), to_floats(v & top)}};
}
static inline Spread spread(const bf16* p) {
    const ints a = load_ints(p), b = load_ints(p + 2 * LANES), high = lanes_with(0xffff0000);
    return {{as_floats(left32<16>(a)), as_floats(left32<16>(b))}, {as_floats(a & high), as_floats(b & high)}};
}
static inline Spread spread(const float* p) {
    const vec a = load(p), b = load(p + LANES), c = load(p + 2 * LANES), d = load(p + 3 * LANES);
    return {{even_lanes(a, b), even_lanes(c, d)}, {odd_lanes(a, b), odd_lanes(c, d)}};
}

// The place of row n's sum in the sums of a panel.
constexpr int64_t sum_of(int64_t kind, int64_t n) {
    if (value_bytes(kind) == 1) {
        const int64_t place = place_of(kind, n);
        return (place / (2 * LANES) * 2 + place % 2) * LANES + place % (2 * LANES) / 2;
    }
    if (value_bytes(kind) == 2) return n;
    const int64_t lane = n % LANES, half = LANES / 2;
    return n / LANES * LANES + lane % half / 2 * 4 + lane / half * 2 + lane % 2;
}

// Whether a panel's e4m3 codes include a NaN. Checked the first time the panel is multiplied, then remembered.
[[maybe_unused]] static inline bool has_nan(const Matrix& w, int64_t panel) {
    enum : uint8_t { UNKNOWN, CLEAN, NANS };
    const uint8_t known = w.checked ? __atomic_load_n(w.checked + panel, __ATOMIC_RELAXED) : uint8_t(UNKNOWN);
    if (known != UNKNOWN) return known == NANS;
    const char* codes = static_cast<const char*>(w.data) + panel * panel_bytes(w);
    ints largest = words(0);  // without the sign, times two
    for (int64_t i = 0; i < panel_bytes(w); i += int64_t(sizeof(ints))) largest = max_unsigned8(largest, twice8(load_ints(codes + i)));
    const bool found = any_equal8(largest, 0xfe);
    if (w.checked) __atomic_store_n(w.checked + panel, uint8_t(found ? NANS : CLEAN), __ATOMIC_RELAXED);
    return found;
}

static inline float fp8_value(uint8_t code) {
    const float size = (code & 0x7f) < 8 ? float(code & 7) * 0x1p-9f : float(8 + code % 8) * float(1 << (code >> 3 & 15)) * 0x1p-10f;
    const float value = (code & 0x7f) == 0x7f ? __builtin_nanf("") : size;
    return code & 0x80 ? -value : value;
}

// The BF16 values of the 128 codes without sign.
[[maybe_unused]] static inline const uint16_t* code_table(int64_t kind) {
    struct Table {
        uint16_t bits[128];
        explicit Table(int64_t kind) {
            for (int code = 0; code < 128; code++) {
                bf16 value;
                put(&value, kind == INT8 ? float(code) : fp8_value(uint8_t(code)));
                bits[code] = value.bits;
            }
        }
    };
    static const Table fp8(FP8), int8(INT8);
    return kind == INT8 ? int8.bits : fp8.bits;
}
