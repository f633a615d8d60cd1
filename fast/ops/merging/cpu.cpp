// Eq. 4 on a CPU: u_c = vec( sum_j s_j W(p_j - p_c) f_j^T ), W = GELU(LayerNorm(Linear(5, 4)(e))), and its gradients.
//
// Centres are taken in blocks. A block first computes the four weights of all its slots, with a vector's lanes standing
// for slots; then sums the features of each centre's neighbours, lanes standing for channels. The backward pass computes
// the weights again. Features and scores then collect their gradients token by token, from the slots that name them.
#include "vector_math.h"

namespace {

constexpr int64_t SLOTS = 128;  // of a block, if one centre has fewer
constexpr int64_t GRAIN = 8;    // blocks a thread takes at a time
constexpr int PARAMETERS = 32;  // (8, 4): five rows of the linear layer, its bias, the norm's gain and bias

// What both passes read.
template <class T>
struct Problem {
    const T* features;         // (B, n, C)
    const T* scores;           // (B, n) or null: 1
    const int64_t* positions;  // (B or 1, n, 2)
    const int64_t* kept;       // (B, K)
    const int64_t* neighbors;  // (B, K, M), negative in empty slots
    const T* parameters;       // (8, 4)
    int64_t sign, position_stride, batch, n, centres, slots, channels;

    int64_t rows() const { return std::max<int64_t>(1, SLOTS / std::max<int64_t>(1, slots)); }  // centres of a block
    int64_t blocks_per_image() const { return (centres + rows() - 1) / rows(); }
};

// Centres first .. first + count - 1 of an image.
struct Block {
    int64_t image, first, count;
};

template <class T>
Block block_at(const Problem<T>& p, int64_t number) {
    const int64_t per_image = p.blocks_per_image(), first = number % per_image * p.rows();
    return {number / per_image, first, std::min(p.rows(), p.centres - first)};
}

// The weight network on a block's slots; arrays (.., stride), slots of all its centres side by side.
template <class T, bool BACKWARD>
struct Network {
    int64_t stride;
    std::vector<T> memory;
    T *terms, *score, *present, *weights, *normal, *slope, *inverse;

    explicit Network(const Problem<T>& p) : stride(padded<T>(p.rows() * p.slots)), memory(stride * (BACKWARD ? 20 : 11)) {
        terms = memory.data();          // (5): dx, dy, distance, sine, cosine
        score = terms + 5 * stride;     // 1 without scores
        present = score + stride;       // 1, 0 in empty slots
        weights = present + stride;     // (4), 0 in empty slots
        normal = weights + 4 * stride;  // (4): the norm's result before its gain; this and the rest for the backward pass
        slope = normal + 4 * stride;    // (4): derivative of GELU, 0 in empty slots
        inverse = slope + 4 * stride;   // 1 / standard deviation
    }

    void load_slots(const Problem<T>& p, const Block& block) {
        const int64_t* positions = p.positions + block.image * p.position_stride;
        int64_t s = 0;
        for (int64_t row = block.first; row < block.first + block.count; row++) {
            const int64_t centre = p.kept[block.image * p.centres + row];
            const int64_t* tokens = p.neighbors + (block.image * p.centres + row) * p.slots;
            for (int64_t m = 0; m < p.slots; m++, s++) {
                const int64_t token = tokens[m] < 0 ? centre : tokens[m];
                terms[s] = (T)(p.sign * (positions[2 * token] - positions[2 * centre]));
                terms[stride + s] = (T)(p.sign * (positions[2 * token + 1] - positions[2 * centre + 1]));
                score[s] = p.scores ? p.scores[block.image * p.n + token] : (T)1;
                present[s] = tokens[m] >= 0;
            }
        }
        for (; s < stride; s++) terms[s] = terms[stride + s] = score[s] = present[s] = 0;
    }

