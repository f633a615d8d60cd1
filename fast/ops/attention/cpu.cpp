// Local attention on a CPU, forward and backward (paper sec. 3.2, 4.2, 4.3; Eq. 2, 3, 5).
//
// logit_ij = q_i . k_j + w . e_ij + b with e_ij = (dx, dy, dist, dy / dist, dx / dist) of p_j - p_i, the last two 0 at
// dist 0; the blank token's is q_i . k_blank; out_i = sum_j P_ij v_j + P_blank v_blank, P the softmax of the logits.
//
// Places (k m of them, cluster after cluster) are taken in blocks of 8, whatever the cluster size. The 8 queries of a
// block see nearly the same blocks of keys: their union is listed once a stage, with 64 bits for each that say which of
// the queries see which of the keys (`attention_plan`). So all products are dense and small:
//   - queries times keys: a vector holds the keys of a block (or of two), which is why keys are transposed first;
//   - weights times values: a vector holds channels, and rows of values are read where they lie.
// Few registers' worth of queries and vectors at a time; a vector is as wide as the machine's (VECTOR_BYTES).
//
// Letters: B images, k clusters of m places, H heads, d channels a head (a multiple of 8), W numbers in a vector.
#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "native.h"

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

namespace {

constexpr int BLOCK = 8;   // places: queries of a tile, keys of a block
constexpr int CHUNK = 32;  // blocks of keys worked on at a time
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 8;  // queries of a register tile: 32 vector registers hold 8 x 3 vectors, 16 hold 4 x 3
#else
constexpr int ROWS = 4;
#endif
constexpr int COLUMNS = 3;  // vectors of keys of a register tile

template <class T> constexpr int W = VECTOR_BYTES / int(sizeof(T));
template <class T> constexpr int SLICE = 2 * W<T>;  // channels of a register tile
template <class T> using Vector __attribute__((vector_size(VECTOR_BYTES))) = T;
template <class T> using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

template <class T>
INLINE Vector<T> load(const T* from) {
    Vector<T> x;
    memcpy(&x, from, sizeof x);
    return x;
}

// The first N numbers of a vector; the others are 0.
template <int N, class T>
INLINE Vector<T> load_first(const T* from) {
    Vector<T> x{};
    memcpy(&x, from, (N < W<T> ? N : W<T>) * sizeof(T));
    return x;
}

template <class T>
INLINE void store(T* to, Vector<T> x) {
    memcpy(to, &x, sizeof x);
}

template <int N, class T>
INLINE void store_first(T* to, Vector<T> x) {
    memcpy(to, &x, (N < W<T> ? N : W<T>) * sizeof(T));
}

template <class T>
INLINE Vector<T> larger(Vector<T> a, Vector<T> b) {
    return a > b ? a : b;
}

// x with the numbers i and i ^ STEP exchanged.
template <class T, int STEP, std::size_t... I>
INLINE Vector<T> exchanged(Vector<T> x, std::index_sequence<I...>) {
    return __builtin_shufflevector(x, x, int(I ^ STEP)...);
}

template <class T, int STEP = W<T> / 2>
INLINE T sum(Vector<T> x) {
    x += exchanged<T, STEP>(x, std::make_index_sequence<W<T>>());
    if constexpr (STEP > 1) return sum<T, STEP / 2>(x);
    else return x[0];
}

template <class T, int STEP = W<T> / 2>
INLINE T largest(Vector<T> x) {
    x = larger<T>(x, exchanged<T, STEP>(x, std::make_index_sequence<W<T>>()));
    if constexpr (STEP > 1) return largest<T, STEP / 2>(x);
    else return x[0];
}

// The format of a floating-point type, for `exponential` and `inverse_root`.
template <class T> struct Format;
template <> struct Format<float> {
    static constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
    static constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
    static constexpr int BIAS = 127, SHIFT = 23, TERMS = 7, NEWTON_STEPS = 3;
    static constexpr uint32_t ROOT = 0x5f375a86;
};
template <> struct Format<double> {
    static constexpr double ROUNDER = 6755399441055744.0;
    static constexpr double LN2_HIGH = 0.693145751953125, LN2_LOW = 1.42860682030941723212e-6;
    static constexpr int BIAS = 1023, SHIFT = 52, TERMS = 13, NEWTON_STEPS = 4;
    static constexpr uint64_t ROOT = 0x5fe6eb50c7b537a9;
};

// exp(x) of x not much above 0, to an ulp or two; 0 below the least normal number, NaN of NaN.
template <class T>
INLINE Vector<T> exponential(Vector<T> x) {
    using F = Format<T>;
    const T lowest = -F::BIAS * T(0.69314718055994530942);
    x = lowest > x ? lowest + Vector<T>{} : x;
    const Vector<T> rounded = x * T(1.44269504088896340736) + F::ROUNDER;
    const Vector<T> n = rounded - F::ROUNDER;
    Vector<T> r = x - n * F::LN2_HIGH;
    r = r - n * F::LN2_LOW;  // |r| <= ln(2) / 2: its Taylor series
    T factorial = 1;
    for (int i = 2; i <= F::TERMS; i++) factorial *= T(i);
    Vector<T> p = Vector<T>{} + 1 / factorial;
#pragma GCC unroll 16
    for (int i = F::TERMS; i > 0; i--) {
        factorial /= T(i);
        p = p * r + 1 / factorial;
    }
    typedef Bits<T> Integers __attribute__((vector_size(VECTOR_BYTES)));
    Integers bits;
    memcpy(&bits, &rounded, sizeof bits);
    bits = (bits + F::BIAS) << F::SHIFT;  // 2^n; 0 if n = -BIAS
    Vector<T> power;
    memcpy(&power, &bits, sizeof bits);
    return p * power;
}

// x^(-1/2) to an ulp or two; finite at 0.
template <class T>
INLINE Vector<T> inverse_root(Vector<T> x) {
    typedef Bits<T> Integers __attribute__((vector_size(VECTOR_BYTES)));
    Integers bits;
    memcpy(&bits, &x, sizeof bits);
    bits = Format<T>::ROOT - (bits >> 1);
    Vector<T> y;
    memcpy(&y, &bits, sizeof bits);
    const Vector<T> half = x * T(0.5);
#pragma GCC unroll 4
    for (int i = 0; i < Format<T>::NEWTON_STEPS; i++) y = y * (T(1.5) - half * y * y);
    return y;
}

// What the kernels read. A block's keys and values, transposed, lie as (B, blocks, H, d, 8).
template <class T>
struct Problem {
    const T *query, *kv, *blank, *weight, *bias;  // (B, k m, H, d), (B, k m, H, 2, d), (H, 2, d), (H, 5), (H)
    const double* cells;                          // (geometries, 2, 8 blocks): x and y of the places
    const uint8_t* there;                         // (geometries, blocks): which places of a block have a token
    const int64_t* lists;                         // (geometries, blocks, 2): where a block's list starts, its length
    const int32_t* seen;                          // the lists: blocks of keys, ascending
    const uint64_t* sees;                         // and for each of them, byte i: which of its keys query i sees
    int64_t batch, geometries, places, blocks, heads, d;
    bool everything;  // every token sees all; there are no lists

