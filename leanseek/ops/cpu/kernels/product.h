// Products of rows of x with weights as they are stored: y[m][n] = Σ_k x[m][k] w[n][k].
//
// Each y[m][n] is one chain of operations over k in one fixed order, whatever the number of rows m that run together: a
// request's result does not depend on what else is in its batch. There are two arithmetics, both with FP32 sums:
// - exact: x in FP32, the weight decoded to FP32;
// - narrow, for x in BF16 where the CPU multiplies BF16: the weight's codes as BF16, which holds all of e4m3 and of INT8
//   exactly, summed over 128 columns at a time and only then scaled (as the paper promotes its partial sums, 3.3.2).
// Weights are read in the layout they are published in. Few rows decode in registers; many decode a panel once into L2.
#pragma once
#include <algorithm>
#include <vector>

#include "arena.h"
#include "stored.h"

namespace {

// Rows of x ready for products with weights of one kind, all K columns and zeros up to `width`.
struct Rows {
    const void* data;  // FP32, or BF16 with every 64 columns in the order in which codes unpack
    long width;
    bool narrow;
};

constexpr long STEP = 64;  // columns decoded at a time
inline long padded(long K) { return (K + STEP - 1) / STEP * STEP; }
// BF16 values from one row to the next: an odd number of steps, so that rows do not fall into the same cache sets.
inline long apart(long K) { return padded(K) / STEP % 2 ? padded(K) : padded(K) + STEP; }

// Which weights x in BF16 may meet in the narrow arithmetic.
inline bool narrows([[maybe_unused]] int64_t kind) {
#if defined(__AVX512BF16__)
    return kind != FP32;
#else
    return false;
#endif
}

// ---- exact ----

constexpr long MAX_ROWS = 16;  // rows of x that one pass over the weights serves

// R weight rows times M rows of x: out[m * ldo + r].
template <class T, int R, int M>
void exact_tile(const T* w, long K, const float* x, long ldx, float* out, long ldo) {
    vec sum[R][M];
    float tail[R][M] = {};
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) sum[r][m] = zero();
    long k = 0;
    for (; k + 2 * LANES <= K; k += 2 * LANES) {
        vec a[R], b[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            __builtin_prefetch(w + (r + R) * K + k, 0, 2);  // the next tile's rows, into L2
            decode(w + r * K + k, a[r], b[r]);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const vec xa = load(x + m * ldx + k), xb = load(x + m * ldx + k + LANES);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) sum[r][m] = fma(b[r], xb, fma(a[r], xa, sum[r][m]));
        }
    }
    for (; k < K; k++)  // columns that two vectors do not divide
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) tail[r][m] = __builtin_fmaf(decode(w[r * K + k]), x[m * ldx + k], tail[r][m]);
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) out[m * ldo + r] = reduce_add(sum[r][m]) + tail[r][m];
}

// n weight rows times M rows of x, R at a time.
template <class T, int R, int M>
void exact_strip(const T* w, long K, const float* x, long ldx, float* out, long ldo, long n) {
    long r = 0;
    for (; r + R <= n; r += R) exact_tile<T, R, M>(w + r * K, K, x, ldx, out + r, ldo);
    for (; r < n; r++) exact_tile<T, 1, M>(w + r * K, K, x, ldx, out + r, ldo);
}

// R x M chains at a time: enough to hide a multiply-add's latency, few enough for the registers.
template <class T>
void exact_strips(const T* w, long K, const float* x, long ldx, float* out, long ldo, long n, long m) {
    constexpr bool wide = LANES == 16;  // 32 registers, else 16
    for (; m >= 8; m -= 8, x += 8 * ldx, out += 8 * ldo) exact_strip<T, wide ? 3 : 1, 8>(w, K, x, ldx, out, ldo, n);
    for (; m >= 4; m -= 4, x += 4 * ldx, out += 4 * ldo) exact_strip<T, wide ? 4 : 2, 4>(w, K, x, ldx, out, ldo, n);
    for (; m >= 2; m -= 2, x += 2 * ldx, out += 2 * ldo) exact_strip<T, wide ? 8 : 4, 2>(w, K, x, ldx, out, ldo, n);
    if (m) exact_strip<T, 8, 1>(w, K, x, ldx, out, ldo, n);
}

