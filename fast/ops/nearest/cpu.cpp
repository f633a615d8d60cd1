// Nearest clusters, nearest tokens and local stride on a CPU.
//
// A search goes through a tree of boxes. The points are sorted along a Morton curve and cut into leaves of LEAF; the
// boxes of FAN neighbours on one level are the children of one box on the next. Whatever the spread of the points, a
// leaf's points lie together. A query, or a few neighbouring ones at once, descends to the nearest boxes first and
// passes by those that cannot hold anything as near as the last one kept; a leaf that its neighbour found gives it a
// distance to begin with. Every result is exact and unique, so threads may share the work in any way.
#include "../native.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

namespace {

constexpr int LEAF = 8, FAN = 8;         // points in a leaf, children of a box
constexpr int MOST = 32;                 // neighbours that LANES queries keep at once; more are kept by a heap
constexpr int GROUPS_AT_ONCE = 32;       // of LANES queries, for one thread
constexpr double EXACT = 1LL << 53;      // up to here a double holds every integer
constexpr double FAR = std::numeric_limits<double>::infinity();

typedef double Vector __attribute__((vector_size(VECTOR_BYTES)));
constexpr int LANES = VECTOR_BYTES / sizeof(double);

inline Vector load(const double* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
inline Vector all_lanes(double value) { return value - Vector{}; }
inline Vector smaller(Vector a, Vector b) { return a < b ? a : b; }
inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }
inline Vector absolute(Vector a) { return larger(a, -a); }
inline double largest_lane(Vector v) {
    double most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
}

inline int bit_length(uint64_t v) { return v ? 64 - __builtin_clzll(v) : 0; }

// 0 .. n-1 in ascending order of their keys; of equal keys the lower number first.
std::vector<int64_t> sorted_order(const std::vector<uint64_t>& keys) {
    const int64_t n = keys.size();
    std::vector<int64_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    if (std::is_sorted(keys.begin(), keys.end())) return order;
    uint64_t bits_set = 0;
    for (uint64_t key : keys) bits_set |= key;
    const int key_bits = bit_length(bits_set), number_bits = bit_length(n);
    if (key_bits + number_bits > 64) {
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return keys[a] < keys[b]; });
        return order;
    }
    std::vector<uint64_t> entries(n), sorted(n);  // key and number in one, sorted digit by digit, the lowest first
    for (int64_t i = 0; i < n; i++) entries[i] = keys[i] << number_bits | uint64_t(i);
    const int passes = (key_bits + 10) / 11, digit = (key_bits + passes - 1) / passes;
    std::vector<int64_t> start;
    for (int shift = number_bits; shift < number_bits + key_bits; shift += digit) {
        const uint64_t mask = (uint64_t(1) << digit) - 1;
        start.assign(mask + 2, 0);
        for (uint64_t entry : entries) start[(entry >> shift & mask) + 1]++;
        std::partial_sum(start.begin(), start.end(), start.begin());
        for (uint64_t entry : entries) sorted[start[entry >> shift & mask]++] = entry;
        entries.swap(sorted);
    }
    for (int64_t i = 0; i < n; i++) order[i] = entries[i] & ((uint64_t(1) << number_bits) - 1);
    return order;
}

inline uint64_t spread_bits(uint64_t v) {  // bit i of 32 goes to bit 2 i
    v = (v | v << 16) & 0x0000ffff0000ffff;
    v = (v | v << 8) & 0x00ff00ff00ff00ff;
    v = (v | v << 4) & 0x0f0f0f0f0f0f0f0f;
    v = (v | v << 2) & 0x3333333333333333;
    return (v | v << 1) & 0x5555555555555555;
}

struct Range {  // of both coordinates of points (n, 2)
    int64_t low[2] = {INT64_MAX, INT64_MAX}, high[2] = {INT64_MIN, INT64_MIN};