    int64_t geometry(int64_t image) const { return geometries == 1 ? 0 : image; }
    int64_t list_length(int64_t tile) const { return everything ? blocks : lists[2 * tile + 1]; }
    int64_t slices() const { return (d + SLICE<T> - 1) / SLICE<T>; }
    const T* key(int64_t image, int64_t place, int64_t head) const {
        return kv + ((image * places + place) * heads + head) * 2 * d;
    }
};

// Byte i of a number.
INLINE unsigned byte(uint64_t x, int i) { return unsigned(x >> (8 * i)) & 255; }

// For each of at most CHUNK blocks that a tile of 8 queries sees: position terms and mask, for all heads.
template <class T>
struct Chunk {
    int count;                      // blocks, an even number if a vector holds two
    int64_t block[CHUNK];           // their numbers
    uint8_t seen[CHUNK];            // which of their keys any query sees
    T row_x[BLOCK], row_y[BLOCK];   // positions, relative to the tile's first token
    alignas(64) T x[CHUNK * BLOCK], y[CHUNK * BLOCK];
    alignas(64) T terms[4 * BLOCK * CHUNK * BLOCK];  // (vectors, 8, 4, W): mask (0 or -inf), distance, sine, cosine

    int vectors() const { return count * BLOCK / W<T>; }

    // Fill with entries first .. last-1 of the list of a tile of a geometry.
    NOINLINE void fill(const Problem<T>& p, int64_t geometry, int64_t tile, int64_t first, int64_t last) {
        const double *x_of = p.cells + geometry * 2 * BLOCK * p.blocks, *y_of = x_of + BLOCK * p.blocks;
        const double x0 = x_of[tile * BLOCK], y0 = y_of[tile * BLOCK];
        const int64_t number = geometry * p.blocks + tile;
        uint64_t sees[CHUNK];
        count = int(last - first);
        for (int i = 0; i < count; i++) {
            if (p.everything) {
                block[i] = first + i;
                sees[i] = 0;
                for (int row = 0; row < BLOCK; row++)
                    if (p.there[number] >> row & 1)
                        sees[i] |= uint64_t(p.there[geometry * p.blocks + block[i]]) << (8 * row);
            } else {
                block[i] = p.seen[p.lists[2 * number] + first + i];
                sees[i] = p.sees[p.lists[2 * number] + first + i];
            }
        }
        while (count * BLOCK % W<T>) block[count] = 0, sees[count++] = 0;
        for (int i = 0; i < count; i++) {
            uint64_t any = sees[i] | sees[i] >> 32;
            any |= any >> 16;
            seen[i] = uint8_t(any | any >> 8);
            for (int j = 0; j < BLOCK; j++) {
                x[i * BLOCK + j] = T(x_of[block[i] * BLOCK + j] - x0);
                y[i * BLOCK + j] = T(y_of[block[i] * BLOCK + j] - y0);
            }
        }
        for (int i = 0; i < BLOCK; i++) {
            row_x[i] = T(x_of[tile * BLOCK + i] - x0);
            row_y[i] = T(y_of[tile * BLOCK + i] - y0);
        }
        typedef Bits<T> Integers __attribute__((vector_size(VECTOR_BYTES)));
        Integers bit;
        for (int j = 0; j < W<T>; j++) bit[j] = Bits<T>(1) << j;
        T* to = terms;
        for (int v = 0; v < vectors(); v++) {
            const Vector<T> xs = load(x + v * W<T>), ys = load(y + v * W<T>);
            const int first_block = v * W<T> / BLOCK;
            for (int row = 0; row < BLOCK; row++, to += 4 * W<T>) {
                unsigned bits = byte(sees[first_block], row) >> (v * W<T> % BLOCK);
                if constexpr (W<T> > BLOCK) bits |= byte(sees[first_block + 1], row) << BLOCK;
                const Vector<T> dx = xs - row_x[row], dy = ys - row_y[row], square = dx * dx + dy * dy;
                const Vector<T> inverse = inverse_root<T>(square), none{};
                store<T>(to, (bit & Bits<T>(bits)) != 0 ? none : none - std::numeric_limits<T>::infinity());
                store<T>(to + W<T>, square * inverse);
                store<T>(to + 2 * W<T>, dy * inverse);
                store<T>(to + 3 * W<T>, dx * inverse);
            }
        }
    }
};

// The position term and the mask of a head: -> logits (vectors, 8, W).
template <class T>
NOINLINE void position_term(const Chunk<T>& chunk, const T* weight, T bias, T* logits) {
    T here[BLOCK];
    for (int i = 0; i < BLOCK; i++) here[i] = weight[0] * chunk.row_x[i] + weight[1] * chunk.row_y[i] - bias;
    const T* term = chunk.terms;
    for (int v = 0; v < chunk.vectors(); v++) {
        const Vector<T> there = weight[0] * load(chunk.x + v * W<T>) + weight[1] * load(chunk.y + v * W<T>);
#pragma GCC unroll 8
        for (int i = 0; i < BLOCK; i++, term += 4 * W<T>, logits += W<T>) {
            Vector<T> x = load(term + W<T>) * weight[2] + (there - here[i]);
            x = load(term + 2 * W<T>) * weight[3] + x;
            x = load(term + 3 * W<T>) * weight[4] + x;
            store<T>(logits, x + load(term));
        }
    }
}

// Where the keys of a vector are: in one transposed block (d, 8), or in two.
template <class T> constexpr int PARTS = W<T> > BLOCK ? W<T> / BLOCK : 1;

// A vector of keys in one channel.
template <class T>
INLINE Vector<T> load_keys(const T* const* parts, int64_t channel) {
    if constexpr (PARTS<T> == 2) {
        typedef T Half __attribute__((vector_size(VECTOR_BYTES / 2)));
        Half low, high;
        memcpy(&low, parts[0] + channel * BLOCK, sizeof low);
        memcpy(&high, parts[1] + channel * BLOCK, sizeof high);
        return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    } else {
        return load(parts[0] + channel * BLOCK);
    }
}

// sums (N, 8, W) += queries times N vectors of keys. Queries (slices, 8, SLICE); parts (N, PARTS).
template <int N, class T>
NOINLINE void multiply_tile(const T* queries, int64_t d, const T* const* parts, T* sums) {
    for (int row = 0; row < BLOCK; row += ROWS) {
        Vector<T> tile[N][ROWS];
#pragma GCC unroll 3
        for (int n = 0; n < N; n++)
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++) tile[n][i] = load(sums + (n * BLOCK + row + i) * W<T>);
        const T* q = queries + row * SLICE<T>;
        for (int64_t start = 0; start < d; start += SLICE<T>, q += BLOCK * SLICE<T>) {
            const int64_t end = std::min<int64_t>(d - start, SLICE<T>);
            for (int64_t e = 0; e < end; e++) {
                Vector<T> keys[N];
#pragma GCC unroll 3
                for (int n = 0; n < N; n++) keys[n] = load_keys(parts + n * PARTS<T>, start + e);
#pragma GCC unroll 8
                for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
                    for (int n = 0; n < N; n++) tile[n][i] += keys[n] * q[i * SLICE<T> + e];
            }
        }
#pragma GCC unroll 3
        for (int n = 0; n < N; n++)
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++) store<T>(sums + (n * BLOCK + row + i) * W<T>, tile[n][i]);
    }
}

