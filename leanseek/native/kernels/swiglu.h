// SwiGLU's backward, a vector at a time: from the gradient d of w · silu(g) · u.
#pragma once
#include "simd.h"

struct SwiGLU {
    vec act, dgate, dup, dweight;  // the activation again, times w; the gradients of g and u, and w's part of a sum

    SwiGLU(vec g, vec u, vec d, vec w) {
        const vec s = sigmoid(g), silu = g * s, plain = silu * u, dplain = d * w;
        act = plain * w;
        dweight = d * plain;
        dgate = dplain * u * fma(silu, set1(1.0f) - s, s);  // silu' = s + silu (1 - s)
        dup = dplain * silu;
    }
};