    void run(const T* parameters) {
        typedef Vector<T> V;
        T W[PARAMETERS];
        memcpy(W, parameters, sizeof W);
        for (int64_t s = 0; s < stride; s += LANES<T>) {
            const V x = load(terms + s), y = load(terms + stride + s), distance = square_root<T>(x * x + y * y);
            const V divisor = maximum<T>(distance, splat(std::numeric_limits<T>::min()));
            const V e[5] = {x, y, distance, y / divisor, x / divisor};
            V hidden[4], square = {};
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                hidden[i] = splat(W[20 + i]);
#pragma GCC unroll 5
                for (int term = 0; term < 5; term++) hidden[i] += e[term] * W[4 * term + i];
            }
            const V mean = (hidden[0] + hidden[1] + hidden[2] + hidden[3]) * (T)0.25;
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) hidden[i] -= mean, square += hidden[i] * hidden[i];
            const V scale = 1 / square_root<T>(square * (T)0.25 + (T)1e-5);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                V bend;
                hidden[i] *= scale;
                store<T>(weights + i * stride + s, gelu<T>(hidden[i] * W[24 + i] + W[28 + i], bend) * load(present + s));
                if (BACKWARD) {
                    store<T>(normal + i * stride + s, hidden[i]);
                    store<T>(slope + i * stride + s, bend * load(present + s));
                }
            }
            if (BACKWARD) {
                store<T>(inverse + s, scale);
                for (int term = 2; term < 5; term++) store<T>(terms + term * stride + s, e[term]);
            }
        }
    }
};

// out[i][..] = sum_m weights[i][m] features[tokens[m]][..] of VECTORS vectors of channels, i = 0 .. 3.
template <class T, int VECTORS>
INLINE void mix(const T* features, const int64_t* tokens, const T* weights, int64_t stride, int64_t slots,
                int64_t channels, T* out) {
    Vector<T> sum[4][VECTORS] = {};
    for (int64_t m = 0; m < slots; m++) {
        if (tokens[m] < 0) continue;
        const T* row = features + tokens[m] * channels;
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            const Vector<T> f = load(row + v * LANES<T>);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) sum[i][v] += f * weights[i * stride + m];
        }
    }
    for (int i = 0; i < 4; i++)
        for (int v = 0; v < VECTORS; v++) store<T>(out + i * channels + v * LANES<T>, sum[i][v]);
}

template <class T>
void mix_row(const T* features, const int64_t* tokens, const T* weights, int64_t stride, int64_t slots,
             int64_t channels, T* out) {
    int64_t c = 0;
    for (; c + 4 * LANES<T> <= channels; c += 4 * LANES<T>)
        mix<T, 4>(features + c, tokens, weights, stride, slots, channels, out + c);
    for (; c + 2 * LANES<T> <= channels; c += 2 * LANES<T>)
        mix<T, 2>(features + c, tokens, weights, stride, slots, channels, out + c);
    for (; c + LANES<T> <= channels; c += LANES<T>)
        mix<T, 1>(features + c, tokens, weights, stride, slots, channels, out + c);
    for (; c < channels; c++) {
        T sum[4] = {};
        for (int64_t m = 0; m < slots; m++)
            if (tokens[m] >= 0)
                for (int i = 0; i < 4; i++) sum[i] += weights[i * stride + m] * features[tokens[m] * channels + c];
        for (int i = 0; i < 4; i++) out[i * channels + c] = sum[i];
    }
}

// out (B, K, 4, C)
template <class T>
void forward(const Threads* threads, const Problem<T>& p, T* out) {
    parallel_for(threads, p.batch * p.blocks_per_image(), GRAIN, [&](int64_t begin, int64_t end) {
        Network<T, false> network(p);
        for (int64_t number = begin; number < end; number++) {
            const Block block = block_at(p, number);
            network.load_slots(p, block);
            network.run(p.parameters);
            for (int i = 0; i < 4; i++)
                for (int64_t s = 0; s < network.stride; s++) network.weights[i * network.stride + s] *= network.score[s];
            for (int64_t row = 0; row < block.count; row++) {
                const int64_t centre = block.image * p.centres + block.first + row;
                mix_row(p.features + block.image * p.n * p.channels, p.neighbors + centre * p.slots,
                        network.weights + row * p.slots, network.stride, p.slots, p.channels,
                        out + centre * 4 * p.channels);
            }
        }
    });
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                           \
    extern "C" void forward_##SUFFIX(const Threads* threads, const T* features, const T* scores,                    \
                                     const int64_t* positions, const int64_t* kept, const int64_t* neighbors,       \
                                     const T* parameters, T* out, int64_t sign, int64_t position_stride,            \
                                     int64_t batch, int64_t n, int64_t centres, int64_t slots, int64_t channels) {  \
        forward<T>(threads, {features, scores, positions, kept, neighbors, parameters, sign, position_stride,       \
                             batch, n, centres, slots, channels}, out);                                             \
    }

EXPORT(float, f32)
EXPORT(double, f64)