// sums (vectors, 8, W) += queries times a head's transposed keys or values of an image.
template <class T>
void multiply(const Problem<T>& p, const Chunk<T>& chunk, int64_t image, int64_t head, const T* queries,
              const T* transposed, T* sums) {
    static_assert(COLUMNS == 3, "the cases below");
    const int vectors = chunk.vectors();
    const T* parts[CHUNK * BLOCK / W<T> * PARTS<T>];
    for (int i = 0; i < vectors * PARTS<T>; i++) {
        const int key = i * std::min(W<T>, BLOCK);
        const int64_t block = image * p.blocks + chunk.block[key / BLOCK];
        parts[i] = transposed + (block * p.heads + head) * p.d * BLOCK + key % BLOCK;
    }
    for (int v = 0; v < vectors; v += COLUMNS) {
        const T* const* from = parts + v * PARTS<T>;
        T* to = sums + v * BLOCK * W<T>;
        if (vectors - v >= 3) multiply_tile<3>(queries, p.d, from, to);
        else if (vectors - v == 2) multiply_tile<2>(queries, p.d, from, to);
        else multiply_tile<1>(queries, p.d, from, to);
    }
}

// sums (8, SLICE) += weights times rows, in WIDTH channels. Weights (vectors, 8, W); rows lie `stride` apart.
template <int WIDTH, class T>
NOINLINE void add_rows_tile(const Chunk<T>& chunk, const T* weights, const T* rows, int64_t stride, T* sums) {
    constexpr int N = (WIDTH + W<T> - 1) / W<T>, LAST = WIDTH - (N - 1) * W<T>;
    for (int row = 0; row < BLOCK; row += ROWS) {
        Vector<T> tile[ROWS][N];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
            for (int n = 0; n < N; n++) tile[i][n] = load(sums + (row + i) * SLICE<T> + n * W<T>);
        for (int c = 0; c < chunk.count; c++) {
            const T* x = rows + chunk.block[c] * BLOCK * stride;
            const T* weight = weights + (c * BLOCK / W<T> * BLOCK + row) * W<T> + c * BLOCK % W<T>;
            for (int j = 0; j < BLOCK; j++, x += stride) {
                if (!(chunk.seen[c] >> j & 1)) continue;
                const T* own = weight + j / W<T> * BLOCK * W<T> + j % W<T>;
                Vector<T> channels[N];
#pragma GCC unroll 2
                for (int n = 0; n < N - 1; n++) channels[n] = load(x + n * W<T>);
                channels[N - 1] = load_first<LAST>(x + (N - 1) * W<T>);
#pragma GCC unroll 8
                for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
                    for (int n = 0; n < N; n++) tile[i][n] += channels[n] * own[i * W<T>];
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
            for (int n = 0; n < N; n++) store<T>(sums + (row + i) * SLICE<T> + n * W<T>, tile[i][n]);
    }
}

// Call f with the number of channels of each slice of d as a constant: f(constant, start of the slice, its number).
template <class T, class F>
INLINE void for_slices(int64_t d, const F& f) {
    int64_t start = 0, number = 0;
    for (; d - start >= SLICE<T>; start += SLICE<T>, number++)
        f(std::integral_constant<int, SLICE<T>>(), start, number);
    if constexpr (SLICE<T> > 8)
        if (d - start == 8) f(std::integral_constant<int, 8>(), start, number);
    if constexpr (SLICE<T> > 16) {
        if (d - start == 16) f(std::integral_constant<int, 16>(), start, number);
        if (d - start == 24) f(std::integral_constant<int, 24>(), start, number);
    }
}

// sums (slices, 8, SLICE) += weights times rows of d channels.
template <class T>
void add_rows(const Chunk<T>& chunk, const T* weights, const T* rows, int64_t stride, int64_t d, T* sums) {
    for_slices<T>(d, [&](auto width, int64_t start, int64_t number) {
        add_rows_tile<width()>(chunk, weights, rows + start, stride, sums + number * BLOCK * SLICE<T>);
    });
}

// Rows of d channels, `stride` apart, of the places that are `there` -> (slices, 8, SLICE), the rest 0.
template <class T>
NOINLINE void pack_rows(const T* rows, unsigned there, int64_t stride, int64_t d, T* to) {
    if (there != 255 || d % SLICE<T>) std::fill(to, to + (d + SLICE<T> - 1) / SLICE<T> * BLOCK * SLICE<T>, T(0));
    for_slices<T>(d, [&](auto width, int64_t start, int64_t number) {
        for (int i = 0; i < BLOCK; i++)
            if (there >> i & 1)
                memcpy(to + (number * BLOCK + i) * SLICE<T>, rows + i * stride + start, width() * sizeof(T));
    });
}

// The inverse: each row multiplied by its scale; the first `count` rows, as 0 those that are not `there`.
template <class T>
NOINLINE void unpack_rows(const T* from, int64_t count, unsigned there, const T* scales, int64_t stride, int64_t d,
                          T* rows) {
    for_slices<T>(d, [&](auto width, int64_t start, int64_t number) {
        constexpr int WIDTH = width(), N = (WIDTH + W<T> - 1) / W<T>, LAST = WIDTH - (N - 1) * W<T>;
        for (int i = 0; i < count; i++)
#pragma GCC unroll 2
            for (int n = 0; n < N; n++) {
                Vector<T> x = load(from + (number * BLOCK + i) * SLICE<T> + n * W<T>) * scales[i];
                if (!(there >> i & 1)) x = Vector<T>{};
                T* to = rows + i * stride + start + n * W<T>;
                if (n < N - 1) store<T>(to, x);
                else store_first<LAST, T>(to, x);
            }
    });
}

// Dot products of each row of a with the same row of b, both (slices, 8, SLICE).
template <class T>
NOINLINE void dot_rows(const T* a, const T* b, int64_t slices, T* dots) {
    Vector<T> sums[BLOCK] = {};
    for (int64_t s = 0; s < slices; s++)
#pragma GCC unroll 8
        for (int i = 0; i < BLOCK; i++, a += SLICE<T>, b += SLICE<T>)
            sums[i] += load(a) * load(b) + load(a + W<T>) * load(b + W<T>);
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK; i++) dots[i] = sum<T>(sums[i]);
}

// Each row of (slices, 8, SLICE) times its scale.
template <class T>
INLINE void scale_rows(T* rows, int64_t slices, const T* scales) {
    for (int64_t s = 0; s < slices; s++)
#pragma GCC unroll 8
        for (int i = 0; i < BLOCK; i++, rows += SLICE<T>) {
            store<T>(rows, load(rows) * scales[i]);
            store<T>(rows + W<T>, load(rows + W<T>) * scales[i]);
        }
}

// A step of transposing a square: of two rows, exchange the numbers off the diagonal of blocks of STEP columns.
template <int STEP, class V, std::size_t... I>
INLINE void exchange(V& a, V& b, std::index_sequence<I...>) {
    constexpr int N = sizeof...(I);
    const V upper = __builtin_shufflevector(a, b, int(I & STEP ? N + (I ^ STEP) : I)...);
    b = __builtin_shufflevector(a, b, int(I & STEP ? N + I : I ^ STEP)...);
    a = upper;
}

template <int STEP, int N, class V>
INLINE void transpose_square(V* rows) {
    if constexpr (STEP < N) {
#pragma GCC unroll 8
        for (int i = 0; i < N; i++)
            if (!(i & STEP)) exchange<STEP>(rows[i], rows[i + STEP], std::make_index_sequence<N>());
        transpose_square<2 * STEP, N>(rows);
    }
}

// Rows of keys or values (part 0 or 1 of kv) -> (B, blocks, H, d, 8), 0 in empty places.
template <class T>
NOINLINE void transpose(const Threads* threads, const Problem<T>& p, int part, T* to) {
    constexpr int N = W<T> < BLOCK ? W<T> : BLOCK;
    typedef T Row __attribute__((vector_size(N * sizeof(T))));
    parallel_for(threads, p.batch * p.blocks, 16, [&](int64_t begin, int64_t end) {
        for (int64_t number = begin; number < end; number++) {
            const int64_t image = number / p.blocks, block = number % p.blocks, stride = p.heads * 2 * p.d;
            const unsigned there = p.there[p.geometry(image) * p.blocks + block];
            for (int64_t head = 0; head < p.heads; head++) {
                const T* from = p.key(image, block * BLOCK, head) + part * p.d;
                T* block_to = to + (number * p.heads + head) * p.d * BLOCK;
                for (int64_t e = 0; e < p.d; e += N)
                    for (int first = 0; first < BLOCK; first += N) {
                        Row square[N];
#pragma GCC unroll 8
                        for (int j = 0; j < N; j++) {
                            const T* row = from + (first + j) * stride + e;
                            square[j] = Row{};
                            if (there >> (first + j) & 1) memcpy(&square[j], row, sizeof(Row));
                        }
                        transpose_square<1, N>(square);
#pragma GCC unroll 8
                        for (int j = 0; j < N; j++) memcpy(block_to + (e + j) * BLOCK + first, &square[j], sizeof(Row));
                    }
            }
        }
    });
}

// Zeros, aligned to vectors.
template <class T>
class Memory {
    std::vector<T> data;

  public:
    explicit Memory(int64_t size = 0) : data(size_t(size) + 64 / sizeof(T)) {}
    T* get() {
        const auto address = reinterpret_cast<uintptr_t>(data.data());
        return data.data() + (64 - address % 64) % 64 / sizeof(T);
    }
};

// Softmax so far of the 8 queries of a tile in a head: largest logit, sum of exponentials.
template <class T>
struct State {
    alignas(64) T largest[W<T> + BLOCK], total[W<T> + BLOCK];  // 8 of each; whole vectors are read
};

// Add the keys of a chunk to the softmax so far, and to the weighted sum of values (slices, 8, SLICE).
template <class T>
NOINLINE void attend(const Problem<T>& p, const Chunk<T>& chunk, int64_t image, int64_t head, const T* keys,
                     const T* queries, State<T>& state, T* values) {
    alignas(64) T weights[BLOCK * CHUNK * BLOCK];
    alignas(64) T now[W<T> + BLOCK] = {}, scale[W<T> + BLOCK];
    position_term(chunk, p.weight + 5 * head, p.bias[head], weights);
    multiply(p, chunk, image, head, queries, keys, weights);
    const int vectors = chunk.vectors();
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK; i++) {
        Vector<T> highest = load(weights + i * W<T>);
        for (int v = 1; v < vectors; v++) highest = larger<T>(highest, load(weights + (v * BLOCK + i) * W<T>));
        now[i] = std::max(state.largest[i], largest<T>(highest));
    }
    for (int i = 0; i < BLOCK; i += W<T>) store<T>(scale + i, exponential<T>(load(state.largest + i) - load(now + i)));
    for (int i = 0; i < BLOCK; i++) {
        Vector<T> total{};
        for (int v = 0; v < vectors; v++) {
            T* at = weights + (v * BLOCK + i) * W<T>;
            const Vector<T> weight = exponential<T>(load(at) - now[i]);
            store<T>(at, weight);
            total += weight;
        }
        state.largest[i] = now[i];
        state.total[i] = state.total[i] * scale[i] + sum<T>(total);
    }
    scale_rows(values, p.slices(), scale);
    add_rows(chunk, weights, p.key(image, 0, head) + p.d, p.heads * 2 * p.d, p.d, values);
}

