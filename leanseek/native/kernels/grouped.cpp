// Products of rows in groups, each group with a weight of its own (grouped_gemm.h).
#include "grouped_gemm.h"

// a [rows, K], its rows lda apart and taken by `index` where it is not null, times W_gᵀ of w [groups, N, K], or W_g of w
// [groups, K, N] where `across` -> out [rows, N]; FP32 where a is. shape: groups, N, K.
KERNEL grouped_product(int64_t dtype, int64_t weight_dtype, int64_t out_dtype, const int64_t* shape, const int64_t* first,
                       const void* a, int64_t lda, const int64_t* index, const void* w, int64_t across, void* out) {
    const Groups groups{first, shape[0]};
    const int64_t N = shape[1], K = shape[2], rows = first[groups.count];
    with_types(weight_dtype, out_dtype, [&](auto* weight_type, auto* out_type) {
        using W = ELEMENT(weight_type);
        using T = ELEMENT(out_type);
        if (dtype == BF16)
            multiply_groups(groups, as_cells((const bf16*)a, lda, index, rows, K), K, (const W*)w, across, N, (T*)out);
        else if constexpr (std::is_same_v<T, float>)
            multiply_groups(groups, as_cells((const float*)a, lda, index, rows, K), K, (const W*)w, across, N, (T*)out);
    });
}

// aᵀ · b over each group's rows of a [rows, M] and b [rows, N], b's taken by `index` where it is not null
// -> out [groups, M, N]; zero without rows. shape: groups, M, N.
KERNEL grouped_gradient(int64_t dtype, int64_t out_dtype, const int64_t* shape, const int64_t* first, const void* a,
                        const void* b, const int64_t* index, void* out) {
    const Groups groups{first, shape[0]};
    with_types(dtype, out_dtype, [&](auto* type, auto* out_type) {
        using A = ELEMENT(type);
        sum_groups(groups, (const A*)a, shape[1], (const A*)b, index, shape[2], (ELEMENT(out_type)*)out);
    });
}
