// Products of rows of x with packed weights: y[m][n] = Σ_k x[m][k] w[n][k].
//
// Each y[m][n] is computed over k in one fixed order, however many rows m run together, so a request's result does not
// depend on its batch. There are two arithmetics, both with FP32 sums:
// - exact: x in FP32, the weight decoded to FP32, one sum over the columns in order;
// - narrow, for x in BF16 if the CPU multiplies BF16: the weight's codes become BF16, which represents every e4m3 and INT8
//   value exactly.
// FP8 is summed over 128 columns at a time and then scaled, like the paper's promotion of partial sums (3.3.2). For few
// rows, weights are decoded in registers; for more, a block of 128 columns is decoded once into L1.
#pragma once
#include <algorithm>
#include <vector>

#include "arena.h"
#include "stored.h"

namespace {

// How rows of x are stored: in FP32; in FP32 times RAISE, for codes that decode too small (FP8_UNIT); in BF16.
enum class Form { EXACT, RAISED, NARROW };
constexpr float RAISE = 0x1p60f;

// The form of x that a weight of this kind needs.
inline Form form_of(int64_t kind, [[maybe_unused]] bool x_is_bf16) {
#if defined(__AVX512BF16__)
    if (x_is_bf16 && kind != FP32) return Form::NARROW;
#endif
    return kind == FP8 ? Form::RAISED : Form::EXACT;
}
inline long bytes_of(Form form) { return form == Form::NARROW ? 2 : 4; }

// Rows of x in blocks of 128 columns: column k of row m is at k / 128 * stride + m * 128 + k % 128.
struct Rows {
    const void* data;
    long stride;
    Form form;

    Rows from(long first) const { return {static_cast<const char*>(data) + first * BLOCK * bytes_of(form), stride, form}; }
};

// Calls body(tile, first) over m rows, split evenly into tiles of at most MOST rows; `tile` is an integral_constant.
template <int MOST, class Body>
inline void row_tiles(long m, const Body& body) {
    const long tiles = (m + MOST - 1) / MOST;
    for (long t = 0; t < tiles; t++) {
        const long first = m * t / tiles, rows = m * (t + 1) / tiles - first;
        const auto at = [&](auto self, auto count) -> void {
            if constexpr (count.value > 1)
                if (rows < count.value) return self(self, std::integral_constant<int, count.value - 1>());
            body(count, first);
        };
        at(at, std::integral_constant<int, MOST>());
    }
}

// ---- exact: a row of x has VECS vectors of sums, each for LANES rows of the panel ----

constexpr int VECS = PANEL_ROWS / LANES, HALF_VECS = VECS / 2;
constexpr int FEW = REGISTERS == 32 ? 6 : 3;         // rows of x per tile that decodes in registers
constexpr long DECODING_MOST = REGISTERS == 32 ? 6 : 4;  // most rows of x for which every tile decodes again
constexpr int WIDE_ROWS = REGISTERS == 32 ? 12 : 3;  // rows of x per tile over decoded weights,
constexpr int WIDE_VECS = REGISTERS == 32 ? 2 : 4;   // with this many vectors of sums each: 128 columns take 16 KiB
constexpr long FETCH_AHEAD = 4096;                   // bytes

// Stores sum [M][V] to sums [m][64]. With `scale` (one per half), adds sum times scale to sums instead.
template <int M, int V>
inline void put_sums(vec (&sum)[M][V], const float* scale, float* sums, bool fresh) {
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            float* to = sums + m * PANEL_ROWS + v * LANES;
            if (scale) sum[m][v] = fma(sum[m][v], set1(scale[v / HALF_VECS] * (FP8_UNIT / RAISE)), fresh ? zero() : load(to));
            store(to, sum[m][v]);
        }
}

template <int M, int V>
inline void take_sums(vec (&sum)[M][V], const float* sums, bool fresh) {
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[m][v] = fresh ? zero() : load(sums + m * PANEL_ROWS + v * LANES);
}

