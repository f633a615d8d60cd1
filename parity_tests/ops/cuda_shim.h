// Runs the kernels of fast/cuda/*.cu on a CPU, one thread after the other: included before a source, it makes plain C++
// (17) of it. Enough for kernels without shared memory, atomics or synchronisation.
#pragma once

#include <cmath>
#include <tuple>
#include <utility>

#define __global__
#define __device__

struct Place {
    unsigned x = 0, y = 0, z = 0;
};
static thread_local Place threadIdx, blockIdx, blockDim;

static double __dmul_rn(double a, double b) { return a * b; }  // compile with -ffp-contract=off
static double __dadd_rn(double a, double b) { return a + b; }

template <class... A, std::size_t... I>
void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_const_t<A> *>(arguments[I])...);
}

// As cudaLaunchKernel: arguments[i] points to the kernel's argument i.
template <class... A>
void launch(void (*kernel)(A...), unsigned blocks, unsigned threads, void **arguments) {
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) {
            call(kernel, arguments, std::index_sequence_for<A...>{});
        }
    }
}
