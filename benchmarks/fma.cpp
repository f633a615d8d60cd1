// The processor's limit: multiply-adds on registers alone, on all threads.
#include "native.h"

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));

// Each task does 12 chains of `steps` dependent multiply-adds of whole vectors, 2 * 12 * steps * lanes FLOPs.
// out (tasks): their sums, so that no compiler leaves them out; lanes (1): floats in a vector.
extern "C" void multiply_add(const Threads* threads, float* out, int64_t* lanes, int64_t tasks, int64_t steps) {
    constexpr int chains = 12;  // more than latency x units of any processor of today
    *lanes = VECTOR_BYTES / sizeof(float);
    parallel_for(threads, tasks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; task++) {
            Vector sums[chains] = {}, factor = {}, term = {};
            for (int i = 0; i < chains; i++) sums[i] += 1.0f + i;  // equal chains would be computed once
            factor += 0.999f + 1e-9f * task;
            term += 0.001f;
            for (int64_t step = 0; step < steps; step++)
#pragma GCC unroll 12
                for (int i = 0; i < chains; i++) sums[i] = sums[i] * factor + term;
            Vector total = {};
            for (auto& sum : sums) total += sum;
            out[task] = total[0];
        }
    });
}
