// Vectors and elementary functions that the compiled CPU kernels of merging and sampling share.
//
// A vector is as wide as the processor's registers (VECTOR_BYTES); operators, comparisons and ?: act lane by lane.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "native.h"

#define INLINE inline __attribute__((always_inline))

template <class T, int BYTES = VECTOR_BYTES>
struct VectorOf {
    typedef T type __attribute__((vector_size(BYTES)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int64_t LANES = VECTOR_BYTES / sizeof(T);

template <class T>
INLINE Vector<T> load(const T* from) {
    Vector<T> v;
    memcpy(&v, from, sizeof v);
    return v;
}

template <class T>
INLINE void store(T* to, const Vector<T>& v) {
    memcpy(to, &v, sizeof v);
}

template <class T>
INLINE void add(T* to, const Vector<T>& v) {
    store<T>(to, load<T>(to) + v);
}

template <class T, int BYTES>
INLINE T sum_lanes(const typename VectorOf<T, BYTES>::type& v) {
    if constexpr (BYTES == sizeof(T)) {
        return v[0];
    } else {
        typename VectorOf<T, BYTES / 2>::type low, high;
        memcpy(&low, &v, sizeof low);
        memcpy(&high, (const char*)&v + sizeof low, sizeof high);
        return sum_lanes<T, BYTES / 2>(low + high);
    }
}

// Sum of the lanes.
template <class T>
INLINE T sum_lanes(const Vector<T>& v) {
    return sum_lanes<T, VECTOR_BYTES>(v);
}

// The smallest multiple of the vector's lanes that holds n numbers.
template <class T>
INLINE int64_t padded(int64_t n) {
    return (n + LANES<T> - 1) / LANES<T> * LANES<T>;
}

// Of a floating type: the integer as wide, bits of the fraction, exponent of 1, largest exponent used, terms of series.
template <class T>
struct Format;
template <>
struct Format<float> {
    typedef int32_t Bits;
    static constexpr int FRACTION = 23, ONE = 127, LARGEST = 100, LOG_TERMS = 5, EXP_TERMS = 7;
};
template <>
struct Format<double> {
    typedef int64_t Bits;
    static constexpr int FRACTION = 52, ONE = 1023, LARGEST = 1000, LOG_TERMS = 11, EXP_TERMS = 13;
};
template <class T>
using Integers = Vector<typename Format<T>::Bits>;

constexpr double LN_2 = 0.6931471805599453;

template <class T>
INLINE Vector<T> splat(T x) {
    return Vector<T>{} + x;
}

template <class T>
INLINE Vector<T> minimum(const Vector<T>& a, const Vector<T>& b) {
    return a < b ? a : b;
}

// b where a is not a number
template <class T>
INLINE Vector<T> maximum(const Vector<T>& a, const Vector<T>& b) {
    return a > b ? a : b;
}

template <class T>
INLINE Vector<T> square_root(const Vector<T>& v) {
    T lanes[LANES<T>];
    memcpy(lanes, &v, sizeof lanes);
    for (int i = 0; i < LANES<T>; i++) lanes[i] = std::sqrt(lanes[i]);  // one instruction
    return load<T>(lanes);
}

// The nearest whole number, half to even, of |x| < 2^(FRACTION - 1): where only whole numbers fit, adding rounds.
template <class T>
INLINE Vector<T> round_half_even(const Vector<T>& x) {
    const T large = (T)(3 * ((int64_t)1 << (Format<T>::FRACTION - 1)));
    return (x + large) - large;
}

// 2^x for x cut to +-LARGEST: by its whole part n as an exponent, and a series of (x - n) ln 2, at most 0.35.
template <class T>
INLINE Vector<T> exp2_of(const Vector<T>& exact) {
    typedef Format<T> F;
    const Vector<T> x = maximum<T>(minimum<T>(exact, splat<T>(F::LARGEST)), splat<T>(-F::LARGEST));
    const Vector<T> whole = round_half_even<T>(x), t = (x - whole) * (T)LN_2;
    Vector<T> power = splat<T>(1), scale;
#pragma GCC unroll 16
    for (int i = F::EXP_TERMS; i > 0; i--) power = power * t * (T)(1.0 / i) + (T)1;
    const Integers<T> bits = (__builtin_convertvector(whole, Integers<T>) + F::ONE) << F::FRACTION;
    memcpy(&scale, &bits, sizeof scale);
    return exact == exact ? power * scale : exact;  // not a number where x is none
}

// log2 x of a positive normal x = m 2^e, sqrt(1/2) <= m < sqrt(2): e + 2 artanh((m - 1) / (m + 1)) / ln 2, by a series.
template <class T>
INLINE Vector<T> log2_of(const Vector<T>& x) {
    typedef Format<T> F;
    Integers<T> bits, half;
    const Vector<T> root = splat<T>((T)0.70710678118654752);
    memcpy(&bits, &x, sizeof bits);
    memcpy(&half, &root, sizeof half);
    const Integers<T> exponent = (bits - half) >> F::FRACTION;
    bits -= exponent << F::FRACTION;
    Vector<T> m, sum = {};
    memcpy(&m, &bits, sizeof m);
    const Vector<T> s = (m - (T)1) / (m + (T)1), square = s * s;
#pragma GCC unroll 16
    for (int i = F::LOG_TERMS - 1; i >= 0; i--) sum = sum * square + (T)(2 / LN_2 / (2 * i + 1));
    return __builtin_convertvector(exponent, Vector<T>) + sum * s + (x - x);  // not a number where x is none
}

// Phi(-x), the tail of the normal distribution beyond x >= 0, given exp(-x^2 / 2).
//
// In float32 exp(-x^2 / 2) t P(t), t = 1 / (1 + 0.266 x): P fitted to 1.3e-8 of the tail for x up to 14.
INLINE Vector<float> normal_tail(const Vector<float>& x, const Vector<float>& bell) {
    const float fit[] = {0.106136799f,  0.105714723f, 0.102469996f,  0.0628366917f, 0.131644309f,
                         -0.106726393f, 0.208318695f, -0.140920654f, 0.030525839f};
    const Vector<float> t = 1.0f / (x * 0.266f + 1.0f);
    Vector<float> sum = {};
#pragma GCC unroll 16
    for (int i = 8; i >= 0; i--) sum = sum * t + fit[i];
    return sum * t * bell;
}

INLINE Vector<double> normal_tail(const Vector<double>& x, const Vector<double>&) {
    Vector<double> tail;
    for (int i = 0; i < LANES<double>; i++) tail[i] = 0.5 * std::erfc(x[i] * 0.70710678118654752);
    return tail;
}

// GELU(x) = x Phi(x), exact, and its derivative Phi(x) + x phi(x).
template <class T>
INLINE Vector<T> gelu(const Vector<T>& x, Vector<T>& slope) {
    const Vector<T> bell = exp2_of<T>(x * x * (T)(-0.5 / LN_2));
    const Vector<T> tail = normal_tail(x > 0 ? x : -x, bell);
    slope = (x > 0 ? 1 - tail : tail) + x * bell * (T)0.3989422804014327;
    return x > 0 ? x - x * tail : x * tail;
}
