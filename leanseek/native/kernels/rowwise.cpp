// Operations on rows, forward and backward: RMSNorm, SwiGLU, RoPE. One pass over memory each; arithmetic in FP32.
#include <cmath>
#include <vector>

#include "kernels.h"
#include "swiglu.h"

namespace {

constexpr int64_t ROWS = 64;  // rows a task takes; partial sums are per task, so the cut is part of the result

}  // namespace

// y = x · rstd · weight, rstd = 1 / sqrt(mean(x²) + eps). x [rows, width] with stride ldx; y contiguous; rstd [rows].
KERNEL rms_norm(int64_t dtype, const void* x_, int64_t ldx, const float* weight, void* y_, float* rstd, int64_t rows,
                int64_t width, float eps) {
    with_type(dtype, [&](auto* type) {
        using T = ELEMENT(type);
        const T* x = static_cast<const T*>(x_);
        T* y = static_cast<T*>(y_);
        parallel_ranges(rows, ROWS, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; row++) {
                const T* in = x + row * ldx;
                vec squares = zero();
                lanes_of(width, [&](int64_t i, int n) {
                    const vec a = load(in + i, n);
                    squares = fma(a, a, squares);
                });
                const float scale = 1.0f / std::sqrt(reduce_add(squares) / float(width) + eps);
                rstd[row] = scale;
                lanes_of(width, [&](int64_t i, int n) {
                    store(y + row * width + i, load(in + i, n) * set1(scale) * load(weight + i, n), n);
                });
            }
        });
    });
}

// dx = rstd (w g - x rstd² mean(w g x)), dweight = sum over rows of g x rstd. g and dx contiguous.
KERNEL rms_norm_backward(int64_t dtype, const void* x_, int64_t ldx, const float* weight, const float* rstd,
                         const void* grad_, void* dx_, float* dweight, int64_t rows, int64_t width) {
    with_type(dtype, [&](auto* type) {
        using T = ELEMENT(type);
        const T *x = static_cast<const T*>(x_), *grad = static_cast<const T*>(grad_);
        T* dx = static_cast<T*>(dx_);
        const int64_t tasks = (rows + ROWS - 1) / ROWS;
        std::vector<float> partial(tasks * width, 0.0f);  // dweight of each task's rows
        parallel_for(tasks, [&](int64_t task) {
            float* dw = partial.data() + task * width;
            for (int64_t row = task * ROWS; row < std::min(rows, (task + 1) * ROWS); row++) {
                const T *in = x + row * ldx, *g = grad + row * width;
                vec dots = zero();
                lanes_of(width, [&](int64_t i, int n) {
                    dots = fma(load(g + i, n) * load(weight + i, n), load(in + i, n), dots);
                });
                const vec scale = set1(rstd[row]);
                const vec pull = set1(rstd[row] * rstd[row] * reduce_add(dots) / float(width));
                lanes_of(width, [&](int64_t i, int n) {
                    const vec a = load(in + i, n), b = load(g + i, n);
                    store(dx + row * width + i, scale * fnma(a, pull, b * load(weight + i, n)), n);
                    store(dw + i, fma(b * a, scale, load(dw + i, n)), n);
                });
            }
        });
        std::fill_n(dweight, width, 0.0f);
        for (int64_t task = 0; task < tasks; task++)
            for (int64_t i = 0; i < width; i++) dweight[i] += partial[task * width + i];
    });
}

// out [rows, I] = w · silu(gate) · up: gate and up with rows `stride` apart, w [rows] or null.
KERNEL swiglu(int64_t dtype, const void* gate_, const void* up_, int64_t stride, const float* weights, void* out_,
              int64_t rows, int64_t I) {
    with_type(dtype, [&](auto* type) {
        using T = ELEMENT(type);
        parallel_rows(rows, I, [&](int64_t row) {
            const T *gate = (const T*)gate_ + row * stride, *up = (const T*)up_ + row * stride;
            T* out = (T*)out_ + row * I;
            const vec w = set1(weights ? weights[row] : 1.0f);
            lanes_of(I, [&](int64_t i, int lanes) {
                const vec g = load(gate + i, lanes);
                store(out + i, g * sigmoid(g) * load(up + i, lanes) * w, lanes);
            });
        });
    });
}