    Range(const int64_t* points, int64_t n) {
        for (int64_t i = 0; i < n; i++)
            for (int axis = 0; axis < 2; axis++) {
                low[axis] = std::min(low[axis], points[2 * i + axis]);
                high[axis] = std::max(high[axis], points[2 * i + axis]);
            }
    }
};

// Order of points (n, 2) along a Morton curve. They are less than 2^32 apart.
std::vector<int64_t> morton_order(const int64_t* points, int64_t n) {
    const Range range(points, n);
    std::vector<uint64_t> keys(n);
    for (int64_t i = 0; i < n; i++)
        keys[i] = spread_bits(points[2 * i] - range.low[0]) | spread_bits(points[2 * i + 1] - range.low[1]) << 1;
    return sorted_order(keys);
}

// The same of real points, up to a 2^15th of the size of the items (n, 2); those far outside count as at their edge.
std::vector<int64_t> morton_order(const double* points, int64_t q, const int64_t* items, int64_t n) {
    const Range range(items, n);
    std::vector<uint64_t> keys(q, 0);
    for (int axis = 0; axis < 2; axis++) {
        const double size = double(range.high[axis] - range.low[axis]) + 1, low = double(range.low[axis]) - size;
        for (int64_t i = 0; i < q; i++) {
            const double place = (points[2 * i + axis] - low) / (3 * size) * 32768;
            keys[i] |= spread_bits(place > 0 ? place < 32767 ? uint64_t(place) : 32767 : 0) << axis;
        }
    }
    return sorted_order(keys);
}

struct Boxes {  // padded to whole groups of FAN with boxes that are infinitely far away
    int64_t count;  // without the padding
    std::vector<double> left, right, top, bottom;

    explicit Boxes(int64_t count) : count(count) {
        const int64_t padded = (count + FAN - 1) / FAN * FAN;
        for (auto* side : {&left, &top}) side->assign(padded, FAR);
        for (auto* side : {&right, &bottom}) side->assign(padded, -FAR);
    }

    void include(int64_t box, double x0, double x1, double y0, double y1) {
        left[box] = std::min(left[box], x0), right[box] = std::max(right[box], x1);
        top[box] = std::min(top[box], y0), bottom[box] = std::max(bottom[box], y1);
    }
};

// The points of one image in leaves, and levels of boxes around them, the leaves' own first, the last a single group.
struct Tree {
    int64_t n;
    std::vector<double> x, y, tie;  // of points as near, the lower tie comes first; padded to whole leaves
    std::vector<int64_t> number;    // of the point of each tie; empty: they are the same
    std::vector<int64_t> order;     // numbers of the points as they lie in the leaves
    std::vector<Boxes> levels;
};

// A tree of items (n, 2), their coordinates less `low`. Ties are broken by number, or else by y, then x, then number.
Tree build_tree(const int64_t* items, int64_t n, int64_t low, bool raster) {
    Tree tree;
    tree.n = n;
    std::vector<int64_t> rank;
    if (raster) {
        const Range range(items, n);
        const uint64_t width = uint64_t(range.high[0] - range.low[0]) + 1;
        std::vector<uint64_t> keys(n);
        for (int64_t i = 0; i < n; i++)
            keys[i] = uint64_t(items[2 * i + 1] - range.low[1]) * width + uint64_t(items[2 * i] - range.low[0]);
        if (!std::is_sorted(keys.begin(), keys.end())) {
            tree.number = sorted_order(keys);
            rank.resize(n);
            for (int64_t i = 0; i < n; i++) rank[tree.number[i]] = i;
        }
    }
    tree.order = morton_order(items, n);
    const int64_t leaves = (n + LEAF - 1) / LEAF;
    for (auto* column : {&tree.x, &tree.y, &tree.tie}) column->assign(leaves * LEAF, FAR);
    tree.levels.emplace_back(leaves);
    for (int64_t i = 0; i < n; i++) {
        const int64_t item = tree.order[i];
        const double x = double(items[2 * item] - low), y = double(items[2 * item + 1] - low);
        tree.x[i] = x, tree.y[i] = y, tree.tie[i] = double(rank.empty() ? item : rank[item]);
        tree.levels[0].include(i / LEAF, x, x, y, y);
    }
    for (int64_t count = leaves; count > FAN;) {
        const Boxes& below = tree.levels.back();
        Boxes above((count + FAN - 1) / FAN);
        for (int64_t i = 0; i < count; i++)
            above.include(i / FAN, below.left[i], below.right[i], below.top[i], below.bottom[i]);
        count = (count + FAN - 1) / FAN;
        tree.levels.push_back(std::move(above));
    }
    return tree;
}

