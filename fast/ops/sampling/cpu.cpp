// Values read at locations between tokens, on a CPU: out_h = sum_p attention_p sum_k w_pk value_kh, w of Shepard (paper
// sec. 4.1), and its gradients.
//
// A row is one query and head; it reads P locations, each from k tokens: given ones, or those that a table has for the
// cell that the location rounds to. With tables the queries are the tokens themselves: locations are given as offsets
// from the query's own position, attention as logits. Rows are taken in blocks. A block first computes the weights of
// all its locations, with a vector's lanes standing for locations; then sums the values of each row, lanes standing for
// channels.
#include "vector_math.h"

namespace {

constexpr int64_t PLACES = 128;  // of a block, if one row has fewer
constexpr int64_t GRAIN = 16;    // blocks a thread takes at a time
constexpr int64_t TABLE_TOKENS = 4;
constexpr double FLOOR = 1e-11;  // added to (d^2)^a

// What both passes read.
template <class T>
struct Problem {
    const T* locations;      // (B, q, H, P, 2); by table: less the position of the query's token
    const T* attention;      // (B, q, H, P) or null: 1; by table: logits
    const T* positions;      // (B or 1, n, 2)
    const T* values;         // (B, n, H, d)
    const int32_t* nearest;  // (B, q, H, P, k), negative for none; null: by table, k = 4
    const int32_t* tables;   // (L, B, height width, 4): location p of P is on level p / (P / L)
    T half_power;
    int64_t position_stride, batch, queries, heads, points, k, n, d, levels, height, width;

    int64_t rows() const { return batch * queries * heads; }
    int64_t block_rows() const { return std::max<int64_t>(1, PLACES / std::max<int64_t>(1, points)); }
    int64_t blocks() const { return (rows() + block_rows() - 1) / block_rows(); }
    int64_t image_of(int64_t row) const { return row / (queries * heads); }
    const T* values_of(int64_t row) const { return values + (image_of(row) * n * heads + row % heads) * d; }
};

// The locations of a block's rows, side by side; arrays (.., size) or (k, size).
template <class T>
struct Block {
    const Problem<T>& p;
    int64_t size, first, count, used;  // first row, rows, locations
    std::vector<T> memory;
    std::vector<int32_t> integers;
    T *x, *y, *attention, *away_x, *away_y, *present, *weights, *share, *by_power;
    int32_t *tokens, *cells;

    explicit Block(const Problem<T>& p, bool backward)
        : p(p), size(padded<T>(p.block_rows() * p.points)), first(0), count(0), used(0),
          memory(size * (3 + p.k * (backward ? 6 : 4))), integers(size * (1 + p.k)) {
        x = memory.data();               // of the locations
        y = x + size;
        attention = y + size;
        away_x = attention + size;       // (k): location - token
        away_y = away_x + p.k * size;    // (k)
        present = away_y + p.k * size;   // (k): 1, 0 where there is no token
        weights = present + p.k * size;  // (k)
        share = weights + p.k * size;    // (k): d^2a u, nearly 1; this and the next for the backward pass
        by_power = share + p.k * size;   // (k): derivative of -log2 u by a, less what all k of a location share
        cells = integers.data();
        tokens = cells + size;           // (k)
    }

    // Rows number * block_rows() and so on.
    void take(int64_t number) {
        first = number * p.block_rows(), count = std::min(p.block_rows(), p.rows() - first), used = count * p.points;
        const T* locations = p.locations + 2 * first * p.points;
        for (int64_t s = 0; s < used; s++) x[s] = locations[2 * s], y[s] = locations[2 * s + 1];
        for (int64_t s = used; s < size; s++) x[s] = y[s] = 0;
        std::fill_n(attention, size, (T)1);
        if (p.attention) std::copy_n(p.attention + first * p.points, used, attention);
        if (p.tables) add_positions(), soften();
        const std::vector<int32_t> none(p.k, -1);
        for (int64_t s = used; s < size; s++) load_tokens(s, p.k, none.data(), p.positions);
        if (p.nearest)
            load_nearest();
        else
            look_up();
    }

    // From offsets to locations.
    void add_positions() {
        for (int64_t row = 0, s = 0; row < count; row++) {
            const int64_t number = (first + row) / p.heads, image = number / p.queries;
            const T* own = p.positions + image * p.position_stride + 2 * (number - image * p.queries);
            for (const int64_t end = s + p.points; s < end; s++) x[s] += own[0], y[s] += own[1];
        }
    }

