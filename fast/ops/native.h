// What the compiled CPU kernels share: vectors, threads.
//
// Plain C++17, no headers of PyTorch, no OpenMP flags: the same source builds with g++, clang++ and zig c++, for x86-64
// and Arm. Threads are those of PyTorch itself (its OpenMP runtime's GOMP_parallel, handed in as a pointer), so that
// no second pool of threads exists beside it.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

// The widest vector register that the compiler may use, in bytes.
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

typedef void (*ParallelRegion)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// How many threads to use, and how to start them; null: only the calling thread.
struct Threads {
    ParallelRegion start;
    int64_t count;
};

template <class Body>
struct ParallelLoop {
    const Body& body;
    int64_t n, grain;
    std::atomic<int64_t> next{0};

    static void work(void* self_) {
        auto& self = *static_cast<ParallelLoop*>(self_);
        for (int64_t begin; (begin = self.next.fetch_add(self.grain)) < self.n;)
            self.body(begin, begin + self.grain < self.n ? begin + self.grain : self.n);
    }
};

// Call body(begin, end) for pieces of 0 .. n-1 of at most `grain`, on all threads, in no particular order. Which thread
// takes which piece varies: a result must not depend on it.
template <class Body>
void parallel_for(const Threads* threads, int64_t n, int64_t grain, const Body& body) {
    ParallelLoop<Body> loop{body, n, grain < 1 ? 1 : grain};
    int64_t pieces = (n + loop.grain - 1) / loop.grain;
    int64_t count = threads->count < pieces ? threads->count : pieces;
    if (!threads->start || count <= 1)
        ParallelLoop<Body>::work(&loop);
    else
        threads->start(&ParallelLoop<Body>::work, &loop, (unsigned)count, 0);
}
