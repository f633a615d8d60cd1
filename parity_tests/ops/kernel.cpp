// Kernels for test_native.py, whose results are known.
#include "native.h"

// x, out (n): out[i] = a x[i] + b.
extern "C" void scaled(const Threads* threads, const double* x, double* out, int64_t n, int64_t a, double b) {
    parallel_for(threads, n, 7, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) out[i] = (double)a * x[i] + b;
    });
}

// out (rows, columns): out[i, j] = i + j, by a loop on threads inside a loop on threads.
extern "C" void nested(const Threads* threads, double* out, int64_t rows, int64_t columns) {
    parallel_for(threads, rows, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++)
            parallel_for(threads, columns, 3, [&](int64_t begin, int64_t end) {
                for (int64_t j = begin; j < end; j++) out[i * columns + j] = (double)(i + j);
            });
    });
}

// thread (n): for each piece a number that differs between threads. A piece waits (for at most 2^30 looks) until two
// threads have begun, unless only one was asked for.
extern "C" void who(const Threads* threads, int64_t* thread, int64_t n) {
    static thread_local char mine;
    std::atomic<int64_t> first{0}, others{0};
    parallel_for(threads, n, 1, [&](int64_t i, int64_t) {
        int64_t me = (int64_t)(intptr_t)&mine, none = 0;
        if (!first.compare_exchange_strong(none, me) && none != me) others = 1;
        for (int64_t looks = 0; threads->start && threads->count > 1 && !others && looks < (1 << 30); looks++) {}
        thread[i] = me;
    });
}
