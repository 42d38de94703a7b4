// Products of rows in groups, each group with a matrix of its own, with FP32 sums: C[m][n] = Σ_k A[m][k] · B[k][n].
//
// AVX512_BF16 multiplies pairs along k: a lane of `dpbf16` adds a[k] b[k] + a[k + 1] b[k + 1]. So a "cell" row of BF16 holds
// two k at once: A is read a pair at a time and broadcast, B lies in panels [K / 2][PANEL][2]. It takes subnormals for zero,
// which training can bear. For FP32, and for BF16 without it, cells are FP32 and one k wide, and gemm.h multiplies: the same
// code around both.
#pragma once
#include "gemm.h"

namespace {

#if defined(__AVX512BF16__)
template <class A> using cell_of = A;
#else
template <class A> using cell_of = float;
#endif
template <class Cell> constexpr int64_t STEP = std::is_same_v<Cell, bf16> ? 2 : 1;

template <class Cell> constexpr int64_t steps(int64_t K) { return (K + STEP<Cell> - 1) / STEP<Cell>; }
template <class Cell> constexpr int64_t padded(int64_t K) { return steps<Cell>(K) * STEP<Cell>; }
template <class Cell> constexpr int64_t cells(int64_t K, int64_t N) { return (N + PANEL - 1) / PANEL * PANEL * padded<Cell>(K); }

#if defined(__AVX512BF16__)

inline __m512i pairs_of(vec a, vec b) {  // a0 b0 a1 b1 ...
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, narrow_two(a, b));
}

// 32 elements along a row, those past `lanes` zero.
inline __m512i load_pairs(const bf16* p, int64_t lanes) {
    if (lanes >= 32) return _mm512_loadu_si512(p);
    touch(p, int(lanes));
    return _mm512_maskz_loadu_epi16((1u << lanes) - 1, p);
}
inline __m512i load_pairs(const float* p, int64_t lanes) {
    if (lanes >= 32) return narrow_two(load(p), load(p + LANES));
    const int low = int(std::min<int64_t>(lanes, LANES));
    return narrow_two(load(p, low), lanes > LANES ? load(p + LANES, int(lanes) - LANES) : zero());
}

// Rows k and k + 1 of B, N wide, as step k / 2 at `to`: vector v of a step is `apart` cells behind vector v - 1.
template <class T>
inline void pack_step(const T* a, const T* b, int64_t N, bf16* to, int64_t apart) {
    lanes_of(N, [&](int64_t n, int lanes) {
        const vec second = b ? load(b + n, lanes) : zero();
        bf16* p = to + n / PANEL * apart + n % PANEL * 2;
        _mm512_storeu_si512(p, pairs_of(load(a + n, lanes), second));
    });
}

// B[k][n] = row(k)[n] into panels.
template <class Row>
void pack_across(const Row& row, int64_t K, int64_t N, bf16* panels) {
    for (int64_t k = 0; k < K; k += 2)
        pack_step(row(k), k + 1 < K ? row(k + 1) : nullptr, N, panels + k * PANEL, padded<bf16>(K) * PANEL);
}

// B[k][n] = W[n · K + k] into panels.
template <class T>
void pack_along(const T* W, int64_t K, int64_t N, bf16* panels) {
    for (int64_t n = 0; n < N; n += LANES) {
        bf16* to = panels + n / PANEL * PANEL * padded<bf16>(K) + n % PANEL * 2;
        for (int64_t k = 0; k < K; k += 32) {
            vec rows[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                rows[i] = n + i < N ? vec(load_pairs(W + (n + i) * K + k, K - k)) : zero();
            transpose(rows);
            const int64_t count = std::min<int64_t>(LANES, (K - k + 1) / 2);
            for (int64_t i = 0; i < count; i++) _mm512_storeu_ps(to + (k / 2 + i) * 2 * PANEL, rows[i]);
        }
    }
}

// One tile of two vectors; of C's columns only the first `columns` exist.
template <int ROWS, class T>
inline void pair_tile(int64_t count, const bf16* A, int64_t sm, int64_t sk, const bf16* B, T* C, int64_t ldc,
                      int64_t columns) {
    vec sum[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = zero();
    for (int64_t k = 0; k < count; k++, A += sk, B += 2 * PANEL) {
        const __m512bh b0 = __m512bh(_mm512_loadu_si512(B)), b1 = __m512bh(_mm512_loadu_si512(B + 32));
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            int pair;
            std::memcpy(&pair, A + r * sm, 4);
            const __m512bh a = __m512bh(_mm512_set1_epi32(pair));
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], a, b0);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], a, b1);
        }
    }
    const int low = int(std::min<int64_t>(columns, LANES)), high = int(columns - low);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++, C += ldc) {
        store(C, sum[r][0], low);
        if (high) store(C + LANES, sum[r][1], high);
    }
}

