// Values read at places between tokens, on a CPU: out_h = sum_p attention_p sum_k w_pk value_kh, w of Shepard (paper
// sec. 4.1), and its gradients.
//
// A row is one query and head; it reads P places, each from k tokens: given ones, or those that a table has for the cell
// that the place rounds to. Rows are taken in blocks. A block first computes the weights of all its places, with a
// vector's lanes standing for places; then sums the values of each row, lanes standing for channels.
#include "vector_math.h"

namespace {

constexpr int64_t PLACES = 128;  // of a block, if one row has fewer
constexpr int64_t GRAIN = 16;    // blocks a thread takes at a time
constexpr int64_t TABLE_TOKENS = 4;
constexpr double FLOOR = 1e-11;  // added to (d^2)^a

// What both passes read.
template <class T>
struct Problem {
    const T* places;         // (B, q, H, P, 2)
    const T* attention;      // (B, q, H, P) or null: 1
    const T* positions;      // (B or 1, n, 2)
    const T* values;         // (B, n, H, d)
    const int32_t* nearest;  // (B, q, H, P, k), negative for none; null: by table, k = 4
    const int32_t* tables;   // (L, B, height width, 4): place p of P is on level p / (P / L)
    T half_power;
    int64_t position_stride, batch, queries, heads, points, k, n, d, levels, height, width;

    int64_t rows() const { return batch * queries * heads; }
    int64_t block_rows() const { return std::max<int64_t>(1, PLACES / std::max<int64_t>(1, points)); }
    int64_t blocks() const { return (rows() + block_rows() - 1) / block_rows(); }
    int64_t image_of(int64_t row) const { return row / (queries * heads); }
    const T* values_of(int64_t row) const { return values + (image_of(row) * n * heads + row % heads) * d; }
};

// The places of a block's rows, side by side; arrays (.., size) or (k, size).
template <class T>
struct Block {
    const Problem<T>& p;
    int64_t size, first, count, used;  // first row, rows, places
    std::vector<T> memory;
    std::vector<int32_t> integers;
    T *x, *y, *attention, *away_x, *away_y, *present, *weights, *share, *logarithm;
    int32_t *tokens, *cells;

    explicit Block(const Problem<T>& p, bool backward)
        : p(p), size(padded<T>(p.block_rows() * p.points)), first(0), count(0), used(0),
          memory(size * (3 + p.k * (backward ? 6 : 4))), integers(size * (1 + p.k)) {
        x = memory.data();               // of the places
        y = x + size;
        attention = y + size;
        away_x = attention + size;       // (k): place - token
        away_y = away_x + p.k * size;    // (k)
        present = away_y + p.k * size;   // (k): 1, 0 where there is no token
        weights = present + p.k * size;  // (k)
        share = weights + p.k * size;    // (k): d^2a / (d^2a + floor); this and the next for the backward pass
        logarithm = share + p.k * size;  // (k): log2 of d^2, but for a constant of each place; 0 at a token
        cells = integers.data();
        tokens = cells + size;           // (k)
    }

    // Rows number * block_rows() and so on.
    void take(int64_t number) {
        first = number * p.block_rows(), count = std::min(p.block_rows(), p.rows() - first), used = count * p.points;
        const T* places = p.places + 2 * first * p.points;
        for (int64_t s = 0; s < size; s++) x[s] = s < used ? places[2 * s] : 0, y[s] = s < used ? places[2 * s + 1] : 0;
        for (int64_t s = 0; s < size; s++) attention[s] = s < used && p.attention ? p.attention[first * p.points + s] : 1;
        for (int64_t i = used; i < size; i++)
            for (int64_t j = 0; j < p.k; j++) load_token(j * size + i, i, -1, p.positions);
        p.nearest ? load_nearest() : look_up();
    }

    void load_token(int64_t slot, int64_t s, int32_t token, const T* positions) {
        const T* at = positions + 2 * (int64_t)(token < 0 ? 0 : token);
        tokens[slot] = token, present[slot] = token >= 0;
        away_x[slot] = x[s] - at[0], away_y[slot] = y[s] - at[1];
    }

