// We use the OpenMP threads that torch already runs, because a second pool would compete with them for the cores.
// library.py finds torch's OpenMP library among the loaded ones; we declare four of its functions and link nothing.
#pragma once
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_max_threads(void);  // follows torch.set_num_threads
int omp_get_thread_num(void);
int omp_in_parallel(void);
}

constexpr int64_t MOST_THREADS = 256;

// When other processes are busy, Linux may put two threads of the pool on one CPU and leave them there. Each then spins
// through its time slice waiting for the other, which costs milliseconds per parallel region. A thread that has moved to a
// CPU which another of our threads uses therefore moves on to a free one. It is not pinned there.
inline std::atomic<int> last_cpu[MOST_THREADS];  // where each thread was when it last began a region, plus one

static void keep_apart(int64_t own, int64_t threads) {
    const int here = sched_getcpu() + 1;
    if (last_cpu[own].load(std::memory_order_relaxed) == here) return;
    last_cpu[own].store(here, std::memory_order_relaxed);
    cpu_set_t allowed, without;
    bool shared = false;
    for (int64_t t = 0; t < threads; t++) shared |= t != own && last_cpu[t].load(std::memory_order_relaxed) == here;
    if (!shared || sched_getaffinity(0, sizeof allowed, &allowed)) return;
    without = allowed;
    for (int64_t t = 0; t < threads; t++)
        if (const int cpu = last_cpu[t].load(std::memory_order_relaxed)) CPU_CLR(cpu - 1, &without);
    if (!CPU_COUNT(&without) || sched_setaffinity(0, sizeof without, &without)) return;
    sched_setaffinity(0, sizeof allowed, &allowed);
    last_cpu[own].store(sched_getcpu() + 1, std::memory_order_relaxed);
}

// Calls body(i) once for every i in [0, n). A thread works through its own share from front to back, so that memory laid
// out in the order of i streams, and then helps with the others' shares. Which thread runs which i, and in what order, is
// not fixed; results must not depend on it.
template <class Body>
static void parallel_for(int64_t n, const Body& body) {
    const int64_t threads = std::min<int64_t>({n, MOST_THREADS, omp_in_parallel() ? 1 : omp_get_max_threads()});
    if (threads <= 1) {
        for (int64_t i = 0; i < n; i++) body(i);
        return;
    }
    struct alignas(64) Next {
        std::atomic<int64_t> i;
    };
    struct Shared {
        const Body& body;
        int64_t n, threads;
        Next next[MOST_THREADS];
    } shared{body, n, threads, {}};
    for (int64_t t = 0; t < threads; t++) shared.next[t].i = n * t / threads;
    const auto work = [](void* data) {
        auto& s = *static_cast<Shared*>(data);
        const int64_t own = omp_get_thread_num();
        keep_apart(own, s.threads);
        for (int64_t turn = 0; turn < s.threads; turn++) {
            const int64_t share = (own + turn) % s.threads, stop = s.n * (share + 1) / s.threads;
            for (int64_t i = s.next[share].i++; i < stop; i = s.next[share].i++) s.body(i);
        }
    };
    GOMP_parallel(work, &shared, unsigned(threads), 0);
}

// Calls body(begin, end) over [0, n) in ranges of `grain`, the same ranges for any number of threads.
template <class Body>
static void parallel_ranges(int64_t n, int64_t grain, const Body& body) {
    parallel_for((n + grain - 1) / grain, [&](int64_t i) { body(i * grain, std::min(n, (i + 1) * grain)); });
}

// Like parallel_for, for rows of only `values` simple steps each: it wakes threads only if there are many rows.
template <class Body>
static void parallel_rows(int64_t n, int64_t values, const Body& body) {
    constexpr int64_t WORTH = 16384;
    parallel_ranges(n, std::max<int64_t>(1, WORTH / std::max<int64_t>(1, values)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) body(i);
    });
}
