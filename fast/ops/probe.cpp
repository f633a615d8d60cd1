// What a compiler makes of its flags: native.py builds and runs this before it trusts it with a kernel.
#include <vector>

#include "native.h"

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));

// out (n): out[i] = 2 i + 1, computed in vectors by all threads.
extern "C" void probe(const Threads* threads, float* out, int64_t n) {
    constexpr int64_t lanes = VECTOR_BYTES / sizeof(float);
    parallel_for(threads, n, lanes, [&](int64_t begin, int64_t end) {
        std::vector<float> numbers(lanes);
        for (int64_t i = 0; i < lanes; i++) numbers[i] = (float)(begin + i);
        Vector x;
        std::memcpy(&x, numbers.data(), sizeof x);
        x = x * 2.0f + 1.0f;
        std::memcpy(out + begin, &x, (end - begin) * sizeof(float));
    });
}

extern "C" const char* features() {
#if defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__AVX__)
    return "AVX";
#elif defined(__SSE2__)
    return "SSE2";
#elif defined(__ARM_FEATURE_SVE)
    return "NEON, SVE";
#elif defined(__ARM_NEON)
    return "NEON";
#else
    return "no vector unit known to native.h";
#endif
}