// Offer to `best` all leaves but `guess` that it wants, of the FAN boxes of a group on a level, the nearest first; note
// the first that is taken.
template <class Best>
void search(const Tree& tree, Best& best, int level, int64_t group, int64_t guess, int64_t& first) {
    typename Best::Distance gap[FAN], near[FAN];
    int child[FAN], count = 0;
    const Boxes& boxes = tree.levels[level];
    best.gaps(boxes, group * FAN, gap);
    const int there = int(std::min<int64_t>(FAN, boxes.count - group * FAN));  // who still wants all wants no padding
    for (int i = 0; i < there; i++) {
        if (!best.wants(gap[i])) continue;
        int at = count++;
        for (; at > 0 && gap[i] < near[at - 1]; at--) near[at] = near[at - 1], child[at] = child[at - 1];
        near[at] = gap[i], child[at] = i;
    }
    for (int i = 0; i < count && best.wants(near[i]); i++) {
        const int64_t box = group * FAN + child[i];
        if (level > 0) {
            search(tree, best, level - 1, box, guess, first);
        } else if (box != guess) {
            best.take(tree, box * LEAF);
            if (first < 0) first = box;
        }
    }
}

// The same of the whole tree, but begin with the leaf `guess`: where it is near, much need not be looked at. Returns a
// leaf to guess for a query near this one.
template <class Best>
int64_t search(const Tree& tree, Best& best, int64_t guess) {
    int64_t first = -1;
    best.take(tree, guess * LEAF);
    search(tree, best, int(tree.levels.size()) - 1, 0, guess, first);
    return first < 0 ? guess : first;
}

// The K nearest points (K = 0: `count` of them, at most MOST) of LANES queries. Distance and tie make one number, the
// key: squared distance * scale + tie, where the scale is a power of two above all ties. Keys below EXACT are exact, and
// what is rounded is not below it; the result is right if no lane keeps one that is not.
template <int K, bool L1>
struct Lanes {
    typedef double Distance;  // a key without its tie

    int count;
    double scale, limit = std::numeric_limits<double>::max();  // the largest key kept
    Vector x, y, best[K ? K : MOST];
    double left, right, top, bottom;  // around the queries

    Lanes(int count, double scale, const double* xs, const double* ys)
        : count(K ? K : count), scale(scale), x(load(xs)), y(load(ys)) {
        left = *std::min_element(xs, xs + LANES), right = *std::max_element(xs, xs + LANES);
        top = *std::min_element(ys, ys + LANES), bottom = *std::max_element(ys, ys + LANES);
        for (int i = 0; i < this->count; i++) best[i] = all_lanes(limit);
    }

    static Vector squared(Vector dx, Vector dy) {
        if (!L1) return dx * dx + dy * dy;
        const Vector sum = absolute(dx) + absolute(dy);
        return sum * sum;
    }

    bool wants(double gap) const { return gap <= limit; }

    void gaps(const Boxes& boxes, int64_t first, double* gap) const {
        for (int i = 0; i < FAN; i += LANES) {
            const int64_t at = first + i;
            const Vector dx = larger(load(&boxes.left[at]) - right, left - load(&boxes.right[at]));
            const Vector dy = larger(load(&boxes.top[at]) - bottom, top - load(&boxes.bottom[at]));
            const Vector keys = squared(larger(dx, Vector{}), larger(dy, Vector{})) * scale;
            std::memcpy(gap + i, &keys, sizeof keys);
        }
    }