template <class T, int ROWS = TILE_ROWS>
inline void pair_rows(int64_t rows, int64_t count, const bf16* A, int64_t sm, int64_t sk, const bf16* B, T* C, int64_t ldc,
                      int64_t columns) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS) return pair_tile<ROWS>(count, A, sm, sk, B, C, ldc, columns);
        pair_rows<T, ROWS - 1>(rows, count, A, sm, sk, B, C, ldc, columns);
    }
}

template <class T>
void multiply_cells_block(int64_t M, int64_t N, int64_t K, const bf16* A, int64_t sm, int64_t sk, const bf16* panels, T* C,
                          int64_t ldc) {
    const int64_t tiles = (M + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t n = 0; n < N; n += PANEL)
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t m = M * t / tiles, count = M * (t + 1) / tiles - m;
            pair_rows(count, steps<bf16>(K), A + m * sm, sm, sk, panels + n * padded<bf16>(K), C + m * ldc + n, ldc,
                      std::min(PANEL, N - n));
        }
}

#endif

template <class T>
inline void pack_step(const T* a, const T*, int64_t N, float* to, int64_t apart) {
    lanes_of(N, [&](int64_t n, int lanes) { store(to + n / PANEL * apart + n % PANEL, load(a + n, lanes)); });
}

template <class Row>
void pack_across(const Row& row, int64_t K, int64_t N, float* panels) {
    for (int64_t k = 0; k < K; k++) pack_row(row(k), K, k, N, panels);
}

template <class T>
void pack_along(const T* W, int64_t K, int64_t N, float* panels) {
    pack_transposed(W, K, K, N, panels);
}

template <class T>
void multiply_cells_block(int64_t M, int64_t N, int64_t K, const float* A, int64_t sm, int64_t sk, const float* panels, T* C,
                          int64_t ldc) {
    multiply_packed(M, N, K, A, sm, sk, panels, C, ldc, false);
}

constexpr int64_t BLOCK_ROWS = 8 * TILE_ROWS;  // rows of A that stay in L2 beside the panels

// C [M, N] from packed panels. A is read in steps: a row begins sm cells behind the row before, a step sk behind a step.
template <class Cell, class T>
void multiply_cells(int64_t M, int64_t N, int64_t K, const Cell* A, int64_t sm, int64_t sk, const Cell* panels, T* C,
                    int64_t ldc) {
    for (int64_t first = 0; first < M; first += BLOCK_ROWS)
        multiply_cells_block(std::min(BLOCK_ROWS, M - first), N, K, A + first * sm, sm, sk, panels, C + first * ldc, ldc);
}

// ---- groups: rows [first[g], first[g + 1]) belong to group g ----

constexpr int64_t TASK_COLUMNS = 4 * PANEL, TASK_ROWS = 512;  // of C, what a task computes

struct Groups {
    const int64_t* first;  // [count + 1]
    int64_t count;

    int64_t begin(int64_t g) const { return first[g]; }
    int64_t rows(int64_t g) const { return first[g + 1] - first[g]; }
    int64_t longest() const {
        int64_t most = 0;
        for (int64_t g = 0; g < count; g++) most = std::max(most, rows(g));
        return most;
    }
};

// Calls body(g, m, rows, n, columns) for the tasks that cover every group's C of at most M rows and N columns.
template <class Body>
void tasks(int64_t groups, int64_t M, int64_t N, const Body& body) {
    const int64_t across = (N + TASK_COLUMNS - 1) / TASK_COLUMNS, down = (M + TASK_ROWS - 1) / TASK_ROWS;
    parallel_for(groups * across * down, [&](int64_t i) {
        const int64_t n = i / down % across * TASK_COLUMNS, m = i % down * TASK_ROWS;
        body(i / down / across, m, n, std::min(TASK_COLUMNS, N - n));
    });
}

// A's rows, or those of `index` where it is given, as cells, K wide: A itself where it is that already, else copies in
// `scratch`.
template <class Cell>
struct Left {
    const Cell* data;
    int64_t stride;
};