// Rows [n0, n1) of a weight times m rows of x; out points at column n0. Scales go onto x, a block of weight rows at a
// time, so that the inner loop has none; FP8 decodes to value / 256.
template <class T>
void exact_rows(const Matrix& w, const float* x, long ldx, long m, float* out, long ldo, long n0, long n1) {
    const T* data = static_cast<const T*>(w.data);
    const long K = w.columns, blocks = (K + BLOCK - 1) / BLOCK;
    const bool block_scaled = w.kind == FP8;
    thread_local std::vector<float> scaled;
    if (block_scaled) scaled.resize(size_t(MAX_ROWS) * K);
    for (long n = n0; n < n1;) {
        const long stop = block_scaled ? std::min(n1, (n / BLOCK + 1) * BLOCK) : n1;
        for (long first = 0; first < m; first += MAX_ROWS) {
            const long some = std::min(MAX_ROWS, m - first);
            const float* rows = x + first * ldx;
            if (block_scaled) {
                const float* scale = w.scale + n / BLOCK * blocks;
                for (long i = 0; i < some; i++)
                    for (long b = 0; b < blocks; b++)
                        for (long k = b * BLOCK; k < std::min(K, (b + 1) * BLOCK); k++)
                            scaled[i * K + k] = rows[i * ldx + k] * (scale[b] * 256.0f);
            }
            exact_strips(data + n * K, K, block_scaled ? scaled.data() : rows, block_scaled ? K : ldx,
                         out + first * ldo + (n - n0), ldo, stop - n, some);
        }
        n = stop;
    }
    if (w.kind == INT8)
        for (long i = 0; i < m; i++)
            for (long n = n0; n < n1; n++) out[i * ldo + n - n0] *= w.scale[n];
}

// ---- narrow ----

#if defined(__AVX512BF16__)

using pairs = __m512bh;  // 32 BF16 values

// 64 columns of one row as two vectors, those past `columns` zero.
struct CodeSource {
    using Element = uint8_t;
    static constexpr bool CODES = true;
    // 8-bit codes: the two bytes of each one's BF16 are looked up by its low 7 bits, the sign is put on
    const uint8_t* data;
    long stride;
    __m512i high[2], low[2];

    CodeSource(const Matrix& w, long row) : data(static_cast<const uint8_t*>(w.data) + row * w.columns), stride(w.columns) {
        const uint16_t* table = code_table(w.kind);
        alignas(64) uint8_t bytes[2][128];
        for (int i = 0; i < 128; i++) bytes[0][i] = uint8_t(table[i] >> 8), bytes[1][i] = uint8_t(table[i]);
        for (int i = 0; i < 2; i++) {
            high[i] = _mm512_load_si512(bytes[0] + 64 * i);
            low[i] = _mm512_load_si512(bytes[1] + 64 * i);
        }
    }
    template <bool FULL>
    inline __attribute__((always_inline)) void decode(const uint8_t* p, long columns, pairs& a, pairs& b) const {
        const __m512i code = FULL ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((uint64_t(1) << columns) - 1, p);
        const __m512i sign = _mm512_set1_epi8(char(0x80));
        __m512i upper = _mm512_permutex2var_epi8(high[0], code, high[1]);
        upper = _mm512_ternarylogic_epi32(upper, code, sign, 0xf8);  // upper | (code & sign)
        const __m512i lower = _mm512_permutex2var_epi8(low[0], code, low[1]);
        a = pairs(_mm512_unpacklo_epi8(lower, upper));
        b = pairs(_mm512_unpackhi_epi8(lower, upper));
    }
};

struct WideSource {  // BF16 as stored, or a panel of decoded codes
    using Element = bf16;
    static constexpr bool CODES = false;
    const bf16* data;
    long stride;

    template <bool FULL>
    inline __attribute__((always_inline)) pairs decode(const bf16* p, long columns) const {
        if (FULL) return pairs(_mm512_loadu_si512(p));
        return pairs(_mm512_maskz_loadu_epi16(columns >= 32 ? ~0u : columns > 0 ? (1u << columns) - 1 : 0, p));
    }
};

