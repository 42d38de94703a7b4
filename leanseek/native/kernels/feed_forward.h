// Feed-forward networks over packed weights. Routed experts, shared experts and dense layers are all units of gate, up and
// down. A unit reads its weights once for all its rows.
#pragma once
#include <vector>

#include "panel.h"

namespace {

// down(silu(gate x) * up x) for `count` rows. A panel of `gated` holds 32 rows of gate, then the same 32 rows of up.
struct Unit {
    Matrix gated, down;
    long first, count;
};

// Units of one size with consecutive rows. `weight` scales a row's activation (null: 1).
struct Group {
    std::vector<Unit> units;
    const PreparedRows* x;
    const float* weight;
    PreparedRows* act;
    float* out;  // [rows][D]
};

// Turns one panel's products, out [m][64], into activations of rows from `row`: act = silu(gate x) * (up x) * weight.
inline void activate(const Group& group, const Unit& unit, long panel, long row, long m, float* out) {
    const long i0 = panel * HALF_ROWS, n = std::min(HALF_ROWS, unit.down.columns - i0);
    for (long j = 0; j < m; j++) {
        const vec weight = set1(group.weight ? group.weight[row + j] : 1.0f);
        float* gate = out + j * PANEL_ROWS;
        for (long i = 0; i < HALF_ROWS; i += LANES) {
            const vec g = load(gate + i), u = load(gate + HALF_ROWS + i);
            store(gate + i, g * sigmoid(g) * u * weight);
        }
        group.act->set(row + j, gate, i0, n);
    }
}

inline void feed_forward(const std::vector<Group>& groups) {
    struct Place {
        const Group* group;
        const Unit* unit;
    };
    std::vector<Place> places;
    std::vector<Product> up, down;
    for (const Group& group : groups)
        for (const Unit& unit : group.units) {
            const long D = unit.down.rows;
            places.push_back({&group, &unit});
            up.push_back({unit.gated, group.x->rows(unit.first), unit.count, nullptr, 0});
            down.push_back({unit.down, group.act->rows(unit.first), unit.count, group.out + unit.first * D, D});
        }
    for_panels(up, [&](const Product& product, long panel, long first, long m, float* out) {
        const auto [group, unit] = places[&product - up.data()];
        activate(*group, *unit, panel, unit->first + first, m, out);
    });
    multiply(down);
}

// Where the gate sent each token: [tokens, top_k].
struct Routing {
    const int64_t* indices;
    const float* weights;
    long tokens, top_k;
};

// The routed experts as a group: rows are sorted by expert, and `place` is each (token, choice) pair's row.
struct RoutedExperts {
    Matrix gated, down;
    long count;

    Group group(Arena& arena, const PreparedRows& x, bool x_is_bf16, const Routing& route, long*& place) const {
        const long pairs = route.tokens * route.top_k;
        long* first = arena.take<long>(count + 1);
        std::fill_n(first, count + 1, 0);
        for (long p = 0; p < pairs; p++) first[route.indices[p] + 1]++;
        for (long e = 0; e < count; e++) first[e + 1] += first[e];
        long* next = arena.take<long>(count);
        std::copy_n(first, count, next);
        place = arena.take<long>(pairs);
        float* weight = arena.take<float>(pairs);
        for (long p = 0; p < pairs; p++) {
            place[p] = next[route.indices[p]]++;
            weight[place[p]] = route.weights[p];
        }
        auto* rows = new (arena.take<PreparedRows>(1)) PreparedRows(arena, pairs, gated, x_is_bf16);
        auto* act = new (arena.take<PreparedRows>(1)) PreparedRows(arena, pairs, down, x_is_bf16);
        parallel_rows(pairs, gated.columns, [&](int64_t p) { rows->copy(place[p], x, p / route.top_k); });
        Group group{{}, rows, weight, act, arena.take<float>(pairs * down.rows)};
        for (long e = 0; e < count; e++)
            if (first[e + 1] > first[e])
                group.units.push_back({expert_of(gated, e), expert_of(down, e), first[e], first[e + 1] - first[e]});
        return group;
    }
};

}  // namespace
