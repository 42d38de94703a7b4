// BF16 products of rows in groups, each group with a weight of its own (bf16_gemm.h).
#include "bf16_gemm.h"

// a [rows, K] BF16, its rows lda apart, times W_gᵀ of w [groups, N, K], or W_g of w [groups, K, N] where `across`
// -> out [rows, N]. shape: groups, N, K.
KERNEL grouped_product(int64_t weight_dtype, int64_t out_dtype, const int64_t* shape, const int64_t* first, const void* a,
                       int64_t lda, const void* w, int64_t across, void* out) {
    const Groups groups{first, shape[0]};
    const int64_t N = shape[1], K = shape[2], rows = first[groups.count];
    const Left left = STEP == 2 && K % 2 == 0  // pairs lie there as they are
                          ? Left{(const Cell*)a, lda}
                          : copy_rows([&](int64_t r) { return (const bf16*)a + r * lda; }, rows, K,
                                      scratch<Cell>(1, left_size(rows, K)));
    with_types(weight_dtype, out_dtype, [&](auto* weight_type, auto* out_type) {
        grouped_product(groups, left, K, (const ELEMENT(weight_type)*)w, across, N, (ELEMENT(out_type)*)out);
    });
}

// aᵀ · b over each group's rows of a [rows, M] and b [rows, N], both BF16 -> out [groups, M, N]; zero without rows.
// shape: groups, M, N.
KERNEL grouped_gradient(int64_t out_dtype, const int64_t* shape, const int64_t* first, const void* a, const void* b,
                        void* out) {
    const Groups groups{first, shape[0]};
    const int64_t M = shape[1], N = shape[2];
    const bf16 *left = (const bf16*)a, *right = (const bf16*)b;
    Cell* turned = scratch<Cell>(1, turned_size(groups, M));
    with_type(out_dtype, [&](auto* type) {
        grouped_gradient(groups, [&](int64_t r) { return left + r * M; }, M, [&](int64_t r) { return right + r * N; }, N,
                         turned, (ELEMENT(type)*)out);
    });
}