// The sums of four vectors' lanes side by side, each added in one fixed order; the first n are stored.
inline void store_sums(float* out, vec a, vec b, vec c, vec d, int n) {
    const vec ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    const vec cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const vec four = _mm512_castpd_ps(low) + _mm512_castpd_ps(high);  // [a, b, c, d] in each 128 bits
    const __m256 half = _mm512_castps512_ps256(four) + _mm512_extractf32x8_ps(four, 1);
    const __m128 sums = _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
    if (n == 4) _mm_storeu_ps(out, sums);
    else _mm_mask_storeu_ps(out, __mmask8((1 << n) - 1), sums);
}

// to[r][m] += 64 columns from k of R weight rows times M rows of x; FULL: none of them lies past K.
template <bool FULL, int R, int M, class Source, class T>
inline __attribute__((always_inline)) void narrow_step(const Source& source, const T* const (&w)[R], const bf16* const (&x)[M],
                                                       long k, long K, vec (&to)[R][M]) {
    if constexpr (Source::CODES) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            pairs a, b;
            __builtin_prefetch(w[r] + R * source.stride + k, 0, 2);  // the next tile's rows
            source.template decode<FULL>(w[r] + k, K - k, a, b);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) to[r][m] = _mm512_dpbf16_ps(to[r][m], a, pairs(_mm512_loadu_si512(x[m] + k)));
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) to[r][m] = _mm512_dpbf16_ps(to[r][m], b, pairs(_mm512_loadu_si512(x[m] + k + 32)));
        }
    } else {
#pragma GCC unroll 2
        for (int half = 0; half < STEP; half += 32) {
            pairs xs[M];
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) xs[m] = pairs(_mm512_loadu_si512(x[m] + k + half));
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                if constexpr (M == 1) __builtin_prefetch(w[r] + R * source.stride + k + half, 0, 2);
                const pairs a = source.template decode<FULL>(w[r] + k + half, K - k - half);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) to[r][m] = _mm512_dpbf16_ps(to[r][m], a, xs[m]);
            }
        }
    }
}

// R weight rows from `row` times M rows of x. SCALED: a block of 128 columns is summed by itself, then scaled and added.
template <bool SCALED, int R, int M, class Source>
inline __attribute__((always_inline)) void narrow_tile(const Source& source, long row, long K, const bf16* x, long ldx,
                                                       const float* scale, float* out, long ldo) {
    const typename Source::Element* w[R];
    const bf16* rows[M];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) w[r] = source.data + (row + r) * source.stride;
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) rows[m] = x + m * ldx;
    vec sum[R][M];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) sum[r][m] = zero();
    long k = 0;
    if constexpr (SCALED) {
        for (; k < K; k += BLOCK, scale++) {
            vec part[R][M];
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) part[r][m] = zero();
            if (k + BLOCK <= K) {
                narrow_step<true>(source, w, rows, k, K, part);
                narrow_step<true>(source, w, rows, k + STEP, K, part);
            } else {
                narrow_step<false>(source, w, rows, k, std::min(K, k + STEP), part);
                if (k + STEP < K) narrow_step<false>(source, w, rows, k + STEP, K, part);
            }
            const vec factor = set1(*scale);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) sum[r][m] = fma(part[r][m], factor, sum[r][m]);
        }
    } else {
        for (; k + STEP <= K; k += STEP) narrow_step<true>(source, w, rows, k, K, sum);
        if (k < K) narrow_step<false>(source, w, rows, k, K, sum);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int r = 0; r < R; r += 4) {
            const auto at = [&](int i) { return r + i < R ? sum[std::min(r + i, R - 1)][m] : zero(); };
            store_sums(out + m * ldo + r, at(0), at(1), at(2), at(3), std::min(4, R - r));
        }
}

template <bool SCALED, int R, int M, class Source>
void narrow_strip(const Source& source, long first, long n, long K, const bf16* x, long ldx, const float* scale, float* out,
                  long ldo) {
    long r = first;
    for (; r + R <= n; r += R) narrow_tile<SCALED, R, M>(source, r, K, x, ldx, scale, out + r, ldo);
    if constexpr (R > 1) narrow_strip<SCALED, R == 8 ? 4 : 1, M>(source, r, n, K, x, ldx, scale, out, ldo);
}