// out (B, k m, H, d), lse (B, k m, H); both 0 in empty places. keys: memory for (B, blocks, H, d, 8).
template <class T>
void forward(const Threads* threads, const Problem<T>& p, T* keys, T* out, T* lse) {
    transpose(threads, p, 0, keys);
    const int64_t size = p.slices() * BLOCK * SLICE<T>, images = p.geometries == 1 ? p.batch : 1;
    parallel_for(threads, p.geometries * p.blocks, 4, [&](int64_t begin, int64_t end) {
        Chunk<T> chunk;
        Memory<T> memory(2 * p.heads * size);
        std::vector<State<T>> states(p.heads);
        for (int64_t number = begin; number < end; number++) {
            const int64_t geometry = number / p.blocks, tile = number % p.blocks, place = tile * BLOCK;
            const int64_t count = std::min<int64_t>(BLOCK, p.places - place), length = p.list_length(number);
            const unsigned there = p.there[number];
            for (int64_t image = geometry; image < geometry + images; image++) {
                const int64_t at = (image * p.places + place) * p.heads, stride = p.heads * p.d;
                for (int64_t head = 0; head < p.heads; head++) {  // the blank token: the first that is attended to
                    T *queries = memory.get() + 2 * head * size, *values = queries + size;
                    State<T>& state = states[head];
                    pack_rows(p.query + (at + head) * p.d, there, stride, p.d, queries);
                    pack_rows(p.blank + head * 2 * p.d, 255, 0, p.d, values);
                    dot_rows(queries, values, p.slices(), state.largest);
                    std::fill(state.total, state.total + BLOCK, T(1));
                    pack_rows(p.blank + (head * 2 + 1) * p.d, 255, 0, p.d, values);
                }
                for (int64_t first = 0; first < length; first += CHUNK) {
                    if (length > CHUNK || image == geometry)
                        chunk.fill(p, geometry, tile, first, std::min(length, first + CHUNK));
                    for (int64_t head = 0; head < p.heads; head++) {
                        T *queries = memory.get() + 2 * head * size, *values = queries + size;
                        attend(p, chunk, image, head, keys, queries, states[head], values);
                    }
                }
                for (int64_t head = 0; head < p.heads; head++) {
                    T scale[BLOCK];
                    for (int i = 0; i < BLOCK; i++) scale[i] = 1 / states[head].total[i];
                    const T* values = memory.get() + (2 * head + 1) * size;
                    unpack_rows(values, count, there, scale, stride, p.d, out + (at + head) * p.d);
                    for (int i = 0; i < count; i++)
                        lse[at + i * p.heads + head] =
                            there >> i & 1 ? states[head].largest[i] + std::log(states[head].total[i]) : 0;
                }
            }
        }
    });
}