    void load_nearest() {
        const int32_t* nearest = p.nearest + first * p.points * p.k;
        for (int64_t row = 0, s = 0; row < count; row++) {
            const T* positions = p.positions + p.image_of(first + row) * p.position_stride;
            for (int64_t point = 0; point < p.points; point++, s++)
                for (int64_t j = 0; j < p.k; j++) load_token(j * size + s, s, nearest[s * p.k + j], positions);
        }
    }

    // By the cells that the places round to, half to even and clamped to the grid.
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
            const T* positions = p.positions + image * p.position_stride;
            for (int64_t level = 0; level < p.levels; level++) {
                const int32_t* table = p.tables + (level * p.batch + image) * of_image;
                for (int64_t end = s + points; s < end; s++)
                    for (int64_t j = 0; j < TABLE_TOKENS; j++)
                        load_token(j * size + s, s, table[cells[s] * TABLE_TOKENS + j], positions);
            }
        }
    }

    // Weights w = u / sum u, u = 1 / ((d^2)^a + 1e-11), of K tokens a place (0: of any number).
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
            const V base = maximum<T>(least, splat<T>(1)), inverse = 1 / base;
            const V floor = exp2_of<T>(log2_of<T>(base) * -a) * (T)FLOOR;
#pragma GCC unroll 4
            for (int64_t j = 0; j < k; j++) {
                const V square = squared(j), here = load(present + j * size + s);
                const V exponent = log2_of<T>(square == 0 ? splat<T>(1) : square * inverse);
                const V power = square == 0 ? V{} : exp2_of<T>(exponent * a);
                const V u = here / (power + floor);
                store<T>(weights + j * size + s, u);
                if (backward) store<T>(share + j * size + s, power * u), store<T>(logarithm + j * size + s, exponent);
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

// out = sum_s weights[s] values[tokens[s]] of VECTORS vectors of channels, s over `points` places of a row and k tokens.
template <class T, int VECTORS>
INLINE void sum_row(const Block<T>& block, const T* values, int64_t s, T* out) {
    const int64_t stride = block.p.heads * block.p.d, k = block.p.k;
    Vector<T> sum[2][VECTORS] = {};
    for (const int64_t end = s + block.p.points; s < end; s++) {
        int64_t j = 0;
        for (; j < k; j++) {
            const int64_t token = block.tokens[j * block.size + s];
            if (token < 0) continue;
            const T weight = block.weights[j * block.size + s];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++)
                sum[j & 1][v] += load(values + token * stride + v * LANES<T>) * weight;
        }
    }
    for (int v = 0; v < VECTORS; v++) store<T>(out + v * LANES<T>, sum[0][v] + sum[1][v]);
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
            for (int64_t row = 0; row < block.count; row++) {
                const T* values = p.values_of(block.first + row);
                T* out = out_all + (block.first + row) * p.d;
                int64_t c = 0, s = row * p.points;
                for (; c + 4 * LANES<T> <= p.d; c += 4 * LANES<T>) sum_row<T, 4>(block, values + c, s, out + c);
                for (; c + 2 * LANES<T> <= p.d; c += 2 * LANES<T>) sum_row<T, 2>(block, values + c, s, out + c);
                for (; c + LANES<T> <= p.d; c += LANES<T>) sum_row<T, 1>(block, values + c, s, out + c);
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
    });
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                              \
    extern "C" void forward_##SUFFIX(const Threads* threads, const T* places, const T* attention, const T* positions,  \
                                     const T* values, const int32_t* nearest, const int32_t* tables, T* out,           \
                                     double half_power, int64_t position_stride, int64_t batch, int64_t queries,       \
                                     int64_t heads, int64_t points, int64_t k, int64_t n, int64_t d, int64_t levels,   \
                                     int64_t height, int64_t width) {                                                  \
        forward<T>(threads, {places, attention, positions, values, nearest, tables, (T)half_power, position_stride,    \
                             batch, queries, heads, points, k, n, d, levels, height, width}, out);                     \
    }

EXPORT(float, f32)
EXPORT(double, f64)