// n weight rows that share their scales times m rows of x.
template <bool SCALED, class Source>
void narrow_strips(const Source& source, long n, long K, const bf16* x, long ldx, long m, const float* scale, float* out,
                   long ldo) {
    const auto rows = [&](auto count, auto tile) __attribute__((always_inline)) {
        narrow_strip<SCALED, decltype(tile)::value, decltype(count)::value>(source, 0, n, K, x, ldx, scale, out, ldo);
        m -= count, x += count * ldx, out += count * ldo;
    };
    using std::integral_constant;
    // of 32 registers a scaled tile needs two a sum, and the tables of codes four
    if constexpr (Source::CODES) {
        while (m > 6) rows(integral_constant<int, 4>(), integral_constant<int, 2>());
        if (m == 6) rows(integral_constant<int, 6>(), integral_constant<int, 2>());
        if (m == 5) rows(integral_constant<int, 5>(), integral_constant<int, 2>());
        if (m == 4) rows(integral_constant<int, 4>(), integral_constant<int, 2>());
        if (m == 3) rows(integral_constant<int, 3>(), integral_constant<int, 2>());
    } else {
        if constexpr (!SCALED)
            while (m >= 6) rows(integral_constant<int, 6>(), integral_constant<int, 4>());
        while (m >= 3 && m != 4) rows(integral_constant<int, 3>(), integral_constant<int, 4>());
    }
    while (m >= 2) rows(integral_constant<int, 2>(), integral_constant<int, 4>());
    if (m == 1) rows(integral_constant<int, 1>(), integral_constant<int, 8>());
}

constexpr long PANEL_BYTES = 96 << 10;  // weights decoded to BF16 at a time, in L2
constexpr long DIRECT_ROWS = 16;       // rows of x up to which decoding again beats a panel
constexpr long ACTIVE_ROWS = 128;  // rows of x that stay in L2 beside them

// Many rows of x: four weight rows at a time stay in L1 while x comes from L2.
template <bool SCALED>
void narrow_panel(const WideSource& panel, long n, long K, const bf16* x, long ldx, long m, const float* scale, float* out,
                  long ldo) {
    for (long first = 0; first < m; first += ACTIVE_ROWS)
        for (long r = 0; r < n; r += 4)
            narrow_strips<SCALED>(WideSource{panel.data + r * panel.stride, panel.stride}, std::min(4L, n - r), K,
                                  x + first * ldx, ldx, std::min(ACTIVE_ROWS, m - first), scale,
                                  out + first * ldo + r, ldo);
}

template <bool SCALED>
void narrow_codes(const Matrix& w, long row, long n, const bf16* x, long ldx, long m, const float* scale, float* out,
                  long ldo) {
    const long K = w.columns, width = padded(K), stride = apart(K);
    const long rows = std::max(4L, PANEL_BYTES / (2 * stride) / 4 * 4);
    const CodeSource codes(w, row);
    if (m <= DIRECT_ROWS) return narrow_strips<SCALED>(codes, n, K, x, ldx, m, scale, out, ldo);
    bf16* panel = reinterpret_cast<bf16*>(scratch(6, rows * stride / 2));
    for (long first = 0; first < n; first += rows) {
        const long some = std::min(rows, n - first);
        for (long r = 0; r < some; r++)
            for (long k = 0; k < K; k += STEP) {
                const uint8_t* p = codes.data + (first + r) * K + k;
                __builtin_prefetch(p + rows * K, 0, 2);  // the next panel
                pairs a, b;
                if (K - k >= STEP) codes.decode<true>(p, STEP, a, b);
                else codes.decode<false>(p, K - k, a, b);
                _mm512_storeu_si512(panel + r * stride + k, __m512i(a));
                _mm512_storeu_si512(panel + r * stride + k + 32, __m512i(b));
            }
        narrow_panel<SCALED>({panel, stride}, some, width, x, ldx, m, scale, out + first, ldo);
    }
}

void narrow_rows(const Matrix& w, const bf16* x, long ldx, long m, float* out, long ldo, long n0, long n1) {
    const long K = w.columns;
    if (w.kind == BF16) {
        const WideSource source{static_cast<const bf16*>(w.data) + n0 * K, K};
        if (m <= 6) return narrow_strips<false>(source, n1 - n0, K, x, ldx, m, nullptr, out, ldo);
        return narrow_panel<false>(source, n1 - n0, K, x, ldx, m, nullptr, out, ldo);
    }
    if (w.kind == INT8) {
        narrow_codes<false>(w, n0, n1 - n0, x, ldx, m, nullptr, out, ldo);
        for (long i = 0; i < m; i++)
            for (long n = n0; n < n1; n++) out[i * ldo + n - n0] *= w.scale[n];
        return;
    }
    const long blocks = (K + BLOCK - 1) / BLOCK;
    for (long n = n0; n < n1;) {
        const long stop = std::min(n1, (n / BLOCK + 1) * BLOCK);
        narrow_codes<true>(w, n, stop - n, x, ldx, m, w.scale + n / BLOCK * blocks, out + n - n0, ldo);
        n = stop;
    }
}