    // From logits to attention: softmax over the locations of a row.
    void soften() {
        T* row = attention;
        for (int64_t i = 0; i < count; i++, row += p.points) {
            const T most = *std::max_element(row, row + p.points);
            for (int64_t j = 0; j < p.points; j++) row[j] = (row[j] - most) * (T)(1 / LN_2);
        }
        for (int64_t s = 0; s < size; s += LANES<T>) store<T>(attention + s, exp2_of<T>(load(attention + s)));
        row = attention;
        for (int64_t i = 0; i < count; i++, row += p.points) {
            T sum = 0;
            for (int64_t j = 0; j < p.points; j++) sum += row[j];
            for (int64_t j = 0; j < p.points; j++) row[j] /= sum;
        }
    }

    // Gradients of logits from those of attention, in place.
    void harden(T* grads) const {
        const T* row = attention;
        for (int64_t i = 0; i < count; i++, row += p.points, grads += p.points) {
            T mean = 0;
            for (int64_t j = 0; j < p.points; j++) mean += row[j] * grads[j];
            for (int64_t j = 0; j < p.points; j++) grads[j] = row[j] * (grads[j] - mean);
        }
    }

    // The k tokens of location s.
    INLINE void load_tokens(int64_t s, int64_t k, const int32_t* from, const T* positions) {
        int32_t* token = tokens + s;
        T *here = present + s, *dx = away_x + s, *dy = away_y + s;
        const T px = x[s], py = y[s];
        const int64_t step = size;
        for (int64_t j = 0; j < k; j++) {
            const int64_t t = from[j];
            const T* at = positions + 2 * (t < 0 ? 0 : t);
            token[j * step] = (int32_t)t, here[j * step] = t < 0 ? (T)0 : (T)1;
            dx[j * step] = px - at[0], dy[j * step] = py - at[1];
        }
    }

    void load_nearest() {
        const int32_t* nearest = p.nearest + first * p.points * p.k;
        for (int64_t row = 0, s = 0; row < count; row++) {
            const T* positions = p.positions + p.image_of(first + row) * p.position_stride;
            for (int64_t point = 0; point < p.points; point++, s++) load_tokens(s, p.k, nearest + s * p.k, positions);
        }
    }

    // By the cells that the locations round to, half to even and clamped to the grid; what is read is prefetched.
    void look_up() {
        typedef Integers<T> I;
        for (int64_t s = 0; s < size; s += LANES<T>) {
            const auto column = minimum<T>(maximum<T>(load(x + s), Vector<T>{}), splat<T>(p.width - 1));
            const auto line = minimum<T>(maximum<T>(load(y + s), Vector<T>{}), splat<T>(p.height - 1));
            const I cell = __builtin_convertvector(round_half_even<T>(line), I) * (typename Format<T>::Bits)p.width +
                           __builtin_convertvector(round_half_even<T>(column), I);
            for (int i = 0; i < LANES<T>; i++) cells[s + i] = (int32_t)cell[i];
        }
        const int64_t of_image = p.height * p.width * TABLE_TOKENS, points = p.points / p.levels;
        for (int64_t row = 0, s = 0; row < count; row++) {
            const int64_t image = p.image_of(first + row);
            const T *positions = p.positions + image * p.position_stride, *values = p.values_of(first + row);
            for (int64_t level = 0; level < p.levels; level++) {
                const int32_t* table = p.tables + (level * p.batch + image) * of_image;
                for (int64_t end = s + points; s < end; s++) {
                    const int32_t* found = table + cells[s] * TABLE_TOKENS;
                    if (s + p.points < used) __builtin_prefetch(table + cells[s + p.points] * TABLE_TOKENS);
                    load_tokens(s, TABLE_TOKENS, found, positions);
                    for (int64_t j = 0; j < TABLE_TOKENS; j++)
                        for (int64_t c = 0; c < p.d; c += 64 / sizeof(T))
                            __builtin_prefetch(values + std::max<int64_t>(found[j], 0) * p.heads * p.d + c);
                }
            }
        }
    }

