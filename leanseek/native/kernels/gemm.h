// The FP32 matrix product under the FP32 kernels: C[m][n] (+)= Σ_k A[m·sm + k·sk] · B[k][n].
//
// A is read one scalar at a time and broadcast, so any strides work (transposed too); B and C are read in vectors along n.
// A tile of C stays in registers for the whole sum over k, which runs in order, so values of C do not depend on how M and
// N are split. It is fastest with B packed into panels, which a tile reads from start to end.
#pragma once
#include "kernels.h"

namespace {

// Rows of a tile that is two vectors wide: as many sums as leave registers for two vectors of B and one of A.
constexpr int TILE_ROWS = (REGISTERS - 4) / 2;
constexpr int64_t PANEL = 2 * LANES;  // columns of a packed panel

// One tile; only the first `columns` of C's columns exist.
template <int ROWS, int VECS, class T>
inline void tile(int64_t K, const float* __restrict A, int64_t sm, int64_t sk, const float* __restrict B, int64_t ldb,
                 T* __restrict C, int64_t ldc, int64_t columns, bool add) {
    vec sum[ROWS][VECS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) sum[r][v] = zero();
    for (int64_t k = 0; k < K; k++, A += sk, B += ldb) {
        vec b[VECS];
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) b[v] = load(B + v * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const vec a = set1(A[r * sm]);
#pragma GCC unroll 4
            for (int v = 0; v < VECS; v++) sum[r][v] = fma(a, b[v], sum[r][v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) {
            T* c = C + r * ldc + v * LANES;
            if (columns >= (v + 1) * LANES)
                store(c, add ? load(c) + sum[r][v] : sum[r][v]);
            else if (columns > v * LANES) {
                const int n = int(columns - v * LANES);
                store(c, add ? load(c, n) + sum[r][v] : sum[r][v], n);
            }
        }
}

template <int VECS, class T, int ROWS = TILE_ROWS>
inline void tile_rows(int64_t rows, int64_t K, const float* A, int64_t sm, int64_t sk, const float* B, int64_t ldb, T* C,
                      int64_t ldc, int64_t columns, bool add) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS) return tile<ROWS, VECS>(K, A, sm, sk, B, ldb, C, ldc, columns, add);
        tile_rows<VECS, T, ROWS - 1>(rows, K, A, sm, sk, B, ldb, C, ldc, columns, add);
    }
}

// All rows of one or two vectors of columns, split evenly into tiles of at most TILE_ROWS.
template <class T>
void column(int64_t M, int64_t K, const float* A, int64_t sm, int64_t sk, const float* B, int64_t ldb, T* C, int64_t ldc,
            int64_t columns, bool add) {
    const int64_t tiles = (M + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t m = M * t / tiles, rows = M * (t + 1) / tiles - m;
        if (columns > LANES)
            tile_rows<2>(rows, K, A + m * sm, sm, sk, B, ldb, C + m * ldc, ldc, columns, add);
        else
            tile_rows<1>(rows, K, A + m * sm, sm, sk, B, ldb, C + m * ldc, ldc, columns, add);
    }
}

// B [K, N] row by row, N a multiple of LANES.
[[maybe_unused]]
void multiply(int64_t M, int64_t N, int64_t K, const float* A, int64_t sm, int64_t sk, const float* B, int64_t ldb, float* C,
              int64_t ldc, bool add) {
    for (int64_t n = 0; n < N; n += PANEL)
        column(M, K, A + 0, sm, sk, B + n, ldb, C + n, ldc, std::min(PANEL, N - n), add);
}

// B in panels: panel n / PANEL is [K, PANEL]; columns past N are never used.
template <class T>
void multiply_packed(int64_t M, int64_t N, int64_t K, const float* A, int64_t sm, int64_t sk, const float* panels, T* C,
                     int64_t ldc, bool add) {
    for (int64_t n = 0; n < N; n += PANEL)
        column(M, K, A, sm, sk, panels + n * K, PANEL, C + n, ldc, std::min(PANEL, N - n), add);
}

inline int64_t panels_size(int64_t K, int64_t N) { return (N + PANEL - 1) / PANEL * PANEL * K; }

// Offset of column n of row k in panels of K rows.
inline int64_t in_panel(int64_t K, int64_t k, int64_t n) { return n / PANEL * PANEL * K + k * PANEL + n % PANEL; }

// Packs row k of B, N wide, into panels of K rows.
template <class T>
inline void pack_row(const T* row, int64_t K, int64_t k, int64_t N, float* panels) {
    lanes_of(N, [&](int64_t n, int lanes) { store(panels + in_panel(K, k, n), load(row + n, lanes)); });
}

// Packs B [K, N] into panels.
template <class T>
void pack(const T* B, int64_t ldb, int64_t K, int64_t N, float* panels) {
    for (int64_t k = 0; k < K; k++) pack_row(B + k * ldb, K, k, N, panels);
}

// Packs B[k][n] = W[n·ldw + k] into panels.
template <class T>
void pack_transposed(const T* W, int64_t ldw, int64_t K, int64_t N, float* panels) {
    for (int64_t n = 0; n < N; n += LANES)
        for (int64_t k = 0; k < K; k += LANES) {
            const int lanes = int(std::min<int64_t>(LANES, K - k));
            vec rows[LANES];
            for (int i = 0; i < LANES; i++) rows[i] = n + i < N ? load(W + (n + i) * ldw + k, lanes) : zero();
            transpose(rows);
            for (int i = 0; i < lanes; i++) store(panels + in_panel(K, k + i, n), rows[i]);
        }
}

}  // namespace
