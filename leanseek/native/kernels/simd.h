// The vector operations that kernels use: 16 lanes of FP32 with AVX-512, 8 with AVX2. BF16 is a storage type, widened on
// load and rounded to nearest even on store; arithmetic is FP32. Each instruction set is compiled into a shared library of
// its own (see CMakeLists.txt), so the names here need no suffix for it.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "sanitize.h"

struct bf16 {
    uint16_t bits;
};

static inline float to_float(float a) { return a; }
static inline float to_float(bf16 a) {
    const uint32_t wide = uint32_t(a.bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

static inline void put(float* p, float a) { *p = a; }
static inline void put(bf16* p, float a) {  // round to nearest even
    uint32_t bits;
    std::memcpy(&bits, &a, 4);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    p->bits = uint16_t((nan ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)

constexpr int LANES = 16;
constexpr int REGISTERS = 32;
using vec = __m512;

static inline vec zero() { return _mm512_setzero_ps(); }
static inline vec set1(float a) { return _mm512_set1_ps(a); }
static inline vec set1_pair(const float* p) {  // p[0], p[1] by turns
    double both;
    std::memcpy(&both, p, 8);
    return _mm512_castpd_ps(_mm512_set1_pd(both));
}
static inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
static inline vec fnma(vec a, vec b, vec c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
static inline vec sqrt(vec a) { return _mm512_sqrt_ps(a); }
static inline vec max(vec a, vec b) { return _mm512_max_ps(a, b); }
static inline vec min(vec a, vec b) { return _mm512_min_ps(a, b); }
static inline vec reciprocal(vec a) {  // of a moderate a, to the last bit or two
    const vec guess = _mm512_rcp14_ps(a);
    return _mm512_mul_ps(guess, _mm512_fnmadd_ps(a, guess, _mm512_set1_ps(2.0f)));
}
static inline vec round(vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vec scale_by_power_of_two(vec a, vec n) { return _mm512_scalef_ps(a, n); }
static inline float reduce_add(vec a) { return _mm512_reduce_add_ps(a); }
static inline float reduce_max(vec a) { return _mm512_reduce_max_ps(a); }

static inline __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
static inline vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline vec load(const float* p, int n) {  // first n lanes, others 0
    touch(p, n);
    return _mm512_maskz_loadu_ps(first(n), p);
}
static inline void store(float* p, vec a) { _mm512_storeu_ps(p, a); }
static inline void store(float* p, vec a, int n) {
    touch(p, n);
    _mm512_mask_storeu_ps(p, first(n), a);
}
static inline vec keep_first(vec a, int n, vec others) { return _mm512_mask_mov_ps(others, first(n), a); }

using ints = __m512i;
static inline ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
static inline ints words(int a) { return _mm512_set1_epi16(short(a)); }
static inline ints lanes_with(int64_t a) { return _mm512_set1_epi32(int(a)); }
template <int N> static inline ints left16(ints a) { return _mm512_slli_epi16(a, N); }
template <int N> static inline ints right16(ints a) { return _mm512_srai_epi16(a, N); }  // of signed words
template <int N> static inline ints left32(ints a) { return _mm512_slli_epi32(a, N); }
static inline ints negated_where(ints a, ints sign) {  // bytes of a, where sign's are negative -a
    return _mm512_mask_sub_epi8(a, _mm512_movepi8_mask(sign), _mm512_setzero_si512(), a);
}
static inline ints twice8(ints a) { return _mm512_add_epi8(a, a); }
static inline ints max_unsigned8(ints a, ints b) { return _mm512_max_epu8(a, b); }
static inline bool any_equal8(ints a, int b) { return _mm512_cmpeq_epi8_mask(a, _mm512_set1_epi8(char(b))) != 0; }
static inline vec as_floats(ints a) { return _mm512_castsi512_ps(a); }
static inline vec to_floats(ints a) { return _mm512_cvtepi32_ps(a); }
static inline vec even_lanes(vec a, vec b) { return _mm512_shuffle_ps(a, b, 0x88); }  // in each quarter, first of a
static inline vec odd_lanes(vec a, vec b) { return _mm512_shuffle_ps(a, b, 0xdd); }

static inline vec widen(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
static inline __m256i narrow(vec a) {  // not vcvtneps2bf16, which flushes subnormals
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));  // NaN stays NaN
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
#if defined(__AVX512BF16__)
static inline __m512i narrow_two(vec low, vec high) { return __m512i(_mm512_cvtne2ps_pbh(high, low)); }  // flushes subnormals
#endif
static inline vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
static inline vec load(const bf16* p, int n) {
    touch(p, n);
    return widen(_mm256_maskz_loadu_epi16(first(n), p));
}
static inline void store(bf16* p, vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
static inline void store(bf16* p, vec a, int n) {
    touch(p, n);
    _mm256_mask_storeu_epi16(p, first(n), narrow(a));
}

#else  // AVX2, FMA

constexpr int LANES = 8;
constexpr int REGISTERS = 16;
using vec = __m256;

static inline vec zero() { return _mm256_setzero_ps(); }
static inline vec set1(float a) { return _mm256_set1_ps(a); }
static inline vec set1_pair(const float* p) {  // p[0], p[1] by turns
    touch(p, 2);
    return _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(p)));
}
static inline vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }    // a b + c
static inline vec fnma(vec a, vec b, vec c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a b
static inline vec sqrt(vec a) { return _mm256_sqrt_ps(a); }
static inline vec max(vec a, vec b) { return _mm256_max_ps(a, b); }
static inline vec min(vec a, vec b) { return _mm256_min_ps(a, b); }
static inline vec reciprocal(vec a) {  // of a moderate a, to the last bit or two
    const vec guess = _mm256_rcp_ps(a);
    return _mm256_mul_ps(guess, _mm256_fnmadd_ps(a, guess, _mm256_set1_ps(2.0f)));
}
static inline vec round(vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vec scale_by_power_of_two(vec a, vec n) {  // n whole, at most 127; 0 below -126
    const __m256i wide = _mm256_cvtps_epi32(_mm256_max_ps(n, _mm256_set1_ps(-127.0f)));
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(wide, _mm256_set1_epi32(127)), 23);  // -127: 0.0
    return _mm256_mul_ps(a, _mm256_castsi256_ps(exponent));
}
static inline float reduce_add(vec a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
static inline float reduce_max(vec a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

static inline __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline vec load(const float* p, int n) {  // first n lanes, others 0
    touch(p, n);
    return _mm256_maskload_ps(p, first(n));
}
static inline void store(float* p, vec a) { _mm256_storeu_ps(p, a); }
static inline void store(float* p, vec a, int n) {
    touch(p, n);
    _mm256_maskstore_ps(p, first(n), a);
}
static inline vec keep_first(vec a, int n, vec others) {
    return _mm256_blendv_ps(others, a, _mm256_castsi256_ps(first(n)));
}

using ints = __m256i;
static inline ints load_ints(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
static inline ints words(int a) { return _mm256_set1_epi16(short(a)); }
static inline ints lanes_with(int64_t a) { return _mm256_set1_epi32(int(a)); }
template <int N> static inline ints left16(ints a) { return _mm256_slli_epi16(a, N); }
template <int N> static inline ints right16(ints a) { return _mm256_srai_epi16(a, N); }  // of signed words
template <int N> static inline ints left32(ints a) { return _mm256_slli_epi32(a, N); }
static inline ints negated_where(ints a, ints sign) { return _mm256_sign_epi8(a, sign); }  // where 0, a is 0 too
static inline ints twice8(ints a) { return _mm256_add_epi8(a, a); }
static inline ints max_unsigned8(ints a, ints b) { return _mm256_max_epu8(a, b); }
static inline bool any_equal8(ints a, int b) {
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(a, _mm256_set1_epi8(char(b)))) != 0;
}
static inline vec as_floats(ints a) { return _mm256_castsi256_ps(a); }
static inline vec to_floats(ints a) { return _mm256_cvtepi32_ps(a); }
static inline vec even_lanes(vec a, vec b) { return _mm256_shuffle_ps(a, b, 0x88); }  // in each half, first of a
static inline vec odd_lanes(vec a, vec b) { return _mm256_shuffle_ps(a, b, 0xdd); }

static inline vec widen(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
static inline __m128i narrow(vec a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));  // NaN stays NaN
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
static inline vec load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
static inline vec load(const bf16* p, int n) {
    bf16 padded[LANES] = {};
    std::memcpy(padded, p, size_t(n) * sizeof(bf16));
    return load(padded);
}
static inline void store(bf16* p, vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a)); }
static inline void store(bf16* p, vec a, int n) {
    bf16 padded[LANES];
    store(padded, a);
    std::memcpy(p, padded, size_t(n) * sizeof(bf16));
}

#endif

// 2^(n + r) for integer n <= 127 and |r| <= 1/2, relative error below 2^-23; results that are too small become 0.
static inline vec exp2_parts(vec n, vec r) {
    vec p = set1(1.32647273e-3f);  // (2^r - 1) / r, minimax for the relative error of 2^r
    p = fma(p, r, set1(9.67151299e-3f));
    p = fma(p, r, set1(5.55073358e-2f));
    p = fma(p, r, set1(2.40222424e-1f));
    p = fma(p, r, set1(6.93147004e-1f));
    return scale_by_power_of_two(fma(p, r, set1(1.0f)), n);
}

// 2^x for x <= 127; far below zero (a masked score) it is 0.
static inline vec exp2(vec x) {
    const vec n = round(x);
    return exp2_parts(n, x - n);
}

// e^x for x <= 88.
static inline vec exp(vec x) {
    const vec n = round(x * set1(1.44269502f));
    const vec r = fma(x, set1(1.92596303e-8f), fma(x, set1(1.44269502f), zero() - n));  // x log2(e) - n
    return exp2_parts(n, r);
}

// 1 / (1 + e^-x), without a division.
static inline vec sigmoid(vec x) {
    return reciprocal(set1(1.0f) + exp(min(zero() - x, set1(80.0f))));
}

// ---- transposition: log2(LANES) rounds, each exchanging the off-diagonal blocks of one size ----

template <int H, size_t... L>
static inline void exchange(vec& a, vec& b, std::index_sequence<L...>) {
    const vec low = __builtin_shufflevector(a, b, int((L & H) ? LANES + L - H : L)...);
    b = __builtin_shufflevector(a, b, int((L & H) ? LANES + L : L + H)...);
    a = low;
}

template <int H = 1>
static inline void transpose(vec (&rows)[LANES]) {  // rows[i][j] becomes rows[j][i]
    if constexpr (H < LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & H)) exchange<H>(rows[i], rows[i | H], std::make_index_sequence<LANES>());
        transpose<2 * H>(rows);
    }
}