// Returns p, but hides from the compiler that it is p. The compiler then loads values again instead of keeping them in
// registers that a sum needs: a sum that goes through memory takes 15 cycles per step instead of 8.
inline const float* unknown(const float* p) {
    asm volatile("" : "+r"(p));
    return p;
}

// sums [m][V vectors] (+)= `pairs` pairs of columns from w.
template <int M, int V, class T>
void decoding_tile(const T* w, const float* x, long pairs, const float* scale, float* sums, bool fresh) {
    vec sum[M][V];
    take_sums(sum, sums, scale || fresh);
    for (long p = 0; p < pairs; p++, w += 2 * PANEL_ROWS) {
#pragma GCC unroll 8
        for (long i = 0; i < 2 * V * LANES * long(sizeof(T)); i += 64) __builtin_prefetch(reinterpret_cast<const char*>(w) + FETCH_AHEAD + i);
#pragma GCC unroll 4
        for (int v = 0; v < V; v += 2) {
            const Spread of = spread(w + 2 * v * LANES);
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                const float* at = M == 2 ? unknown(x + 2 * p) : x + 2 * p;
#pragma GCC unroll 8
                for (int m = 0; m < M; m++)
                    sum[m][v + i] = fma(of.odd[i], set1(at[m * BLOCK + 1]), fma(of.even[i], set1(at[m * BLOCK]), sum[m][v + i]));
            }
        }
    }
    put_sums(sum, scale, sums, fresh);
}

template <int M, class T>
void decoding_rows(const T* w, const float* x, long pairs, const float* scale, float* sums, bool fresh) {
    constexpr int V = M == 1 || REGISTERS == 32 ? VECS : HALF_VECS;
    for (int v = 0; v < VECS; v += V)
        decoding_tile<M, V>(w + 2 * v * LANES, x, pairs, scale ? scale + v / HALF_VECS : nullptr, sums + v * LANES, fresh);
}

// Like decoding_tile, for `columns` columns that are decoded already: w [columns][WIDE_VECS].
template <int M>
void decoded_tile(const float* w, const float* x, long columns, const float* scale, float* sums, bool fresh) {
    vec sum[M][WIDE_VECS];
    take_sums(sum, sums, scale || fresh);
    for (long k = 0; k < columns; k++, w += WIDE_VECS * LANES) {
        vec factor[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) factor[m] = set1(x[m * BLOCK + k]);
#pragma GCC unroll 4
        for (int v = 0; v < WIDE_VECS; v++) {
            const vec column = load(w + v * LANES);
#pragma GCC unroll 16
            for (int m = 0; m < M; m++) sum[m][v] = fma(column, factor[m], sum[m][v]);
        }
    }
    put_sums(sum, scale, sums, fresh);
}

// Writes NaN into the decoded values, vectors [v, v + WIDE_VECS), wherever `pairs` pairs of columns hold a NaN's code.
[[maybe_unused]] inline void put_nans(const uint8_t* w, long pairs, int v, float* decoded) {
    for (long n = 0; n < PANEL_ROWS; n++) {
        const long lane = sum_of(FP8, n) - v * LANES;
        if (lane < 0 || lane >= WIDE_VECS * LANES) continue;
        for (long k = 0; k < 2 * pairs; k++)
            if ((w[k / 2 * 2 * PANEL_ROWS + 2 * place_of(FP8, n) + k % 2] & 0x7f) == 0x7f) decoded[k * WIDE_VECS * LANES + lane] = __builtin_nanf("");
    }
}