    // Weights w = u / sum u, u = 1 / ((d^2)^a + 1e-11), of K tokens a location (0: of any number).
    //
    // u is computed times d0^2a, d0 the least distance but at least 1: that loses fewer digits and cannot overflow.
    template <int K>
    void weigh(bool backward) {
        typedef Vector<T> V;
        const T a = p.half_power;
        const int64_t k = K ? K : p.k;
        for (int64_t s = 0; s < size; s += LANES<T>) {
            V least = splat(std::numeric_limits<T>::max()), total = {};
            const auto squared = [&](int64_t j) {
                const V dx = load(away_x + j * size + s), dy = load(away_y + j * size + s);
                return dx * dx + dy * dy;
            };
#pragma GCC unroll 4
            for (int64_t j = 0; j < k; j++)
                least = load(present + j * size + s) > 0 ? minimum<T>(squared(j), least) : least;
            const V base = maximum<T>(least, splat<T>(1)), inverse = 1 / base, scale = log2_of<T>(base);
            const V floor = exp2_of<T>(scale * -a) * (T)FLOOR;
#pragma GCC unroll 4
            for (int64_t j = 0; j < k; j++) {
                const V square = squared(j), here = load(present + j * size + s);
                const V exponent = log2_of<T>(square == 0 ? splat<T>(1) : square * inverse);
                const V power = square == 0 ? V{} : exp2_of<T>(exponent * a);
                const V u = here / (power + floor);
                store<T>(weights + j * size + s, u);
                if (backward) {
                    store<T>(share + j * size + s, power * u);
                    store<T>(by_power + j * size + s, power * u * exponent - floor * u * scale);
                }
                total += u;
            }
            total = 1 / total;
#pragma GCC unroll 4
            for (int64_t j = 0; j < k; j++)
                store<T>(weights + j * size + s, load(weights + j * size + s) * total);
        }
    }

    void weigh(bool backward) { p.k == 4 ? weigh<4>(backward) : weigh<0>(backward); }
};

// out = sum_s weights[s] values[tokens[s]] of VECTORS vectors of channels, s over the locations of a row and their
// tokens, K of a location (0: any number).
template <class T, int K, int VECTORS>
INLINE void sum_row(const Block<T>& block, const T* values, int64_t s, T* out) {
    const int64_t stride = block.p.heads * block.p.d, k = K ? K : block.p.k, size = block.size;
    const int32_t* tokens = block.tokens;
    const T* weights = block.weights;
    Vector<T> even[VECTORS] = {}, odd[VECTORS] = {};
    for (const int64_t end = s + block.p.points; s < end; s++) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < k; j++) {
            const int64_t token = tokens[j * size + s];
            if (token < 0) continue;
            const T* row = values + token * stride;
            const T weight = weights[j * size + s];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                if (K && j % 2)
                    odd[v] += load(row + v * LANES<T>) * weight;
                else
                    even[v] += load(row + v * LANES<T>) * weight;
            }
        }
    }
    for (int v = 0; v < VECTORS; v++) store<T>(out + v * LANES<T>, even[v] + odd[v]);
}

template <class T, int K>
void sum_rows(const Block<T>& block, T* out) {
    const Problem<T>& p = block.p;
    for (int64_t row = 0; row < block.count; row++, out += p.d) {
        const T* values = p.values_of(block.first + row);
        int64_t c = 0, s = row * p.points;
        for (; c + 4 * LANES<T> <= p.d; c += 4 * LANES<T>) sum_row<T, K, 4>(block, values + c, s, out + c);
        for (; c + 2 * LANES<T> <= p.d; c += 2 * LANES<T>) sum_row<T, K, 2>(block, values + c, s, out + c);
        for (; c + LANES<T> <= p.d; c += LANES<T>) sum_row<T, K, 1>(block, values + c, s, out + c);
        for (; c < p.d; c++) {
            T sum = 0;
            for (int64_t i = s; i < s + p.points; i++)
                for (int64_t slot = i; slot < p.k * block.size; slot += block.size)
                    if (block.tokens[slot] >= 0)
                        sum += block.weights[slot] * values[block.tokens[slot] * p.heads * p.d + c];
            out[c] = sum;
        }
    }
}

// out (B, q, H, d)
template <class T>
void forward(const Threads* threads, const Problem<T>& p, T* out_all) {
    parallel_for(threads, p.blocks(), GRAIN, [&](int64_t begin, int64_t end) {
        Block<T> block(p, false);
        for (int64_t number = begin; number < end; number++) {
            block.take(number);
            block.weigh(false);
            for (int64_t j = 0; j < p.k; j++)
                for (int64_t s = 0; s < block.size; s++) block.weights[j * block.size + s] *= block.attention[s];
            T* out = out_all + block.first * p.d;
            p.k == 4 ? sum_rows<T, 4>(block, out) : sum_rows<T, 0>(block, out);
        }
    });
}