    void take(const Tree& tree, int64_t first) {
        const int k = K ? K : count;
        Vector kept[K ? K : MOST];
        for (int i = 0; i < k; i++) kept[i] = best[i];
        for (int64_t p = first; p < first + LEAF; p++) {
            const Vector key = squared(x - tree.x[p], y - tree.y[p]) * scale + tree.tie[p];
#pragma GCC unroll 16
            for (int i = k - 1; i > 0; i--) kept[i] = smaller(kept[i], larger(kept[i - 1], key));
            kept[0] = smaller(kept[0], key);
        }
        for (int i = 0; i < k; i++) best[i] = kept[i];
        limit = largest_lane(kept[k - 1]);
    }
};

// Squared length of a real (dx, dy), every operation rounded by itself: no fused multiply-add.
inline double rounded(double v) {
#if defined(__x86_64__)
    __asm__("" : "+x"(v));
#elif defined(__aarch64__)
    __asm__("" : "+w"(v));
#else
    volatile double kept = v;
    v = kept;
#endif
    return v;
}
inline double squared_length(double dx, double dy, bool) { return rounded(dx * dx) + rounded(dy * dy); }
inline int64_t squared_length(int64_t dx, int64_t dy, bool l1) {
    const int64_t sum = std::abs(dx) + std::abs(dy);
    return l1 ? sum * sum : dx * dx + dy * dy;
}

// The `count` nearest points of one query, any number, distances in int64 or as they are rounded in double.
template <class Number>
struct Heap {
    typedef Number Distance;
    struct Found {
        Number squared;
        double tie;
        bool operator<(const Found& other) const {
            return squared < other.squared || (squared == other.squared && tie < other.tie);
        }
    };

    size_t count;
    bool l1;
    Number x = 0, y = 0;
    std::vector<Found> found;

    Heap(int64_t count, bool l1) : count(count), l1(l1) { found.reserve(count); }

    void start(Number at_x, Number at_y) {
        x = at_x, y = at_y;
        found.clear();
    }

    bool wants(Number gap) const { return found.size() < count || gap <= found.front().squared; }

    // Rounding keeps the order, so a real gap is not above the distance of any point in the box.
    void gaps(const Boxes& boxes, int64_t first, Number* gap) const {
        for (int64_t i = first; i < first + FAN; i++) {
            if (boxes.left[i] > boxes.right[i]) {
                *gap++ = std::numeric_limits<Number>::max();
                continue;
            }
            const Number dx = std::max({Number(boxes.left[i]) - x, x - Number(boxes.right[i]), Number(0)});
            const Number dy = std::max({Number(boxes.top[i]) - y, y - Number(boxes.bottom[i]), Number(0)});
            *gap++ = squared_length(dx, dy, l1);
        }
    }

    void take(const Tree& tree, int64_t first) {
        for (int64_t p = first; p < std::min(first + LEAF, tree.n); p++) {
            const Found candidate = {squared_length(x - Number(tree.x[p]), y - Number(tree.y[p]), l1), tree.tie[p]};
            if (found.size() == count) {
                if (!(candidate < found.front())) continue;
                std::pop_heap(found.begin(), found.end());
                found.pop_back();
            }
            found.push_back(candidate);
            std::push_heap(found.begin(), found.end());
        }
    }
};

// What becomes of neighbour `i` of a query: its number is written, (q, k), or the local stride, (q,), of neighbour 1.
struct Numbers {
    int64_t *found, k;

    void put(const Tree& tree, int64_t query, int64_t i, int64_t, int64_t tie) const {
        found[query * k + i] = tree.number.empty() ? tie : tree.number[tie];
    }
};

struct Strides {
    int64_t* stride;

    void put(const Tree&, int64_t query, int64_t i, int64_t squared, int64_t) const {
        if (i == 0) return;  // the token itself
        int exponent = 0;
        while (exponent < 32 && int64_t(1) << 2 * std::min(exponent, 31) < squared) exponent++;
        stride[query] = int64_t(1) << exponent;
    }
};