// Rows (8, d) of a gradient, `stride` apart, += weights (8 queries, 8 keys of block c of a chunk) transposed times rows
// (8, SLICE), in WIDTH channels and for KEYS keys from the first.
template <int WIDTH, int KEYS, class T>
INLINE void add_keys_tile(const T* weights, int first, const T* rows, T* grad, int64_t stride) {
    constexpr int N = (WIDTH + W<T> - 1) / W<T>, LAST = WIDTH - (N - 1) * W<T>;
    Vector<T> tile[KEYS][N];
#pragma GCC unroll 8
    for (int j = 0; j < KEYS; j++) {
#pragma GCC unroll 2
        for (int n = 0; n < N - 1; n++) tile[j][n] = load(grad + j * stride + n * W<T>);
        tile[j][N - 1] = load_first<LAST>(grad + j * stride + (N - 1) * W<T>);
    }
    for (int i = 0; i < BLOCK; i++) {
        Vector<T> channels[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) channels[n] = load(rows + i * SLICE<T> + n * W<T>);
#pragma GCC unroll 8
        for (int j = 0; j < KEYS; j++) {
            const T weight = weights[((first + j) / W<T> * BLOCK + i) * W<T> + (first + j) % W<T>];
#pragma GCC unroll 2
            for (int n = 0; n < N; n++) tile[j][n] += channels[n] * weight;
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < KEYS; j++) {
#pragma GCC unroll 2
        for (int n = 0; n < N - 1; n++) store<T>(grad + j * stride + n * W<T>, tile[j][n]);
        store_first<LAST, T>(grad + j * stride + (N - 1) * W<T>, tile[j][N - 1]);
    }
}

// Gradients of keys or values of a head and an image += weights (vectors, 8, W) transposed times rows (slices, 8,
// SLICE).
template <class T>
NOINLINE void add_keys(const Problem<T>& p, const Chunk<T>& chunk, const T* weights, const T* rows, T* to) {
    const int64_t stride = p.heads * 2 * p.d;
    for_slices<T>(p.d, [&](auto width, int64_t start, int64_t number) {
        const T* slice = rows + number * BLOCK * SLICE<T>;
        for (int c = 0; c < chunk.count; c++) {
            if (!chunk.seen[c]) continue;
            T* grad = to + chunk.block[c] * BLOCK * stride + start;
            const T* own = weights + c * BLOCK / W<T> * BLOCK * W<T>;
            const int first = c * BLOCK % W<T>;
            if ((chunk.block[c] + 1) * BLOCK <= p.places) {
                for (int j = 0; j < BLOCK; j += ROWS)
                    add_keys_tile<width(), ROWS>(own, first + j, slice, grad + j * stride, stride);
            } else {
                for (int j = 0; j < BLOCK; j++)
                    if (chunk.seen[c] >> j & 1)
                        add_keys_tile<width(), 1>(own, first + j, slice, grad + j * stride, stride);
            }
        }
    });
}

// What the backward pass keeps of 8 queries of a head while it goes through their keys.
template <class T>
struct Rows {
    alignas(64) T lse[W<T> + BLOCK], mean[W<T> + BLOCK];  // 8 of each; mean: of the gradients of the weights
};

// From logits and grad_out . v - mean, both (vectors, 8, W), to weights and gradients of logits; sums (6) += those of
// the position term's parameters.
template <class T>
NOINLINE void differentiate(const Chunk<T>& chunk, const Rows<T>& rows, T* weights, T* grads, double* sums) {
    Vector<T> total[6] = {};
    for (int i = 0; i < BLOCK; i++)
        for (int v = 0; v < chunk.vectors(); v++) {
            const int64_t at = (v * BLOCK + i) * W<T>;
            const T* term = chunk.terms + 4 * at;
            const Vector<T> weight = exponential<T>(load(weights + at) - rows.lse[i]);
            const Vector<T> grad = weight * load(grads + at);
            store<T>(weights + at, weight);
            store<T>(grads + at, grad);
            total[0] += grad * (load(chunk.x + v * W<T>) - chunk.row_x[i]);
            total[1] += grad * (load(chunk.y + v * W<T>) - chunk.row_y[i]);
            total[2] += grad * load(term + W<T>);
            total[3] += grad * load(term + 2 * W<T>);
            total[4] += grad * load(term + 3 * W<T>);
            total[5] += grad;
        }
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++) sums[i] += double(sum<T>(total[i]));
}