// From grad [rows, I]: dgate and dup with gate's and up's stride, and unless null out [rows, I] again and dweights [rows].
KERNEL swiglu_backward(int64_t dtype, const void* gate_, const void* up_, int64_t stride, const float* weights,
                       const void* grad_, void* dgate_, void* dup_, void* out_, float* dweights, int64_t rows, int64_t I) {
    with_type(dtype, [&](auto* type) {
        using T = ELEMENT(type);
        parallel_rows(rows, I, [&](int64_t row) {
            const T *gate = (const T*)gate_ + row * stride, *up = (const T*)up_ + row * stride;
            const T* grad = (const T*)grad_ + row * I;
            T *dgate = (T*)dgate_ + row * stride, *dup = (T*)dup_ + row * stride;
            const vec w = set1(weights ? weights[row] : 1.0f);
            vec dw = zero();
            lanes_of(I, [&](int64_t i, int lanes) {
                const SwiGLU s(load(gate + i, lanes), load(up + i, lanes), load(grad + i, lanes), w);
                dw = dw + s.dweight;
                if (out_) store((T*)out_ + row * I + i, s.act, lanes);
                store(dgate + i, s.dgate, lanes);
                store(dup + i, s.dup, lanes);
            });
            if (dweights) dweights[row] = reduce_add(dw);
        });
    });
}

// out [tokens, D]: the sum of rows [.., D], stride ldr, at the K places of each token, in their order; -1 is no row.
KERNEL combine_rows(int64_t dtype, const void* rows_, int64_t ldr, const int64_t* place, int64_t tokens, int64_t K, int64_t D,
                    void* out_) {
    with_type(dtype, [&](auto* type) {
        using T = ELEMENT(type);
        const T* rows = (const T*)rows_;
        parallel_rows(tokens, K * D, [&](int64_t token) {
            lanes_of(D, [&](int64_t d, int lanes) {
                vec sum = zero();
                for (int64_t k = 0; k < K; k++) {
                    const int64_t row = place[token * K + k];
                    if (row >= 0) sum = sum + load(rows + row * ldr + d, lanes);
                }
                store((T*)out_ + token * D + d, sum, lanes);
            });
        });
    });
}

// Rotation of pairs by an angle. `split` holds all first halves of the pairs, then all second halves; `paired` holds pair i
// at (2i, 2i + 1) when interleaved, else at (i, i + R/2). Forward reads paired and writes split; its transpose, which is
// the inverse rotation, reads split and writes paired. x [batch, time, heads, R] by strides, out contiguous.
KERNEL rotate(int64_t dtype, const void* x_, const int64_t* strides, const float* cosine, const float* sine,
              int64_t angle_batch, void* out_, const int64_t* sizes, int64_t interleave, int64_t transpose) {
    const int64_t B = sizes[0], T_ = sizes[1], H = sizes[2], half = sizes[3] / 2;
    const int64_t step = interleave ? 2 : 1, second = interleave ? 1 : half;  // where a pair lies in `paired`
    with_type(dtype, [&](auto* type) {
        using T = ELEMENT(type);
        const T* x = static_cast<const T*>(x_);
        T* out = static_cast<T*>(out_);
        parallel_ranges(B * T_, ROWS, [&](int64_t begin, int64_t end) {
            for (int64_t bt = begin; bt < end; bt++) {
                const int64_t b = bt / T_, t = bt % T_;
                const float *c = cosine + b * angle_batch + t * half, *s = sine + b * angle_batch + t * half;
                for (int64_t h = 0; h < H; h++) {
                    const T* in = x + b * strides[0] + t * strides[1] + h * strides[2];
                    T* to = out + (bt * H + h) * 2 * half;
                    for (int64_t i = 0; i < half; i++) {
                        if (!transpose) {
                            const float a = to_float(in[i * step]), d = to_float(in[i * step + second]);
                            put(to + i, a * c[i] - d * s[i]);
                            put(to + half + i, d * c[i] + a * s[i]);
                        } else {
                            const float a = to_float(in[i]), d = to_float(in[half + i]);
                            put(to + i * step, a * c[i] + d * s[i]);
                            put(to + i * step + second, d * c[i] - a * s[i]);
                        }
                    }
                }
            }
        });
    });
}

// A step of AdamW with moments in BF16, computed in FP32, over n values. rate = lr / (1 - beta1^t), root = 1 / sqrt(1 -
// beta2^t), keep = 1 - lr · decay.
KERNEL adamw(float* weight, const float* grad, bf16* exp_avg, bf16* exp_avg_sq, int64_t n, float beta1, float beta2,
             float rate, float root, float eps, float keep) {
    parallel_ranges(n, 1 << 15, [&](int64_t begin, int64_t end) {
        lanes_of(end - begin, [&](int64_t i, int lanes) {
            const int64_t at = begin + i;
            const vec g = load(grad + at, lanes), m = load(exp_avg + at, lanes), v = load(exp_avg_sq + at, lanes);
            const vec mean = fma(set1(1.0f - beta1), g - m, m), square = fma(set1(1.0f - beta2), g * g - v, v);
            const vec step = set1(rate) * mean / fma(sqrt(square), set1(root), set1(eps));
            store(weight + at, load(weight + at, lanes) * set1(keep) - step, lanes);
            store(exp_avg + at, mean, lanes);
            store(exp_avg_sq + at, square, lanes);
        });
    });
}