// products[s] = grad . values[tokens[s]], 0 without a token, for the slots of a row; grad (d), products (k, size)
template <class T>
void project_row(const Block<T>& block, const T* values, const T* grad, int64_t s, T* products) {
    const int64_t d = block.p.d, stride = block.p.heads * d;
    for (const int64_t end = s + block.p.points; s < end; s++)
        for (int64_t slot = s; slot < block.p.k * block.size; slot += block.size) {
            Vector<T> sum = {};
            T rest = 0;
            if (block.tokens[slot] >= 0) {
                const T* row = values + block.tokens[slot] * stride;
                int64_t c = 0;
                for (; c + LANES<T> <= d; c += LANES<T>) sum += load(row + c) * load(grad + c);
                for (; c < d; c++) rest += row[c] * grad[c];
            }
            products[slot] = sum_lanes<T>(sum) + rest;
        }
}

// From products (k, size) back through attention and Shepard's weights: writes the gradients of a block's locations (x, y)
// and attention, (size) each, and returns the half power's.
template <class T>
double differentiate(const Block<T>& block, T* products, T* of_x, T* of_y, T* of_attention) {
    typedef Vector<T> V;
    const int64_t size = block.size, k = block.p.k;
    std::vector<T> of_power(size);
    for (int64_t s = 0; s < size; s += LANES<T>) {
        const V attention = load(block.attention + s), shift = load(products + s);
        V total = {}, mean = {}, x = {}, y = {}, power = {};
        for (int64_t j = s; j < k * size; j += size) {
            const V w = load(block.weights + j), product = load(products + j);
            total += w * product;
            mean += w * (product - shift);  // the shift changes nothing but rounding: sum w = 1
        }
        store<T>(of_attention + s, total);
        for (int64_t j = s; j < k * size; j += size) {
            const V dx = load(block.away_x + j), dy = load(block.away_y + j), square = dx * dx + dy * dy;
            const V centred = mean - (load(products + j) - shift);
            const V slope = load(block.weights + j) * attention * centred;  // by -ln u
            const V factor = load(block.share + j) * (2 * block.p.half_power) / (square == 0 ? splat<T>(1) : square);
            x += slope * factor * dx, y += slope * factor * dy, power += slope * load(block.by_power + j);
        }
        store<T>(of_x + s, x), store<T>(of_y + s, y), store<T>(of_power.data() + s, power);
    }
    double sum = 0;
    for (int64_t s = 0; s < block.used; s++) sum += of_power[s];
    return sum * LN_2;
}

// grad_values[token] += weight grad, VECTORS vectors of channels of one image and head, over all its queries in order;
// grad (q, H, d) and grad_values (n, H, d) at the head and channels; weights and tokens (q, H, P k) at the head.
template <class T, int VECTORS>
INLINE void scatter(const T* grad, const T* weights, const int32_t* tokens, int64_t queries, int64_t slots,
                    int64_t heads, int64_t stride, T* grad_values) {
    for (int64_t q = 0; q < queries; q++, grad += stride, weights += heads * slots, tokens += heads * slots) {
        Vector<T> g[VECTORS];
        for (int v = 0; v < VECTORS; v++) g[v] = load(grad + v * LANES<T>);
        for (int64_t s = 0; s < slots; s++) {
            if (tokens[s] < 0) continue;
            T* to = grad_values + tokens[s] * stride;
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) add<T>(to + v * LANES<T>, g[v] * weights[s]);
        }
    }
}

// Each task owns the values of one image and head, and a few of their channels: no two write to the same place.
template <class T>
void scatter_values(const Threads* threads, const Problem<T>& p, const T* grad, const T* weights,
                    const int32_t* tokens, T* grad_values) {
    constexpr int64_t CHANNELS = 128 / sizeof(T);
    const int64_t pieces = (p.d + CHANNELS - 1) / CHANNELS, stride = p.heads * p.d, slots = p.points * p.k;
    parallel_for(threads, p.batch * p.heads * pieces, 1, [&](int64_t task, int64_t) {
        const int64_t image = task / pieces / p.heads, head = task / pieces % p.heads;
        int64_t c = task % pieces * CHANNELS;
        const int64_t end = std::min(p.d, c + CHANNELS);
        const int64_t first = image * p.queries * p.heads + head;
        const T* g = grad + first * p.d;
        T* to = grad_values + (image * p.n * p.heads + head) * p.d;
        for (int64_t t = 0; t < p.n; t++) std::fill(to + t * stride + c, to + t * stride + end, (T)0);
        const T* w = weights + first * slots;
        const int32_t* at = tokens + first * slots;
        constexpr int VECTORS = CHANNELS / LANES<T>;
        for (; c + CHANNELS <= end; c += CHANNELS)
            scatter<T, VECTORS>(g + c, w, at, p.queries, slots, p.heads, stride, to + c);
        for (; c + LANES<T> <= end; c += LANES<T>)
            scatter<T, 1>(g + c, w, at, p.queries, slots, p.heads, stride, to + c);
        if (c == end) return;
        for (int64_t q = 0; q < p.queries; q++)
            for (int64_t s = q * p.heads * slots; s < q * p.heads * slots + slots; s++)
                if (at[s] >= 0)
                    for (int64_t i = c; i < end; i++) to[at[s] * stride + i] += w[s] * g[q * stride + i];
    });
}