// sums (d) += the sum of rows (slices, 8, SLICE), each times its weight.
template <class T>
NOINLINE void add_weighted_rows(const T* rows, const T* weights, int64_t d, double* sums) {
    for (int64_t start = 0; start < d; start += SLICE<T>, rows += BLOCK * SLICE<T>) {
        alignas(64) T total[SLICE<T>];
        Vector<T> low{}, high{};
#pragma GCC unroll 8
        for (int i = 0; i < BLOCK; i++) {
            low += load(rows + i * SLICE<T>) * weights[i];
            high += load(rows + i * SLICE<T> + W<T>) * weights[i];
        }
        store<T>(total, low);
        store<T>(total + W<T>, high);
        for (int64_t e = 0; e < std::min<int64_t>(d - start, SLICE<T>); e++) sums[start + e] += double(total[e]);
    }
}

// Gradients in the layout of what they are gradients of.
template <class T>
struct Gradients {
    T *query, *kv, *blank, *weight, *bias;
};

// A part of the backward pass: tiles first .. last-1 of an image, in heads first_head .. last_head-1. Adds to the
// gradients of the keys and values that they see. sums (H, 6 + 2 d): of the parameters' gradients.
template <class T>
void backward_part(const Problem<T>& p, const T* grad_out, const T* out, const T* lse, const T* keys, const T* values,
                   const Gradients<T>& to, int64_t image, int64_t first, int64_t last, int64_t first_head,
                   int64_t last_head, double* all_sums) {
    const int64_t size = p.slices() * BLOCK * SLICE<T>, geometry = p.geometry(image), stride = p.heads * p.d;
    const int64_t of_sums = 6 + 2 * p.d;
    Chunk<T> chunk;
    alignas(64) T weights[BLOCK * CHUNK * BLOCK], grads[BLOCK * CHUNK * BLOCK];
    Memory<T> memory(3 * (last_head - first_head) * size);
    std::vector<Rows<T>> all_rows(last_head - first_head);
    for (int64_t tile = first; tile < last; tile++) {
        const int64_t place = tile * BLOCK, at = (image * p.places + place) * p.heads;
        const int64_t count = std::min<int64_t>(BLOCK, p.places - place);
        const int64_t length = p.list_length(geometry * p.blocks + tile);
        const unsigned there = p.there[geometry * p.blocks + tile];
        for (int64_t head = first_head; head < last_head; head++) {  // the blank token, and what is no sum over keys
            T *queries = memory.get() + 3 * (head - first_head) * size, *grad = queries + size;
            T* grad_query = grad + size;
            Rows<T>& rows = all_rows[head - first_head];
            const T* blank = p.blank + head * 2 * p.d;
            double* sums = all_sums + head * of_sums + 6;
            alignas(64) T weight[W<T> + BLOCK] = {}, grad_logit[BLOCK];
            pack_rows(p.query + (at + head) * p.d, there, stride, p.d, queries);
            pack_rows(grad_out + (at + head) * p.d, there, stride, p.d, grad);
            pack_rows(out + (at + head) * p.d, there, stride, p.d, grad_query);
            dot_rows(grad, grad_query, p.slices(), rows.mean);
            for (int i = 0; i < BLOCK; i++) rows.lse[i] = there >> i & 1 ? lse[at + i * p.heads + head] : 0;
            pack_rows(blank + p.d, 255, 0, p.d, grad_query);
            dot_rows(grad, grad_query, p.slices(), grad_logit);
            pack_rows(blank, 255, 0, p.d, grad_query);
            dot_rows(queries, grad_query, p.slices(), weight);
            for (int i = 0; i < BLOCK; i += W<T>)
                store<T>(weight + i, exponential<T>(load(weight + i) - load(rows.lse + i)));
            for (int i = 0; i < BLOCK; i++) grad_logit[i] = weight[i] * (grad_logit[i] - rows.mean[i]);
            scale_rows(grad_query, p.slices(), grad_logit);
            add_weighted_rows(queries, grad_logit, p.d, sums);
            add_weighted_rows(grad, weight, p.d, sums + p.d);
        }
        for (int64_t start = 0; start < length; start += CHUNK) {
            chunk.fill(p, geometry, tile, start, std::min(length, start + CHUNK));
            for (int64_t head = first_head; head < last_head; head++) {
                T *queries = memory.get() + 3 * (head - first_head) * size, *grad = queries + size;
                T *grad_query = grad + size, *grad_key = to.kv + (p.key(image, 0, head) - p.kv);
                const Rows<T>& rows = all_rows[head - first_head];
                position_term(chunk, p.weight + 5 * head, p.bias[head], weights);
                multiply(p, chunk, image, head, queries, keys, weights);
                for (int v = 0; v < chunk.vectors(); v++)
                    for (int i = 0; i < BLOCK; i++)
                        store<T>(grads + (v * BLOCK + i) * W<T>, Vector<T>{} - rows.mean[i]);
                multiply(p, chunk, image, head, grad, values, grads);
                differentiate(chunk, rows, weights, grads, all_sums + head * of_sums);
                add_rows(chunk, grads, p.key(image, 0, head), 2 * stride, p.d, grad_query);
                add_keys(p, chunk, grads, queries, grad_key);
                add_keys(p, chunk, weights, grad, grad_key + p.d);
            }
        }
        const T ones[BLOCK] = {1, 1, 1, 1, 1, 1, 1, 1};
        for (int64_t head = first_head; head < last_head; head++)
            unpack_rows(memory.get() + (3 * (head - first_head) + 2) * size, count, there, ones, stride, p.d,
                        to.query + (at + head) * p.d);
    }
}

