// Eq. 4 on a CPU: u_c = vec( sum_j s_j W(p_j - p_c) f_j^T ), W = GELU(LayerNorm(Linear(5, 4)(e))), and its gradients.
//
// Centres are taken in blocks. A block first computes the four weights of all its slots, with a vector's lanes standing
// for slots; then sums the features of each centre's neighbours, lanes standing for channels. The backward pass makes
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

    explicit Network(const Problem<T>& p)
        : stride(padded<T>(p.rows() * p.slots)), memory(stride * (BACKWARD ? 20 : 11)) {
        terms = memory.data();          // (5): dx, dy, distance, sine, cosine
        score = terms + 5 * stride;     // 1 without scores
        present = score + stride;       // 1, 0 in empty slots
        weights = present + stride;     // (4), 0 in empty slots
        normal = weights + 4 * stride;  // (4): the norm's result before its gain; from here on for the backward pass
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
                const V weight = gelu<T>(hidden[i] * W[24 + i] + W[28 + i], bend);
                store<T>(weights + i * stride + s, weight * load(present + s));
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
            const int64_t stride = network.stride;
            for (int i = 0; i < 4; i++)
                for (int64_t s = 0; s < stride; s++) network.weights[i * stride + s] *= network.score[s];
            for (int64_t row = 0; row < block.count; row++) {
                const int64_t centre = block.image * p.centres + block.first + row;
                mix_row(p.features + block.image * p.n * p.channels, p.neighbors + centre * p.slots,
                        network.weights + row * p.slots, network.stride, p.slots, p.channels,
                        out + centre * 4 * p.channels);
            }
        }
    });
}

// products[i][m] = features[tokens[m]] . grad[i], 0 in empty slots; grad (4, C), products (4, stride)
template <class T>
void project_row(const T* features, const int64_t* tokens, const T* grad, int64_t stride, int64_t slots,
                 int64_t channels, T* products) {
    for (int64_t m = 0; m < slots; m++) {
        Vector<T> sum[4] = {};
        T rest[4] = {};
        if (tokens[m] >= 0) {
            const T* row = features + tokens[m] * channels;
            int64_t c = 0;
            for (; c + LANES<T> <= channels; c += LANES<T>) {
                const Vector<T> f = load(row + c);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) sum[i] += f * load(grad + i * channels + c);
            }
            for (; c < channels; c++)
                for (int i = 0; i < 4; i++) rest[i] += row[c] * grad[i * channels + c];
        }
        for (int i = 0; i < 4; i++) products[i * stride + m] = sum_lanes<T>(sum[i]) + rest[i];
    }
}

// From products (4, stride) back through GELU, layer norm and linear layer of a block's slots: adds to the gradients of
// the parameters, lane by lane, and writes those of the slots' scores, one number a slot.
template <class T>
void differentiate(const Network<T, true>& network, const T* parameters, const T* products, Vector<T>* sums,
                   T* of_score) {
    typedef Vector<T> V;
    const int64_t stride = network.stride;
    for (int64_t s = 0; s < stride; s += LANES<T>) {
        const V score = load(network.score + s);
        V normal[4], inner[4], hidden[4], mean = {}, slope = {}, total = {};
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const V product = load(products + i * stride + s);
            normal[i] = load(network.normal + i * stride + s);
            total += product * load(network.weights + i * stride + s);
            inner[i] = product * score * load(network.slope + i * stride + s);
            hidden[i] = inner[i] * parameters[24 + i];
            mean += hidden[i] * (T)0.25;
            slope += hidden[i] * normal[i] * (T)0.25;
        }
        store<T>(of_score + s, total);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            hidden[i] = load(network.inverse + s) * (hidden[i] - mean - normal[i] * slope);
            for (int term = 0; term < 5; term++)
                sums[4 * term + i] += load(network.terms + term * stride + s) * hidden[i];
            sums[20 + i] += hidden[i];
            sums[24 + i] += inner[i] * normal[i];
            sums[28 + i] += inner[i];
        }
    }
}

// Slots read from the other end: token t of an image is named by the slots entries[offsets[t]], .. up to but without
// entries[offsets[t + 1]], in ascending order. offsets (n + 1), entries (size).
inline void transpose(const int64_t* neighbors, int64_t size, int64_t n, int64_t* offsets, int64_t* entries) {
    std::fill(offsets, offsets + n + 1, 0);
    for (int64_t e = 0; e < size; e++)
        if (neighbors[e] >= 0) offsets[neighbors[e] + 1]++;
    for (int64_t t = 0; t < n; t++) offsets[t + 1] += offsets[t];
    std::vector<int64_t> next(offsets, offsets + n);
    for (int64_t e = 0; e < size; e++)
        if (neighbors[e] >= 0) entries[next[neighbors[e]]++] = e;
}

// out[..] = sum_e sum_i weights[e][i] grad[e / M][i][..] of VECTORS vectors of channels; grad (K, 4, C)
template <class T, int VECTORS>
INLINE void collect(const T* grad, const T* weights, const int64_t* entry, const int64_t* last, int64_t slots,
                    int64_t channels, T* out) {
    Vector<T> sum[2][VECTORS] = {};
    for (; entry < last; entry++) {
        const T* row = grad + *entry / slots * 4 * channels;
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const T weight = weights[4 * *entry + i];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sum[i & 1][v] += load(row + i * channels + v * LANES<T>) * weight;
        }
    }
    for (int v = 0; v < VECTORS; v++) store<T>(out + v * LANES<T>, sum[0][v] + sum[1][v]);
}

