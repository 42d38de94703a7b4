// Weights and caches as they are stored, and how they are decoded.
#pragma once
#include "kernels.h"

constexpr int64_t FP8 = 2;      // beside Dtype: e4m3 codes, one scale a 128x128 block
constexpr int64_t INT8 = 3;     // sign and 7 bits of magnitude, one scale a row
constexpr int64_t BLOCK = 128;  // side of a block

// A weight [rows, columns], or a stack of experts' weights of that shape; scale [ceil(rows/128), ceil(columns/128)] of
// FP8, [rows] of INT8, else null.
struct Matrix {
    int64_t kind;
    const void* data;
    const float* scale;
    int64_t rows, columns;
};

// e4m3 moved to a half's place (sign to bit 15, exponent and mantissa from bit 7) reads as value / 256: exact for every
// finite code, subnormals included. The NaN codes 0x7f and 0xff do not survive: loading refuses weights that hold them.
static inline float fp8_over_256(uint8_t code) {
    const uint16_t half = uint16_t((uint16_t(int16_t(int8_t(code))) << 7) & 0xbfff);
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
}
static inline void decode(const uint8_t* p, vec& a, vec& b) {  // two vectors of codes
#if defined(__AVX512F__)
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i half = _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16(short(0xbfff)));
    a = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
    b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
#else
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(short(0xbfff)));
    a = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
    b = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
#endif
}
static inline void decode(const float* p, vec& a, vec& b) { a = load(p), b = load(p + LANES); }
static inline void decode(const bf16* p, vec& a, vec& b) { a = load(p), b = load(p + LANES); }
static inline float decode(float w) { return w; }
static inline float decode(bf16 w) { return to_float(w); }
static inline float decode(uint8_t w) { return fp8_over_256(w); }

// INT8 has a sign bit and a magnitude, so that it decodes as e4m3 does: by a table of 128 entries.
struct signed_byte {
    uint8_t code;
};
static inline float decode(signed_byte w) { return float(w.code & 0x7f) * (w.code & 0x80 ? -1.0f : 1.0f); }
static inline vec decode_lanes(const signed_byte* p) {
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
static inline void decode(const signed_byte* p, vec& a, vec& b) { a = decode_lanes(p), b = decode_lanes(p + LANES); }

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
