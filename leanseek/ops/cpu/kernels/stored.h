// Weights as serving holds them: the published bytes, packed once at load into panels of PANEL_ROWS outputs.
//
// A panel holds, for each pair of columns (2p, 2p + 1), its 64 rows' two values side by side: what a BF16 dot product
// takes against one broadcast pair of x. Its bytes are read from end to end whatever the number of rows of x. In vectors
// of 8-bit codes the rows stand in the order in which interleaving the low and high bytes of their BF16 spreads them.
// leanseek/ops/packed.py makes the rows and scales of a panel, panel.h multiplies.
#pragma once
#include "kernels.h"

constexpr int64_t FP8 = 2;       // beside Dtype: e4m3 codes, one scale a 128x128 block
constexpr int64_t INT8 = 3;      // sign and 7 bits of magnitude, one scale a row
constexpr int64_t BLOCK = 128;   // columns that share a scale
constexpr int64_t PANEL_ROWS = 64, HALF_ROWS = 32;

// A packed weight [rows, columns], or a stack of experts' weights of that shape. scale: [panels][blocks of columns][2] of
// FP8, for the two halves of a panel; [panels][PANEL_ROWS] of INT8; else null.
struct Matrix {
    int64_t kind;
    const void* data;
    const float* scale;
    int64_t rows, columns;
};

inline int64_t value_bytes(int64_t kind) { return kind == FP32 ? 4 : kind == BF16 ? 2 : 1; }
inline int64_t pairs_of(const Matrix& w) { return (w.columns + 1) / 2; }
inline int64_t blocks_of(const Matrix& w) { return (w.columns + BLOCK - 1) / BLOCK; }
inline int64_t panels_of(const Matrix& w) { return (w.rows + PANEL_ROWS - 1) / PANEL_ROWS; }
inline int64_t panel_bytes(const Matrix& w) { return pairs_of(w) * 2 * PANEL_ROWS * value_bytes(w.kind); }
inline int64_t panel_scales(const Matrix& w) { return w.kind == FP8 ? 2 * blocks_of(w) : w.kind == INT8 ? PANEL_ROWS : 0; }

inline Matrix expert_of(const Matrix& stacked, int64_t e) {  // one matrix of a stack
    Matrix one = stacked;
    one.data = static_cast<const char*>(stacked.data) + e * panels_of(stacked) * panel_bytes(stacked);
    if (one.scale) one.scale += e * panels_of(stacked) * panel_scales(stacked);
    return one;
}

// Where row n of a panel stands among its pairs.
inline int64_t place_of(int64_t kind, int64_t n) {
    if (value_bytes(kind) > 1) return n;
    return n / 32 * 32 + n % 16 / 4 * 8 + n % 32 / 16 * 4 + n % 4;
}

// ---- decoding to FP32 ----

// e4m3 moved to a half's place (sign to bit 15, exponent and mantissa from bit 7) reads as value / 256: exact for every
// finite code, subnormals included. The NaN codes 0x7f and 0xff do not survive: loading refuses weights that hold them.
static inline float fp8_over_256(uint8_t code) {
    const uint16_t half = uint16_t((uint16_t(int16_t(int8_t(code))) << 7) & 0xbfff);
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
}

// INT8 has a sign bit and a magnitude, so that it decodes as e4m3 does: by a table of 128 entries.
struct signed_byte {
    uint8_t code;
};

// LANES values from p.
static inline vec widen_lanes(const uint8_t* p) {  // over 256
#if defined(__AVX512F__)
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(short(0xbfff))));
#else
    const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(short(0xbfff))));
#endif
}
static inline vec widen_lanes(const signed_byte* p) {
#if defined(__AVX512F__)
    const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x80)), 24);
    const vec size = _mm512_cvtepi32_ps(_mm512_and_si512(code, _mm512_set1_epi32(0x7f)));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(size), sign));
#else
    const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(0x80)), 24);
    const vec size = _mm256_cvtepi32_ps(_mm256_and_si256(code, _mm256_set1_epi32(0x7f)));
    return _mm256_or_ps(size, _mm256_castsi256_ps(sign));
#endif
}
static inline vec widen_lanes(const float* p) { return load(p); }
static inline vec widen_lanes(const bf16* p) { return load(p); }

// BF16 of the 128 codes without a sign. NaN, 0x7f in e4m3, stays NaN.
static inline const uint16_t* code_table(int64_t kind) {
    struct Table {
        uint16_t bits[128];
        explicit Table(int64_t kind) {
            for (int code = 0; code < 128; code++) {
                bf16 value;
                put(&value, kind == INT8 ? float(code) : fp8_over_256(uint8_t(code)) * 256.0f);
                bits[code] = kind == FP8 && code == 0x7f ? 0x7fc0 : value.bits;
            }
        }
    };
    static const Table fp8(FP8), int8(INT8);
    return kind == INT8 ? int8.bits : fp8.bits;
}
