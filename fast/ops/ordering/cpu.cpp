// Cluster order (Eq. 1) and choice on a CPU: keys are sorted within what a first, coarse pass has told apart.
#include "../native.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <vector>

namespace {

constexpr int64_t PIECE = 2048;  // tokens, or patches, for one thread at a time

// floor(v count / side) of each v from 0 to side - 1, from a table where one is small beside `uses`.
struct Cells {
    int64_t side, count;
    std::vector<int64_t> table;

    Cells(int64_t side, int64_t count, int64_t uses) : side(side), count(count) {
        if (side > uses) return;
        table.resize(side);
        for (int64_t v = 0; v < side; v++) table[v] = v * count / side;
    }

    int64_t of(int64_t v) const { return table.empty() ? v * count / side : table[v]; }
};

// Anchors of the patches in the curve's order, from index 1; the curve is prolonged by a mirror image at both ends.
std::vector<uint64_t> prolonged(std::vector<uint64_t> anchor) {
    const size_t patches = anchor.size() - 2;
    anchor[0] = 2 * anchor[1] - anchor[2];
    anchor[patches + 1] = 2 * anchor[patches] - anchor[patches - 1];
    return anchor;
}

struct Patches {
    int64_t nh, nw, h, w;
    const int64_t* ranks;  // (nh, nw)
    Cells row, column;
    std::vector<uint64_t> anchor_x, anchor_y;

    Patches(const int64_t* ranks, int64_t h, int64_t w, int64_t nh, int64_t nw, int64_t uses)
        : nh(nh), nw(nw), h(h), w(w), ranks(ranks), row(h, nh, uses), column(w, nw, uses) {
        if (nh * nw == 1) return;
        std::vector<uint64_t> x(nh * nw + 2), y(nh * nw + 2);
        for (int64_t i = 0; i < nh * nw; i++) {
            x[ranks[i] + 1] = uint64_t(2 * (i % nw) + 1) * w - nw;
            y[ranks[i] + 1] = uint64_t(2 * (i / nw) + 1) * h - nh;
        }
        anchor_x = prolonged(x), anchor_y = prolonged(y);
    }

    int64_t rank(int64_t x, int64_t y) const { return ranks[row.of(y) * nw + column.of(x)]; }

    // The square of Eq. 1; integers wrap around as PyTorch's do.
    double ratio(int64_t x, int64_t y, int64_t rank) const {
        if (nh * nw == 1) return 0;
        const int64_t previous = squared(x, y, rank), following = squared(x, y, rank + 2);
        return double(previous) / double(std::max<int64_t>(following, 1));
    }

    int64_t squared(int64_t x, int64_t y, int64_t at) const {
        const uint64_t dx = (uint64_t(x) * (2 * nw) - anchor_x[at]) * nh;
        const uint64_t dy = (uint64_t(y) * (2 * nh) - anchor_y[at]) * nw;
        return int64_t(dx * dx + dy * dy);
    }
};

struct Entry {
    double ratio;
    int64_t token;
};

// Equal zeros, whatever is no number above all: a double as an integer of the same order.
uint64_t sortable(double value) {
    if (value != value) return UINT64_MAX;
    value += 0.0;  // -0 becomes 0
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}

}  // namespace