template <class T>
void exact_panel(const Matrix& w, const T* panel, const float* scale, bool nans, const Rows& x, long m, float* sums) {
    constexpr bool always = std::is_same_v<T, float> && REGISTERS == 32;  // decode in registers: it only changes the order
    float* decoded = scratch(5, BLOCK * WIDE_VECS * LANES);
    for (long b = 0; b < blocks_of(w); b++, panel += BLOCK * PANEL_ROWS) {
        const long pairs = std::min(BLOCK / 2, pairs_of(w) - b * BLOCK / 2);
        const float* rows = static_cast<const float*>(x.data) + b * x.stride;
        const float* scales = w.kind == FP8 ? scale + 2 * b : nullptr;
        if (always || (m <= DECODING_MOST && !nans)) {
            row_tiles<FEW>(m, [&](auto tile, long first) {
                decoding_rows<tile.value>(panel, rows + first * BLOCK, pairs, scales, sums + first * PANEL_ROWS, b == 0);
            });
            continue;
        }
        for (int v = 0; v < VECS; v += WIDE_VECS) {
            for (long p = 0; p < pairs; p++)
#pragma GCC unroll 2
                for (int i = 0; i < WIDE_VECS; i += 2) {
                    const Spread of = spread(panel + p * 2 * PANEL_ROWS + 2 * (v + i) * LANES);
                    float* to = decoded + (2 * p * WIDE_VECS + i) * LANES;
                    store(to, of.even[0]), store(to + LANES, of.even[1]);
                    store(to + WIDE_VECS * LANES, of.odd[0]), store(to + (WIDE_VECS + 1) * LANES, of.odd[1]);
                }
            if constexpr (std::is_same_v<T, uint8_t>)
                if (nans) put_nans(panel, pairs, v, decoded);
            const float* halves = scales ? scales + v / HALF_VECS : nullptr;
            row_tiles<WIDE_ROWS>(m, [&](auto tile, long first) {
                decoded_tile<tile.value>(decoded, rows + first * BLOCK, 2 * pairs, halves, sums + first * PANEL_ROWS + v * LANES, b == 0);
            });
        }
    }
}

// out[m][64] of one panel.
template <class T>
void exact_rows(const Matrix& w, const char* panel, const float* scale, bool nans, const Rows& x, long m, float* out) {
    struct Places {
        uint8_t of[PANEL_ROWS];
    };
    constexpr int64_t kind = std::is_same_v<T, float> ? FP32 : std::is_same_v<T, bf16> ? BF16 : FP8;  // INT8 is ordered like FP8
    constexpr Places places = [] {
        Places p{};
        for (int64_t n = 0; n < PANEL_ROWS; n++) p.of[n] = uint8_t(sum_of(kind, n));
        return p;
    }();
    float* sums = kind == BF16 ? out : scratch(4, m * PANEL_ROWS);
    exact_panel(w, reinterpret_cast<const T*>(panel), scale, nans, x, m, sums);
    for (long i = 0; kind != BF16 && i < m; i++)
        for (long n = 0; n < PANEL_ROWS; n++) out[i * PANEL_ROWS + n] = sums[i * PANEL_ROWS + places.of[n]];
}

// ---- narrow ----

#if defined(__AVX512BF16__)

constexpr long AHEAD = 4096;  // bytes ahead that a panel is prefetched

using pairs_of_bf16 = __m512bh;  // 16 pairs

// The 64 rows' values of a pair of columns as four vectors of 16 rows.
struct CodeSource {  // looks up the two bytes of each code's BF16 by its low 7 bits, then adds the sign
    static constexpr long BYTES = 2 * PANEL_ROWS;  // bytes of a pair of columns
    __m512i high[2], low[2];

    explicit CodeSource(int64_t kind) {
        const uint16_t* table = code_table(kind);
        alignas(64) uint8_t bytes[2][128];
        for (int i = 0; i < 128; i++) bytes[0][i] = uint8_t(table[i] >> 8), bytes[1][i] = uint8_t(table[i]);
        for (int i = 0; i < 2; i++) {
            high[i] = _mm512_load_si512(bytes[0] + 64 * i);
            low[i] = _mm512_load_si512(bytes[1] + 64 * i);
        }
    }
    inline __attribute__((always_inline)) void decode(const char* p, int half, pairs_of_bf16 (&out)[2]) const {
        const __m512i code = _mm512_loadu_si512(p + 64 * half);
        __m512i upper = _mm512_permutex2var_epi8(high[0], code, high[1]);
        upper = _mm512_ternarylogic_epi32(upper, code, _mm512_set1_epi8(char(0x80)), 0xf8);  // upper | (code & sign)
        const __m512i lower = _mm512_permutex2var_epi8(low[0], code, low[1]);
        out[0] = pairs_of_bf16(_mm512_unpacklo_epi8(lower, upper));
        out[1] = pairs_of_bf16(_mm512_unpackhi_epi8(lower, upper));
    }
};