template <class Number, class Results>
void search_one(const Tree& tree, Heap<Number>& heap, int64_t query, Number x, Number y, const Results& results,
                int64_t& guess) {
    heap.start(x, y);
    guess = search(tree, heap, guess);
    std::sort_heap(heap.found.begin(), heap.found.end());
    for (size_t i = 0; i < heap.found.size(); i++)
        results.put(tree, query, i, int64_t(heap.found[i].squared), int64_t(heap.found[i].tie));
}

// Search for `count` queries, at most LANES, at (x, y), which are padded to LANES.
template <int K, bool L1, class Results>
void search_lanes(const Tree& tree, Heap<int64_t>& heap, const int64_t* query, int count, const double* x,
                  const double* y, const Results& results, int64_t& guess) {
    const int tie_bits = bit_length(tree.n);
    Lanes<K, L1> best(int(heap.count), double(int64_t(1) << tie_bits), x, y);
    guess = search(tree, best, guess);
    if (!(best.limit < EXACT)) {
        for (int j = 0; j < count; j++)
            search_one<int64_t>(tree, heap, query[j], int64_t(x[j]), int64_t(y[j]), results, guess);
        return;
    }
    for (int i = 0; i < best.count; i++)
        for (int j = 0; j < count; j++) {
            const int64_t key = int64_t(best.best[i][j]);
            results.put(tree, query[j], i, key >> tie_bits, key & ((int64_t(1) << tie_bits) - 1));
        }
}

template <bool L1>
void search_lanes(const Tree& tree, Heap<int64_t>& heap, const int64_t* query, int count, const double* x,
                  const double* y, const Strides& results, int64_t& guess) {
    search_lanes<2, L1>(tree, heap, query, count, x, y, results, guess);
}
template <bool L1>
void search_lanes(const Tree& tree, Heap<int64_t>& heap, const int64_t* query, int count, const double* x,
                  const double* y, const Numbers& results, int64_t& guess) {
    switch (results.k) {
        case 1: return search_lanes<1, L1>(tree, heap, query, count, x, y, results, guess);
        case 4: return search_lanes<4, L1>(tree, heap, query, count, x, y, results, guess);
        case 6: return search_lanes<6, L1>(tree, heap, query, count, x, y, results, guess);
        case 9: return search_lanes<9, L1>(tree, heap, query, count, x, y, results, guess);
        default: return search_lanes<0, L1>(tree, heap, query, count, x, y, results, guess);
    }
}

// Call body(image, begin, end) for pieces of 0 .. count-1 of every image, on all threads.
template <class Body>
void parallel_pieces(const Threads* threads, int64_t images, int64_t count, int64_t grain, const Body& body) {
    const int64_t pieces = (count + grain - 1) / grain;
    parallel_for(threads, images * pieces, 1, [&](int64_t piece, int64_t) {
        const int64_t begin = piece % pieces * grain;
        body(piece / pieces, begin, std::min(begin + grain, count));
    });
}