// The farthest that a tile's queries see, in blocks.
template <class T>
int64_t reach(const Problem<T>& p) {
    int64_t farthest = p.everything ? p.blocks : 0;
    for (int64_t i = 0; !p.everything && i < p.geometries * p.blocks; i++) {
        const int64_t start = p.lists[2 * i], length = p.lists[2 * i + 1], tile = i % p.blocks;
        if (length == 0) continue;
        farthest = std::max(farthest, tile - p.seen[start]);
        farthest = std::max(farthest, p.seen[start + length - 1] - tile);
    }
    return farthest;
}

// Gradients from that of out; keys, values: memory for (B, blocks, H, d, 8) each.
//
// An image's tiles are cut into ranges at least twice as long as their queries' reach. First all even ranges are worked
// on, then all odd ones: two of a kind never add to the same key's gradient. If those are few, heads are divided too.
// All this depends on sizes and lists alone, so results do not depend on the threads.
template <class T>
void backward(const Threads* threads, const Problem<T>& p, const T* grad_out, const T* out, const T* lse, T* keys,
              T* values, const Gradients<T>& to) {
    constexpr int64_t PARTS = 16;
    transpose(threads, p, 0, keys);
    transpose(threads, p, 1, values);
    const int64_t row_size = p.heads * 2 * p.d, of_sums = 6 + 2 * p.d;
    parallel_for(threads, p.batch * p.places, 256, [&](int64_t begin, int64_t end) {
        std::fill(to.kv + begin * row_size, to.kv + end * row_size, T(0));
    });
    const int64_t ranges = std::max<int64_t>(1, p.blocks / std::max<int64_t>(1, 2 * reach(p)));
    const int64_t together = p.batch * ((ranges + 1) / 2);
    const int64_t groups = std::min(p.heads, (PARTS + together - 1) / std::max<int64_t>(1, together));
    std::vector<double> sums(p.batch * ranges * p.heads * of_sums);
    for (int64_t parity = 0; parity < 2; parity++) {
        const int64_t of_image = (ranges + 1 - parity) / 2 * groups;
        parallel_for(threads, p.batch * of_image, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                const int64_t image = i / of_image, group = i % groups, range = i % of_image / groups * 2 + parity;
                backward_part(p, grad_out, out, lse, keys, values, to, image, p.blocks * range / ranges,
                              p.blocks * (range + 1) / ranges, p.heads * group / groups, p.heads * (group + 1) / groups,
                              sums.data() + (image * ranges + range) * p.heads * of_sums);
            }
        });
    }
    for (int64_t head = 0; head < p.heads; head++)
        for (int64_t e = 0; e < of_sums; e++) {
            double total = 0;
            for (int64_t i = 0; i < p.batch * ranges; i++) total += sums[(i * p.heads + head) * of_sums + e];
            T* grad = e < 5 ? to.weight + head * 5 + e : e == 5 ? to.bias + head : to.blank + head * 2 * p.d + e - 6;
            *grad = T(total);
        }
}

}  // namespace