template <class T>
void collect_row(const T* grad, const T* weights, const int64_t* entry, const int64_t* last, int64_t slots,
                 int64_t channels, T* out) {
    int64_t c = 0;
    for (; c + 4 * LANES<T> <= channels; c += 4 * LANES<T>)
        collect<T, 4>(grad + c, weights, entry, last, slots, channels, out + c);
    for (; c + LANES<T> <= channels; c += LANES<T>)
        collect<T, 1>(grad + c, weights, entry, last, slots, channels, out + c);
    for (; c < channels; c++) {
        T sum = 0;
        for (const int64_t* e = entry; e < last; e++)
            for (int i = 0; i < 4; i++) sum += weights[4 * *e + i] * grad[(*e / slots * 4 + i) * channels + c];
        out[c] = sum;
    }
}

// grad (B, K, 4, C), grad_features (B, n, C), grad_scores (B, n) or null, grad_parameters (8, 4)
template <class T>
void backward(const Threads* threads, const Problem<T>& p, const T* grad, T* grad_features, T* grad_scores,
              T* grad_parameters) {
    const int64_t blocks = p.batch * p.blocks_per_image(), of_image = p.centres * p.slots;
    std::vector<T> weights(p.batch * of_image * 4);  // (B, K, M, 4), with the score
    std::vector<T> of_slot(p.batch * of_image);      // (B, K, M): gradient of the slot's score
    std::vector<T> partial((blocks + GRAIN - 1) / GRAIN * PARAMETERS);
    parallel_for(threads, blocks, GRAIN, [&](int64_t begin, int64_t end) {
        Network<T, true> network(p);
        const int64_t stride = network.stride;
        std::vector<T> products(4 * stride), of_score(stride);
        Vector<T> sums[PARAMETERS] = {};
        for (int64_t number = begin; number < end; number++) {
            const Block block = block_at(p, number);
            const int64_t first = block.image * p.centres + block.first, used = block.count * p.slots;
            network.load_slots(p, block);
            network.run(p.parameters);
            for (int64_t row = 0; row < block.count; row++)
                project_row(p.features + block.image * p.n * p.channels, p.neighbors + (first + row) * p.slots,
                            grad + (first + row) * 4 * p.channels, stride, p.slots, p.channels,
                            products.data() + row * p.slots);
            for (int i = 0; i < 4; i++) std::fill_n(products.data() + i * stride + used, stride - used, (T)0);
            differentiate(network, p.parameters, products.data(), sums, of_score.data());
            std::copy_n(of_score.data(), used, of_slot.data() + first * p.slots);
            T* to = weights.data() + first * p.slots * 4;
            for (int64_t s = 0; s < used; s++)
                for (int i = 0; i < 4; i++) to[4 * s + i] = network.weights[i * stride + s] * network.score[s];
        }
        for (int i = 0; i < PARAMETERS; i++) partial[begin / GRAIN * PARAMETERS + i] = sum_lanes<T>(sums[i]);
    });
    for (int i = 0; i < PARAMETERS; i++) {
        double sum = 0;
        for (size_t part = i; part < partial.size(); part += PARAMETERS) sum += partial[part];
        grad_parameters[i] = (T)sum;
    }
    std::vector<int64_t> offsets(p.batch * (p.n + 1)), entries(p.batch * of_image);
    parallel_for(threads, p.batch, 1, [&](int64_t begin, int64_t) {
        transpose(p.neighbors + begin * of_image, of_image, p.n, offsets.data() + begin * (p.n + 1),
                  entries.data() + begin * of_image);
    });
    parallel_for(threads, p.batch * p.n, 64, [&](int64_t begin, int64_t end) {
        for (int64_t number = begin; number < end; number++) {
            const int64_t image = number / p.n, *offset = offsets.data() + number + image;
            const int64_t* entry = entries.data() + image * of_image;
            const T* of_score = of_slot.data() + image * of_image;
            collect_row(grad + image * p.centres * 4 * p.channels, weights.data() + image * of_image * 4,
                        entry + offset[0], entry + offset[1], p.slots, p.channels, grad_features + number * p.channels);
            if (!grad_scores) continue;
            T sum = 0;
            for (int64_t e = offset[0]; e < offset[1]; e++) sum += of_score[entry[e]];
            grad_scores[number] = sum;
        }
    });
}

}  // namespace

#define INPUTS(T)                                                                                                    \
    const T *features, const T *scores, const int64_t *positions, const int64_t *kept, const int64_t *neighbors,     \
        const T *parameters
#define SIZES                                                                                                        \
    int64_t sign, int64_t position_stride, int64_t batch, int64_t n, int64_t centres, int64_t slots, int64_t channels
#define PROBLEM                                                                                                      \
    {features, scores, positions, kept, neighbors, parameters, sign, position_stride, batch, n, centres, slots,      \
     channels}
#define EXPORT(T, SUFFIX)                                                                                            \
    extern "C" void forward_##SUFFIX(const Threads* threads, INPUTS(T), T* out, SIZES) {                             \
        forward<T>(threads, PROBLEM, out);                                                                           \
    }                                                                                                                \
    extern "C" void backward_##SUFFIX(const Threads* threads, const T* grad, INPUTS(T), T* grad_features,            \
                                      T* grad_scores, T* grad_parameters, SIZES) {                                   \
        backward<T>(threads, PROBLEM, grad, grad_features, grad_scores, grad_parameters);                            \
    }

EXPORT(float, f32)
EXPORT(double, f64)