struct WideSource {  // BF16 as stored, or decoded
    static constexpr long BYTES = 4 * PANEL_ROWS;
    inline __attribute__((always_inline)) void decode(const char* p, int half, pairs_of_bf16 (&out)[2]) const {
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) out[i] = pairs_of_bf16(_mm512_loadu_si512(p + 128 * half + 64 * i));
    }
};

inline pairs_of_bf16 broadcast_pair(const bf16* x) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    return pairs_of_bf16(_mm512_set1_epi32(pair));
}

// sums[m][64] (+)= `pairs` pairs of columns from w; `scale`, unless null, has one scale per half. Meanwhile FETCH bytes per
// pair are prefetched from `ahead`.
template <bool SCALED, int M, long FETCH, class Source>
void narrow_tile(const Source& source, const char* w, const bf16* x, long pairs, const float* scale, float* sums, bool fresh,
                 [[maybe_unused]] const char* ahead) {
    vec sum[M][4];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) sum[m][v] = SCALED || fresh ? zero() : load(sums + m * PANEL_ROWS + v * LANES);
    for (long p = 0; p < pairs; p++, w += Source::BYTES) {
#pragma GCC unroll 4
        for (long i = 0; i < FETCH; i += 64) __builtin_prefetch(ahead + p * FETCH + i);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {  // leaves most registers to the sums
            pairs_of_bf16 values[2];
            source.decode(w, half, values);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const pairs_of_bf16 pair = broadcast_pair(x + m * BLOCK + 2 * p);
#pragma GCC unroll 2
                for (int v = 0; v < 2; v++) sum[m][2 * half + v] = _mm512_dpbf16_ps(sum[m][2 * half + v], values[v], pair);
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            float* to = sums + m * PANEL_ROWS + v * LANES;
            if constexpr (SCALED) sum[m][v] = fma(sum[m][v], set1(scale[v / 2]), fresh ? zero() : load(to));
            store(to, sum[m][v]);
        }
}

constexpr int NARROW_ROWS = 6;  // 24 sums of 32 registers
constexpr int DIRECT_ROWS = 6;  // leaves registers for the code tables
constexpr long DIRECT_MOST = 32; // up to this many rows of x, decoding again beats decoding once into L1

template <bool SCALED>
void narrow_codes(const Matrix& w, const char* panel, const float* scale, const Rows& x, long m, float* out) {
    const CodeSource codes(w.kind);
    char* wide = scratch<char>(5, BLOCK / 2 * WideSource::BYTES);
    for (long b = 0; b < blocks_of(w); b++) {
        const long pairs = std::min(BLOCK / 2, pairs_of(w) - b * BLOCK / 2);
        const char *from = panel + b * BLOCK * PANEL_ROWS, *next = from + BLOCK * PANEL_ROWS;
        const bf16* rows = static_cast<const bf16*>(x.data) + b * x.stride;
        const float* scales = scale + 2 * b;
        if (m <= DIRECT_MOST) {
            row_tiles<DIRECT_ROWS>(m, [&](auto tile, long first) {
                float* to = out + first * PANEL_ROWS;
                if (first) narrow_tile<SCALED, tile.value, 0>(codes, from, rows + first * BLOCK, pairs, scales, to, b == 0, from);
                else narrow_tile<SCALED, tile.value, CodeSource::BYTES>(codes, from, rows, pairs, scales, to, b == 0, from + AHEAD);
            });
            continue;
        }
        for (long p = 0; p < pairs; p++) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                pairs_of_bf16 values[2];
                codes.decode(from + p * CodeSource::BYTES, half, values);
#pragma GCC unroll 2
                for (int v = 0; v < 2; v++)
                    _mm512_store_si512(wide + p * WideSource::BYTES + 128 * half + 64 * v, __m512i(values[v]));
            }
        }
        row_tiles<NARROW_ROWS>(m, [&](auto tile, long first) {
            float* to = out + first * PANEL_ROWS;
            const WideSource decoded;
            if (first) narrow_tile<SCALED, tile.value, 0>(decoded, wide, rows + first * BLOCK, pairs, scales, to, b == 0, next);
            else narrow_tile<SCALED, tile.value, CodeSource::BYTES>(decoded, wide, rows, pairs, scales, to, b == 0, next);
        });
    }
}