// Clusters of m of positions (B, n, 2): order, cluster and place (B, n), members (B, k, m), sums (B, k, 2). ranks
// (nh, nw) holds 0 .. nh nw - 1, each once. `outside` counts tokens off the grid; if there are any, nothing is done.
extern "C" void cluster_tokens(const Threads* threads, const int64_t* positions, const int64_t* ranks, int64_t* order,
                               int64_t* cluster, int64_t* place, int64_t* members, int64_t* sums, int64_t* outside,
                               int64_t batch, int64_t n, int64_t m, int64_t h, int64_t w, int64_t nh, int64_t nw) {
    const int64_t patches = nh * nw, k = (n + m - 1) / m;
    const Patches grid(ranks, h, w, nh, nw, batch * n);
    std::vector<int64_t> rank(batch * n), start(batch * (patches + 1), 0);
    std::vector<Entry> unsorted(batch * n), sorted(batch * n);
    std::atomic<int64_t> off{0};
    parallel_for(threads, batch * n, PIECE, [&](int64_t begin, int64_t end) {
        int64_t here = 0;
        for (int64_t i = begin; i < end; i++) {
            const int64_t x = positions[2 * i], y = positions[2 * i + 1];
            if (x < 0 || x >= w || y < 0 || y >= h) {
                here++;
                continue;
            }
            rank[i] = grid.rank(x, y);
            unsorted[i] = {grid.ratio(x, y, rank[i]), i % n};
        }
        off += here;
    });
    if ((*outside = off)) return;
    parallel_for(threads, batch, 1, [&](int64_t image, int64_t) {  // bring each patch's tokens together
        int64_t* first = &start[image * (patches + 1)];
        for (int64_t i = image * n; i < (image + 1) * n; i++) first[rank[i] + 1]++;
        std::partial_sum(first, first + patches + 1, first);
        std::vector<int64_t> at(first, first + patches);
        for (int64_t i = image * n; i < (image + 1) * n; i++) sorted[image * n + at[rank[i]]++] = unsorted[i];
    });
    const int64_t pieces = (patches + PIECE - 1) / PIECE;
    parallel_for(threads, batch * pieces, 1, [&](int64_t piece, int64_t) {  // and sort them
        const int64_t image = piece / pieces, *first = &start[image * (patches + 1)];
        const int64_t* points = positions + 2 * n * image;
        Entry* entries = &sorted[image * n];
        const auto before = [&](const Entry& a, const Entry& b) {
            if (a.ratio != b.ratio) return a.ratio < b.ratio;
            const int64_t *p = points + 2 * a.token, *q = points + 2 * b.token;
            return p[1] != q[1] ? p[1] < q[1] : p[0] != q[0] ? p[0] < q[0] : a.token < b.token;
        };
        for (int64_t patch = piece % pieces * PIECE; patch < std::min(patches, (piece % pieces + 1) * PIECE); patch++) {
            std::sort(entries + first[patch], entries + first[patch + 1], before);
            for (int64_t i = first[patch]; i < first[patch + 1]; i++) {
                const int64_t token = entries[i].token;
                order[image * n + i] = members[image * k * m + i] = token;
                cluster[image * n + token] = i / m;
                place[image * n + token] = i;
            }
        }
    });
    parallel_for(threads, batch * k, PIECE, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const int64_t image = i / k, first = i % k * m;
            int64_t x = 0, y = 0;
            for (int64_t j = first; j < std::min(n, first + m); j++) {
                const int64_t* point = positions + 2 * (image * n + order[image * n + j]);
                x += point[0], y += point[1];
            }
            for (int64_t j = n; j < first + m; j++) members[image * k * m + j] = -1;
            sums[2 * i] = x, sums[2 * i + 1] = y;
        }
    });
}

// Indices (B, keep), ascending, of the `keep` largest of values (B, n), 1 <= keep <= n; of equal ones the first.
extern "C" void choose(const Threads* threads, const double* value, int64_t* kept, int64_t batch, int64_t n,
                       int64_t keep) {
    parallel_for(threads, batch, 1, [&](int64_t image, int64_t) {
        std::vector<uint64_t> keys(n);
        for (int64_t i = 0; i < n; i++) keys[i] = sortable(value[image * n + i]);
        std::vector<uint64_t> largest(keys);
        std::nth_element(largest.begin(), largest.begin() + (keep - 1), largest.end(), std::greater<uint64_t>());
        const uint64_t least = largest[keep - 1];
        int64_t equal = keep, *at = kept + image * keep;  // of those equal to the least, how many are kept
        for (int64_t i = 0; i < n; i++) equal -= keys[i] > least;
        for (int64_t i = 0; i < n; i++)
            if (keys[i] > least || (keys[i] == least && equal-- > 0)) *at++ = i;
    });
}