// grad (B, q, H, d), grad_locations (B, q, H, P, 2) or null, grad_attention (B, q, H, P) or null,
// grad_values (B, n, H, d), grad_power (1)
template <class T>
void backward(const Threads* threads, const Problem<T>& p, const T* grad, T* grad_locations, T* grad_attention,
              T* grad_values, T* grad_power) {
    const int64_t slots = p.points * p.k;
    std::vector<T> weights(p.rows() * slots);       // (B, q, H, P, k), with attention
    std::vector<int32_t> tokens(p.rows() * slots);  // (B, q, H, P, k)
    std::vector<double> partial(p.blocks());
    parallel_for(threads, p.blocks(), GRAIN, [&](int64_t begin, int64_t end) {
        Block<T> block(p, true);
        const int64_t size = block.size;
        std::vector<T> products(p.k * size), of_x(size), of_y(size), of_attention(size);
        for (int64_t number = begin; number < end; number++) {
            block.take(number);
            block.weigh(true);
            for (int64_t j = 0; j < p.k; j++)
                std::fill(products.data() + j * size + block.used, products.data() + (j + 1) * size, (T)0);
            for (int64_t row = 0; row < block.count; row++)
                project_row(block, p.values_of(block.first + row), grad + (block.first + row) * p.d, row * p.points,
                            products.data());
            partial[number] = differentiate(block, products.data(), of_x.data(), of_y.data(), of_attention.data());
            if (p.tables) block.harden(of_attention.data());
            const int64_t first = block.first * p.points;
            for (int64_t s = 0; s < block.used; s++) {
                T* at = grad_locations + 2 * (first + s);
                if (grad_locations) at[0] = of_x[s], at[1] = of_y[s];
                if (grad_attention) grad_attention[first + s] = of_attention[s];
                for (int64_t j = 0; j < p.k; j++) {
                    weights[(first + s) * p.k + j] = block.weights[j * size + s] * block.attention[s];
                    tokens[(first + s) * p.k + j] = block.tokens[j * size + s];
                }
            }
        }
    });
    double sum = 0;
    for (double part : partial) sum += part;
    grad_power[0] = (T)sum;
    scatter_values(threads, p, grad, weights.data(), tokens.data(), grad_values);
}

}  // namespace

#define INPUTS(T)                                                                                                      \
    const T *locations, const T *attention, const T *positions, const T *values, const int32_t *nearest,               \
        const int32_t *tables
#define SIZES                                                                                                          \
    double half_power, int64_t position_stride, int64_t batch, int64_t queries, int64_t heads, int64_t points,         \
        int64_t k, int64_t n, int64_t d, int64_t levels, int64_t height, int64_t width
#define PROBLEM(T)                                                                                                     \
    {locations, attention, positions, values, nearest, tables, (T)half_power, position_stride, batch, queries, heads,  \
     points, k, n, d, levels, height, width}
#define EXPORT(T, SUFFIX)                                                                                              \
    extern "C" void forward_##SUFFIX(const Threads* threads, INPUTS(T), T* out, SIZES) {                               \
        forward<T>(threads, PROBLEM(T), out);                                                                          \
    }                                                                                                                  \
    extern "C" void backward_##SUFFIX(const Threads* threads, const T* grad, INPUTS(T), T* grad_locations,             \
                                      T* grad_attention, T* grad_values, T* grad_power, SIZES) {                       \
        backward<T>(threads, PROBLEM(T), grad, grad_locations, grad_attention, grad_values, grad_power);                  \
    }

EXPORT(float, f32)
EXPORT(double, f64)
