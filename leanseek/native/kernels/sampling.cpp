// Samples a token from each row of logits: softmax with temperature, top-k, top-p and min-p, then a race with noise per
// token id. Rows are not sorted: a histogram of the weights' leading bits finds the bucket of a cut, and only that bucket
// is sorted.
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"

namespace {

constexpr int SHIFT = 18;                            // shifts a weight's bits so that 5 of its mantissa remain
constexpr int BUCKETS = (0x3f800000 >> SHIFT) + 1;   // weights are in [0, 1]

struct Bucket {
    double mass;
    int64_t count;
};

struct Entry {
    float weight;
    int64_t id;
};

// The last token kept, in order of falling weight and, for equal weights, rising id.
struct Cut {
    float weight = 0.0f;
    int64_t id = std::numeric_limits<int64_t>::max();
    bool keeps(float w, int64_t i) const { return w > weight || (w == weight && i <= id); }
};

int bucket_of(float weight) {
    uint32_t bits;
    std::memcpy(&bits, &weight, 4);
    return std::min(int(bits >> SHIFT), BUCKETS - 1);
}

// A number in (0, 1) for a token id: splitmix64, as in ops/sampling.py.
double uniform(uint64_t key, int64_t id) {
    uint64_t z = uint64_t(id) * 0x9E3779B97F4A7C15u + key;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return (double(z >> 12) + 0.5) * 0x1p-52;
}

// Walks down from the likeliest token. `stops(mass, count)` says whether the tokens so far are enough; the cut comes after
// the first token for which they are. `mass` returns the sum of the weights that are kept.
template <class Stops>
Cut walk(const float* weights, int64_t vocab, const std::vector<Bucket>& buckets, const Stops& stops, double& mass) {
    mass = 0;
    int64_t count = 0;
    int b = BUCKETS - 1;
    for (; b >= 0 && !stops(mass + buckets[b].mass, count + buckets[b].count); b--) {
        mass += buckets[b].mass;
        count += buckets[b].count;
    }
    if (b < 0) return {};
    std::vector<Entry> inside;
    inside.reserve(size_t(buckets[b].count));
    for (int64_t i = 0; i < vocab; i++)
        if (weights[i] > 0 && bucket_of(weights[i]) == b) inside.push_back({weights[i], i});
    std::sort(inside.begin(), inside.end(), [](const Entry& a, const Entry& c) {
        return a.weight > c.weight || (a.weight == c.weight && a.id < c.id);
    });
    for (const Entry& entry : inside) {
        mass += entry.weight;
        count++;
        if (stops(mass, count)) return {entry.weight, entry.id};
    }
    return inside.empty() ? Cut{} : Cut{inside.back().weight, inside.back().id};  // the two sums differ in their last bits
}

// The cut of top-k, and of top-p within it.
Cut cut_of(const float* weights, int64_t vocab, int64_t top_k, float top_p) {
    if (top_k >= vocab && top_p >= 1.0f) return {};
    std::vector<Bucket> buckets(BUCKETS, Bucket{0.0, 0});
    double mass = 0;
    for (int64_t i = 0; i < vocab; i++) {
        if (weights[i] <= 0) continue;
        Bucket& bucket = buckets[bucket_of(weights[i])];
        bucket.mass += weights[i];
        bucket.count++;
        mass += weights[i];
    }
    Cut cut;
    if (top_k < vocab)
        cut = walk(weights, vocab, buckets, [&](double, int64_t count) { return count >= top_k; }, mass);
    if (top_p < 1.0f) {
        const double enough = double(top_p) * mass;
        cut = walk(weights, vocab, buckets, [&](double before, int64_t) { return before >= enough; }, mass);
    }
    return cut;
}

// argmin of -log(u) / weight over the tokens kept, which is argmax of log p + Gumbel noise.
int64_t race(const float* weights, int64_t vocab, const Cut& cut, float min_p, uint64_t key, int64_t otherwise) {
    double best = std::numeric_limits<double>::infinity();
    int64_t winner = otherwise;
    for (int64_t i = 0; i < vocab; i++) {
        const float w = weights[i];
        if (w <= 0 || w < min_p || !cut.keeps(w, i)) continue;
        const double u = uniform(key, i);
        if (1.0 - u >= best * w) continue;  // -log(u) >= 1 - u: most need no logarithm
        const double score = -std::log(u) / w;
        if (score < best) {
            best = score;
            winner = i;
        }
    }
    return winner;
}

}  // namespace

// Samples tokens [rows] from logits [rows, vocab] with stride ld. temperature 0 is greedy; top_k = vocab, top_p = 1 and
// min_p = 0 cut nothing. A row's token depends only on that row and its parameters. NaN counts as -inf; if the largest logit
// is infinite, the first one that large is the token.
KERNEL sample_rows(const float* logits, int64_t ld, int64_t rows, int64_t vocab, const float* temperature,
                   const int64_t* top_k, const float* top_p, const float* min_p, const int64_t* keys, int64_t* tokens) {
    parallel_for(rows, [&](int64_t row) {
        const float* in = logits + row * ld;
        vec most = set1(-std::numeric_limits<float>::infinity());
        lanes_of(vocab, [&](int64_t i, int n) { most = max(keep_first(load(in + i, n), n, most), most); });  // NaN: max returns `most`
        const float top = reduce_max(most);
        const int64_t likeliest = std::find(in, in + vocab, top) - in;  // vocab if all are NaN
        if (temperature[row] == 0.0f || !std::isfinite(top)) {
            tokens[row] = likeliest % vocab;
            return;
        }
        float* weights = scratch(0, vocab);
        const vec inverse = set1(1.0f / std::max(temperature[row], 1e-6f)), lowest = set1(-200.0f);  // e^-200 is 0
        lanes_of(vocab, [&](int64_t i, int n) {
            store(weights + i, exp(max((load(in + i, n) - set1(top)) * inverse, lowest)), n);
        });
        const Cut cut = cut_of(weights, vocab, top_k[row], top_p[row]);
        tokens[row] = race(weights, vocab, cut, min_p[row], uint64_t(keys[row]), likeliest);
    });
}

// finite [rows]: whether every logit of a row of [rows, vocab] is finite.
KERNEL finite_rows(const float* logits, int64_t ld, int64_t rows, int64_t vocab, uint8_t* finite) {
    parallel_rows(rows, vocab, [&](int64_t row) {
        vec sum = zero();  // adds 0 * logit, which is 0 unless the logit is infinite or NaN
        lanes_of(vocab, [&](int64_t i, int n) { sum = fma(load(logits + row * ld + i, n), zero(), sum); });
        finite[row] = reduce_add(sum) == 0.0f;
    });
}