// 64 columns from natural order into that of CodeSource: 8 columns each to the first and the second vector by turns.
inline void store_step(bf16* to, const bf16* from, bool codes) {
    __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 32);
    if (codes) {
        const __m512i even = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), odd = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
        const __m512i first = _mm512_permutex2var_epi64(a, even, b);
        b = _mm512_permutex2var_epi64(a, odd, b), a = first;
    }
    _mm512_storeu_si512(to, a);
    _mm512_storeu_si512(to + 32, b);
}
#endif

// ---- both ----

// One row of x [K] to `to`, as `Rows` of that kind of weight and arithmetic hold it.
template <class T>
void prepare_row(const T* x, long K, int64_t kind, bool narrow, void* to) {
#if defined(__AVX512BF16__)
    if (narrow) {
        for (long k = 0; k < K; k += STEP) {
            bf16 step[STEP] = {};
            lanes_of(std::min(STEP, K - k), [&](int64_t i, int lanes) { store(step + i, load(x + k + i, lanes), lanes); });
            store_step(static_cast<bf16*>(to) + k, step, kind != BF16);
        }
        return;
    }
#endif
    (void)kind, (void)narrow;
    lanes_of(K, [&](int64_t k, int lanes) { store(static_cast<float*>(to) + k, load(x + k, lanes), lanes); });
}

// Rows of x in memory of the arena; narrow where x was BF16 (or may be rounded to it) and the weight allows it.
class PreparedRows {
  public:
    PreparedRows(Arena& arena, long count, const Matrix& w, bool x_is_bf16)
        : kind_(w.kind), narrow_(x_is_bf16 && narrows(w.kind)), width_(narrow_ ? apart(w.columns) : w.columns),
          data_(arena.take<char>(count * width_ * size())) {}

    // n columns of row `row` from column k, a multiple of STEP.
    template <class T>
    void set(long row, const T* x, long k, long n) { prepare_row(x, n, kind_, narrow_, at(row) + k * size()); }
    void copy(long row, const PreparedRows& from, long its_row) { std::copy_n(from.at(its_row), width_ * size(), at(row)); }
    Rows rows(long first = 0) const { return {at(first), width_, narrow_}; }

  private:
    long size() const { return narrow_ ? 2 : 4; }
    char* at(long row) const { return data_ + row * width_ * size(); }
    int64_t kind_;
    bool narrow_;
    long width_;
    char* data_;
};

// out[m * ldo + n - n0] for weight rows [n0, n1) and m rows of x.
inline void multiply_rows(const Matrix& w, const Rows& x, long m, float* out, long ldo, long n0, long n1) {
#if defined(__AVX512BF16__)
    if (x.narrow) return narrow_rows(w, static_cast<const bf16*>(x.data), x.width, m, out, ldo, n0, n1);
#endif
    const float* rows = static_cast<const float*>(x.data);
    if (w.kind == FP8) exact_rows<uint8_t>(w, rows, x.width, m, out, ldo, n0, n1);
    else if (w.kind == INT8) exact_rows<signed_byte>(w, rows, x.width, m, out, ldo, n0, n1);
    else if (w.kind == BF16) exact_rows<bf16>(w, rows, x.width, m, out, ldo, n0, n1);
    else exact_rows<float>(w, rows, x.width, m, out, ldo, n0, n1);
}

constexpr long TASK_ROWS = 64;  // weight rows that a task takes

// y[M][N] = x[M][K] w[N][K]ᵀ
inline void linear(const Matrix& w, const Rows& x, long M, float* y) {
    parallel_ranges(w.rows, TASK_ROWS,
                    [&](int64_t n0, int64_t n1) { multiply_rows(w, x, M, y + n0, w.rows, n0, n1); });
}

}  // namespace
