// Feed-forward networks over stored weights: the routed experts, shared experts and dense layers, all as units of
// gate, up and down. Each unit's weights are read once for all the rows that it serves.
#pragma once
#include <vector>

#include "product.h"

namespace {

// down(silu(gate x) * up x) for rows [first, first + count) of the unit's group, which share their kind of weights.
struct Unit {
    Matrix gate, up, down;
    long first, count;
};

// Units of one size whose rows lie one after the other. `weight` scales a row's activation (null: 1).
struct Group {
    std::vector<Unit> units;
    const PreparedRows* x;
    const float* weight;
    PreparedRows* act;
    float* out;  // [rows][D]
};

inline Matrix row_range(const Matrix& w, long first, long rows) {  // of FP8 only where 128 divides `first`
    Matrix part = w;
    const long size = w.kind == FP32 ? 4 : w.kind == BF16 ? 2 : 1;
    part.data = static_cast<const char*>(w.data) + first * w.columns * size;
    part.rows = rows;
    if (w.kind == FP8) part.scale += first / BLOCK * ((w.columns + BLOCK - 1) / BLOCK);
    if (w.kind == INT8) part.scale += first;
    return part;
}

inline Matrix expert_of(const Matrix& stacked, long e) {  // one expert's matrix of a stack [E, rows, columns]
    Matrix one = stacked;
    const long size = stacked.kind == FP32 ? 4 : stacked.kind == BF16 ? 2 : 1;
    one.data = static_cast<const char*>(stacked.data) + e * stacked.rows * stacked.columns * size;
    if (stacked.kind == FP8) one.scale += e * ((one.rows + BLOCK - 1) / BLOCK) * ((one.columns + BLOCK - 1) / BLOCK);
    if (stacked.kind == INT8) one.scale += e * one.rows;
    return one;
}

// Hidden units [i0, i0 + n) of one unit: act = silu(gate x) * (up x) * weight.
inline void activate(const Group& group, const Unit& unit, long gate_row, long up_row, long i0, long n) {
    constexpr long ROWS = 64;
    float* gate = scratch(7, 2 * ROWS * TASK_ROWS);
    float* up = gate + ROWS * TASK_ROWS;
    for (long p = 0; p < unit.count; p += ROWS) {
        const long first = unit.first + p, m = std::min(ROWS, unit.count - p);
        multiply_rows(unit.gate, group.x->rows(first), m, gate, TASK_ROWS, gate_row + i0, gate_row + i0 + n);
        multiply_rows(unit.up, group.x->rows(first), m, up, TASK_ROWS, up_row + i0, up_row + i0 + n);
        for (long j = 0; j < m; j++) {
            const vec weight = set1(group.weight ? group.weight[first + j] : 1.0f);
            lanes_of(n, [&](int64_t i, int lanes) {
                const vec g = load(gate + j * TASK_ROWS + i, lanes), u = load(up + j * TASK_ROWS + i, lanes);
                store(gate + j * TASK_ROWS + i, g * sigmoid(g) * u * weight, lanes);
            });
            group.act->set(first + j, gate + j * TASK_ROWS, i0, n);
        }
    }
}

// A stacked gate_up matrix holds up's rows after gate's: both `gate` and `up` of a unit are then that matrix.
inline long hidden_size(const Unit& unit) { return unit.down.columns; }
inline bool stacked(const Unit& unit) { return unit.gate.data == unit.up.data; }

struct Task {
    const Group* group;
    const Unit* unit;
    long start;
};

// Tasks of TASK_ROWS weight rows, the units with most rows first so that threads end together.
template <class Size, class Body>
void unit_tasks(const std::vector<Group>& groups, const Size& size, const Body& body) {
    std::vector<Task> tasks;
    for (const Group& group : groups)
        for (const Unit& unit : group.units)
            for (long i = 0; i < size(unit); i += TASK_ROWS) tasks.push_back({&group, &unit, i});
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.unit->count > b.unit->count; });
    parallel_for(int64_t(tasks.size()), [&](int64_t i) {
        const Task& task = tasks[i];
        body(*task.group, *task.unit, task.start, std::min(TASK_ROWS, size(*task.unit) - task.start));
    });
}

inline void feed_forward(const std::vector<Group>& groups) {
    unit_tasks(groups, hidden_size, [](const Group& group, const Unit& unit, long i, long n) {
        activate(group, unit, 0, stacked(unit) ? hidden_size(unit) : 0, i, n);
    });
    unit_tasks(groups, [](const Unit& unit) { return unit.down.rows; },
               [](const Group& group, const Unit& unit, long d, long n) {
                   multiply_rows(unit.down, group.act->rows(unit.first), unit.count,
                                 group.out + unit.first * unit.down.rows + d, unit.down.rows, d, d + n);
               });
}

// Where the gate sent each token: [tokens, top_k].
struct Routing {
    const int64_t* indices;
    const float* weights;
    long tokens, top_k;
};

// The routed experts as a group: rows sorted by expert, `place` of each (token, choice) pair among them.
struct RoutedExperts {
    Matrix gate_up, down;
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
        auto* rows = new (arena.take<PreparedRows>(1)) PreparedRows(arena, pairs, gate_up, x_is_bf16);
        auto* act = new (arena.take<PreparedRows>(1)) PreparedRows(arena, pairs, down, x_is_bf16);
        parallel_for(pairs, [&](int64_t p) { rows->copy(place[p], x, p / route.top_k); });
        Group group{{}, rows, weight, act, arena.take<float>(pairs * down.rows)};
        for (long e = 0; e < count; e++)
            if (first[e + 1] > first[e]) {
                const Matrix both = expert_of(gate_up, e);
                group.units.push_back({both, both, expert_of(down, e), first[e], first[e + 1] - first[e]});
            }
        return group;
    }
};

}  // namespace