inline void narrow_rows(const Matrix& w, const char* panel, const float* scale, const Rows& x, long m, float* out) {
    if (w.kind == FP8) return narrow_codes<true>(w, panel, scale, x, m, out);
    if (w.kind == INT8) return narrow_codes<false>(w, panel, scale, x, m, out);
    for (long b = 0; b < blocks_of(w); b++) {
        const long pairs = std::min(BLOCK / 2, pairs_of(w) - b * BLOCK / 2);
        const char* from = panel + b * BLOCK * PANEL_ROWS * 2;
        const bf16* rows = static_cast<const bf16*>(x.data) + b * x.stride;
        row_tiles<NARROW_ROWS>(m, [&](auto tile, long first) {
            const WideSource stored;
            float* to = out + first * PANEL_ROWS;
            if (first) narrow_tile<false, tile.value, 0>(stored, from, rows + first * BLOCK, pairs, nullptr, to, b == 0, from);
            else narrow_tile<false, tile.value, WideSource::BYTES>(stored, from, rows, pairs, nullptr, to, b == 0, from + AHEAD);
        });
    }
}
#endif

// ---- both ----

// out[m][64] = rows [0, m) of x times the rows of one panel; rows past the weight's last one give zeros.
inline void multiply_panel(const Matrix& w, long panel, const Rows& x, long m, float* out) {
    const char* data = static_cast<const char*>(w.data) + panel * panel_bytes(w);
    const float* scale = w.scale ? w.scale + panel * panel_scales(w) : nullptr;
#if defined(__AVX512BF16__)
    if (x.form == Form::NARROW) narrow_rows(w, data, scale, x, m, out);
    else
#endif
    if (w.kind == FP8) exact_rows<uint8_t>(w, data, scale, has_nan(w, panel), x, m, out);
    else if (w.kind == INT8) exact_rows<signed_byte>(w, data, scale, false, x, m, out);
    else if (w.kind == BF16) exact_rows<bf16>(w, data, scale, false, x, m, out);
    else exact_rows<float>(w, data, scale, false, x, m, out);
    const vec unit = set1(x.form == Form::NARROW ? 1.0f : INT8_UNIT);
    if (w.kind == INT8)
        for (long i = 0; i < m; i++)
            for (long n = 0; n < PANEL_ROWS; n += LANES) {
                float* at = out + i * PANEL_ROWS + n;
                store(at, load(at) * unit * load(scale + n));
            }
}

// Rows of x in arena memory, in the form that the weight needs. x_is_bf16: x is BF16, or may be rounded to it.
class PreparedRows {
  public:
    PreparedRows(Arena& arena, long count, const Matrix& w, bool x_is_bf16)
        : columns_(w.columns), stride_(count * BLOCK), form_(form_of(w.kind, x_is_bf16)),
          data_(arena.take<char>(blocks_of(w) * stride_ * bytes_of(form_))) {}