// Lay a stage's geometry out. positions (geometries, n, 2), members (geometries, k, m), nearest (geometries, n, R) ->
// the fields of a Problem; lists have at most `width` entries, and there are none if width is 0.
extern "C" void attention_plan(const Threads* threads, const int64_t* positions, const int64_t* members,
                               const int64_t* nearest, double* cells, uint8_t* there, int64_t* lists, int32_t* seen,
                               uint64_t* sees, int64_t geometries, int64_t n, int64_t k, int64_t m, int64_t r,
                               int64_t width) {
    const int64_t places = k * m, blocks = (places + BLOCK - 1) / BLOCK, piece = 64;
    const int64_t pieces = (blocks + piece - 1) / piece;
    parallel_for(threads, geometries * pieces, 1, [&](int64_t begin, int64_t end) {
        std::vector<int32_t> where(width ? blocks : 0, -1);  // of each block in the list at hand
        for (int64_t number = begin; number < end; number++) {
            const int64_t geometry = number / pieces, first = number % pieces * piece;
            const int64_t* token = members + geometry * places;
            double *x = cells + geometry * 2 * BLOCK * blocks, *y = x + BLOCK * blocks;
            int64_t at = (geometry * blocks + first) * width;
            for (int64_t block = first; block < std::min(blocks, first + piece); block++) {
                const int64_t start = at;
                unsigned real = 0;
                for (int i = 0; i < BLOCK; i++) {
                    const int64_t place = block * BLOCK + i;
                    const int64_t t = place < places ? token[place] : -1;
                    x[place] = y[place] = 0;
                    if (t < 0) continue;
                    real |= 1u << i;
                    x[place] = double(positions[(geometry * n + t) * 2]);
                    y[place] = double(positions[(geometry * n + t) * 2 + 1]);
                    if (width == 0) continue;
                    for (int64_t s = 0; s < r; s++) {
                        const int64_t cluster = nearest[(geometry * n + t) * r + s];
                        for (int64_t key = cluster * m; key < (cluster + 1) * m;) {
                            const int64_t other = key / BLOCK, after = std::min((cluster + 1) * m, (other + 1) * BLOCK);
                            uint64_t bits = 0;
                            for (; key < after; key++) bits |= uint64_t(token[key] >= 0) << (key % BLOCK);
                            if (where[other] < 0) {
                                where[other] = int32_t(at - start);
                                seen[at] = int32_t(other);
                                sees[at++] = 0;
                            }
                            sees[start + where[other]] |= bits << (8 * i);
                        }
                    }
                }
                there[geometry * blocks + block] = uint8_t(real);
                if (width == 0) continue;
                for (int64_t i = start; i < at; i++) where[seen[i]] = -1;
                for (int64_t i = start + 1; i < at; i++)  // by insertion: the lists are short
                    for (int64_t j = i; j > start && seen[j] < seen[j - 1]; j--) {
                        std::swap(seen[j], seen[j - 1]);
                        std::swap(sees[j], sees[j - 1]);
                    }
                lists[(geometry * blocks + block) * 2] = start;
                lists[(geometry * blocks + block) * 2 + 1] = at - start;
            }
        }
    });
}

#define PROBLEM                                                                                                        \
    {query, kv, blank, weight, bias, cells, there, lists, seen, sees, batch, geometries, places,                       \
     (places + BLOCK - 1) / BLOCK, heads, d, everything != 0}

#define ATTENTION(T, SUFFIX)                                                                                           \
    extern "C" void attention_forward_##SUFFIX(                                                                        \
        const Threads* threads, const T* query, const T* kv, const T* blank, const T* weight, const T* bias,           \
        const double* cells, const uint8_t* there, const int64_t* lists, const int32_t* seen, const uint64_t* sees,    \
        T* keys, T* out, T* lse, int64_t batch, int64_t geometries, int64_t places, int64_t heads, int64_t d,          \
        int64_t everything) {                                                                                          \
        forward(threads, Problem<T> PROBLEM, keys, out, lse);                                                          \
    }                                                                                                                  \
    extern "C" void attention_backward_##SUFFIX(                                                                       \
        const Threads* threads, const T* grad_out, const T* out, const T* lse, const T* query, const T* kv,            \
        const T* blank, const T* weight, const T* bias, const double* cells, const uint8_t* there,                     \
        const int64_t* lists, const int32_t* seen, const uint64_t* sees, T* keys, T* values, T* grad_query,            \
        T* grad_kv, T* grad_blank, T* grad_weight, T* grad_bias, int64_t batch, int64_t geometries, int64_t places,    \
        int64_t heads, int64_t d, int64_t everything) {                                                                \
        backward(threads, Problem<T> PROBLEM, grad_out, out, lse, keys, values,                                        \
                 Gradients<T>{grad_query, grad_kv, grad_blank, grad_weight, grad_bias});                               \
    }

ATTENTION(float, f32)
ATTENTION(double, f64)