// The k nearest items (B, n, 2) of queries (B, q, 2) times `scale`; all coordinates, less `low`, are from 0 to 2^31.
template <bool L1, class MakeResults>
void search_whole(const Threads* threads, const int64_t* queries, const int64_t* items, int64_t batch, int64_t q,
                  int64_t n, int64_t k, int64_t scale, int64_t low, bool raster, const MakeResults& results_of) {
    std::vector<Tree> trees(batch);
    std::vector<std::vector<int64_t>> orders(batch);  // of the queries
    const bool same = queries == items && q == n;  // items may be the first of the queries, in one memory
    parallel_for(threads, same ? batch : 2 * batch, 1, [&](int64_t task, int64_t) {
        if (task < batch)
            trees[task] = build_tree(items + 2 * n * task, n, low, raster);
        else
            orders[task - batch] = morton_order(queries + 2 * q * (task - batch), q);
    });
    parallel_pieces(threads, batch, q, LANES * GROUPS_AT_ONCE, [&](int64_t image, int64_t begin, int64_t end) {
        const Tree& tree = trees[image];
        const int64_t* order = same ? tree.order.data() : orders[image].data();
        const int64_t* points = queries + 2 * q * image;
        const auto results = results_of(image);
        Heap<int64_t> heap(k, L1);
        int64_t guess = 0;
        for (int64_t first = begin; first < end; first += LANES) {
            const int count = int(std::min<int64_t>(LANES, end - first));
            double x[LANES], y[LANES];
            for (int j = 0; j < LANES; j++) {
                const int64_t* point = points + 2 * order[first + std::min(j, count - 1)];
                x[j] = double(point[0] * scale - low), y[j] = double(point[1] * scale - low);
            }
            if (same) guess = first / LEAF;  // their own
            if (k <= MOST) {
                search_lanes<L1>(tree, heap, order + first, count, x, y, results, guess);
                continue;
            }
            for (int j = 0; j < count; j++)
                search_one<int64_t>(tree, heap, order[first + j], int64_t(x[j]), int64_t(y[j]), results, guess);
        }
    });
}

}  // namespace

// The k nearest items (B, n, 2) of integer queries (B, q, 2) times `scale`, 1 <= k <= n: numbers (B, q, k), nearest
// first; ties by number, or by raster order. All coordinates, times the scale and less `low`, are from 0 to below 2^31.
extern "C" void nearest_whole(const Threads* threads, const int64_t* queries, const int64_t* items, int64_t* found,
                              int64_t batch, int64_t q, int64_t n, int64_t k, int64_t scale, int64_t low,
                              int64_t raster) {
    search_whole<false>(threads, queries, items, batch, q, n, k, scale, low, raster,
                        [&](int64_t image) { return Numbers{found + image * q * k, k}; });
}

// The same of real queries, by distances rounded to double; what is no number counts as 0, and 1e100 is the farthest.
extern "C" void nearest_real(const Threads* threads, const double* queries, const int64_t* items, int64_t* found,
                             int64_t batch, int64_t q, int64_t n, int64_t k, int64_t raster) {
    std::vector<Tree> trees(batch);
    std::vector<std::vector<int64_t>> orders(batch);
    parallel_for(threads, 2 * batch, 1, [&](int64_t task, int64_t) {
        const int64_t image = task / 2;
        if (task % 2 == 0)
            trees[image] = build_tree(items + 2 * n * image, n, 0, raster);
        else
            orders[image] = morton_order(queries + 2 * q * image, q, items + 2 * n * image, n);
    });
    parallel_pieces(threads, batch, q, LANES * GROUPS_AT_ONCE, [&](int64_t image, int64_t begin, int64_t end) {
        Heap<double> heap(k, false);
        int64_t guess = 0;
        for (int64_t i = begin; i < end; i++) {
            const int64_t query = orders[image][i];
            double at[2];
            for (int axis = 0; axis < 2; axis++) {
                const double v = queries[2 * (q * image + query) + axis];
                at[axis] = v != v ? 0 : std::min(std::max(v, -1e100), 1e100);
            }
            search_one(trees[image], heap, query, at[0], at[1], Numbers{found + image * q * k, k}, guess);
        }
    });
}

// Local stride (B, n) of positions (B, n, 2), n >= 2: the smallest power of two that reaches the nearest other token.
extern "C" void local_stride(const Threads* threads, const int64_t* positions, int64_t* stride, int64_t batch,
                             int64_t n, int64_t low, int64_t l1) {
    const auto results_of = [&](int64_t image) { return Strides{stride + image * n}; };
    if (l1)
        search_whole<true>(threads, positions, positions, batch, n, n, 2, 1, low, false, results_of);
    else
        search_whole<false>(threads, positions, positions, batch, n, n, 2, 1, low, false, results_of);
}