    // Sets n columns of row `row` from column k on, a multiple of LANES; if the last column is odd, a zero follows it.
    template <class T>
    void set(long row, const T* x, long k, long n) {
        if (form_ == Form::NARROW) put_columns<bf16>(row, x, k, n, [](vec v) { return v; });
        else if (form_ == Form::EXACT) put_columns<float>(row, x, k, n, [](vec v) { return v; });
        else put_columns<float>(row, x, k, n, [](vec v) { return v * set1(RAISE); });
    }
    void copy(long row, const PreparedRows& from, long its_row) {
        for (long b = 0; b < (columns_ + BLOCK - 1) / BLOCK; b++)
            std::copy_n(from.at(its_row, b * BLOCK), BLOCK * bytes_of(form_), at(row, b * BLOCK));
    }
    Rows rows(long first = 0) const { return Rows{data_, stride_, form_}.from(first); }

  private:
    template <class To, class T, class Change>
    void put_columns(long row, const T* x, long k, long n, const Change& change) {
        lanes_of(n, [&](int64_t i, int lanes) { store(reinterpret_cast<To*>(at(row, k + i)), change(load(x + i, lanes)), lanes); });
        if (k + n == columns_ && columns_ % 2) put(reinterpret_cast<To*>(at(row, columns_ - 1)) + 1, 0.0f);
    }
    char* at(long row, long k) const { return data_ + (k / BLOCK * stride_ + row * BLOCK + k % BLOCK) * bytes_of(form_); }
    long columns_, stride_;
    Form form_;
    char* data_;
};

// The M rows of x in the form that w needs.
template <class T>
PreparedRows prepared(Arena& arena, const Matrix& w, bool x_is_bf16, const T* x, long M) {
    PreparedRows rows(arena, M, w, x_is_bf16);
    parallel_rows(M, w.columns, [&](int64_t m) { rows.set(m, x + m * w.columns, 0, w.columns); });
    return rows;
}

// y[m][n] = Σ_k x[m][k] w[n][k] for `count` rows of x; row m of y is at y + m * ldy.
struct Product {
    Matrix w;
    Rows x;
    long count;
    float* y;
    long ldy;
};

constexpr int64_t ALONE = 1 << 16;  // bytes that one thread reads before another has woken up
constexpr long CHUNK_ROWS = 256, FEW_ROWS = 32;  // rows of x per task; fewer if the weight has few panels

// Computes several products in one parallel region. Calls emit(product, panel, first, m, out) for each panel and each chunk
// of m rows from `first`; out [m][64] holds the panel's results.
template <class Emit>
void for_panels(const std::vector<Product>& products, const Emit& emit) {
    struct Task {
        const Product* product;
        long panel, first, m;
    };
    std::vector<Task> tasks;
    int64_t work = 0;  // bytes read, weighted by the number of rows
    for (const Product& p : products) {
        const long panels = panels_of(p.w), chunk = panels < 8 ? FEW_ROWS : CHUNK_ROWS;
        work += panels * panel_bytes(p.w) * (p.count + 3) / 4;
        for (long panel = 0; panel < panels; panel++)
            for (long first = 0; first < p.count; first += chunk)
                tasks.push_back({&p, panel, first, std::min(chunk, p.count - first)});
    }
    const auto run = [&](int64_t i) {
        const auto [product, panel, first, m] = tasks[i];
        float* out = scratch(6, m * PANEL_ROWS);
        multiply_panel(product->w, panel, product->x.from(first), m, out);
        emit(*product, panel, first, m, out);
    };
    if (work < ALONE) for (size_t i = 0; i < tasks.size(); i++) run(i);
    else parallel_for(int64_t(tasks.size()), run);
}

inline void multiply(const std::vector<Product>& products) {
    for_panels(products, [](const Product& p, long panel, long first, long m, const float* out) {
        const long n = panel * PANEL_ROWS, columns = std::min(PANEL_ROWS, p.w.rows - n);
        for (long r = 0; r < m; r++) std::copy_n(out + r * PANEL_ROWS, columns, p.y + (first + r) * p.ldy + n);
    });
}

inline void linear(const Matrix& w, const Rows& x, long M, float* y) { multiply({{w, x, M, y, w.rows}}); }

}  // namespace