template <class A, class Cell = cell_of<A>>
Left<Cell> as_cells(const A* a, int64_t lda, const int64_t* index, int64_t rows, int64_t K) {
    const int64_t width = padded<Cell>(K);
    if constexpr (std::is_same_v<A, Cell>)
        if (width == K && !index) return {a, lda};
    Cell* copy = scratch<Cell>(1, rows * width);
    parallel_ranges(rows, 64, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            Cell* to = copy + r * width;
            const A* from = a + (index ? index[r] : r) * lda;
            if (width > K) put(to + K, 0.0f);
            lanes_of(K, [&](int64_t k, int lanes) { store(to + k, load(from + k, lanes), lanes); });
        }
    });
    return {copy, width};
}

// C [rows, N] = A · W_gᵀ with W [groups, N, K], or A · W_g with W [groups, K, N] where `across`.
template <class Cell, class W, class T>
void multiply_groups(const Groups& groups, Left<Cell> a, int64_t K, const W* weight, bool across, int64_t N, T* C) {
    tasks(groups.count, groups.longest(), N, [&](int64_t g, int64_t m, int64_t n, int64_t columns) {
        if (m >= groups.rows(g)) return;
        const int64_t rows = std::min(TASK_ROWS, groups.rows(g) - m), at = groups.begin(g) + m;
        Cell* panels = scratch<Cell>(0, cells<Cell>(K, columns));
        const W* w = weight + g * N * K;
        if (across)
            pack_across([&](int64_t k) { return w + k * N + n; }, K, columns, panels);
        else
            pack_along(w + n * K, K, columns, panels);
        multiply_cells(rows, columns, K, a.data + at * a.stride, a.stride, STEP<Cell>, panels, C + at * N + n, N);
    });
}

// The rows of A [.., M] in steps, for where they are the summed side: A itself where a cell is one value, else copies.
template <class A, class Cell = cell_of<A>>
Left<Cell> in_steps(const Groups& groups, const A* a, int64_t M) {
    if constexpr (std::is_same_v<A, Cell> && STEP<Cell> == 1) return {a, M};
    const int64_t wide = whole_vectors(M) * STEP<Cell>;  // cells of a step; no group shares one
    Cell* copy = scratch<Cell>(1, (groups.first[groups.count] / STEP<Cell> + groups.count) * wide);
    constexpr int64_t RUN = 64;
    const int64_t runs = (groups.longest() + RUN - 1) / RUN;
    parallel_for(groups.count * runs, [&](int64_t i) {
        const int64_t g = i / runs, end = std::min(groups.rows(g), (i % runs + 1) * RUN);
        const A* rows = a + groups.begin(g) * M;
        for (int64_t r = i % runs * RUN; r < end; r += STEP<Cell>)
            pack_step(rows + r * M, r + 1 < groups.rows(g) ? rows + (r + 1) * M : nullptr, M,
                      copy + (groups.begin(g) / STEP<Cell> + g + r / STEP<Cell>)*wide, PANEL * STEP<Cell>);
    });
    return {copy, wide};
}

// C [groups, M, N] = A_gᵀ · B_g, summed over each group's rows of A [.., M] and B [.., N]. Zero without rows. B's rows are
// those of `index` where it is given.
template <class A, class T>
void sum_groups(const Groups& groups, const A* left, int64_t M, const A* right, const int64_t* index, int64_t N, T* C) {
    using Cell = cell_of<A>;
    const Left<Cell> turned = in_steps(groups, left, M);
    const bool copied = (const void*)turned.data != left;
    tasks(groups.count, M, N, [&](int64_t g, int64_t m, int64_t n, int64_t columns) {
        const int64_t rows = std::min(TASK_ROWS, M - m), K = groups.rows(g);
        T* c = C + (g * M + m) * N + n;
        if (!K) {
            for (int64_t r = 0; r < rows; r++)
                lanes_of(columns, [&](int64_t i, int lanes) { store(c + r * N + i, zero(), lanes); });
            return;
        }
        Cell* panels = scratch<Cell>(0, cells<Cell>(K, columns));
        const int64_t begin = groups.begin(g);
        pack_across([&](int64_t k) { return right + (index ? index[begin + k] : begin + k) * N + n; }, K, columns, panels);
        const int64_t step = begin / STEP<Cell> + (copied ? g : 0);
        multiply_cells(rows, columns, K, turned.data + step * turned.stride + m * STEP<Cell>, STEP<Cell>, turned.stride, panels,
                       c, N);
    });
}

}  // namespace
