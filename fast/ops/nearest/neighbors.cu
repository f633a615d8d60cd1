// Nearest points by a grid of buckets. One thread = one query; no shared memory, no atomics, integers throughout.
//
// nearest_whole, nearest_real  the NEAREST points nearest to each query; of two at the same distance the first in
//                              raster order, or the lower number. Defined by reference.neighborhoods.nearest_tokens
//                              and nearest_clusters (tokens and centres multiplied by the counts' common multiple).
// local_stride                 the distance to the nearest other token rounded up to a power of two. Defined by
//                              reference.grid_prior.local_stride.
//
// Points lie bucket after bucket, as bucket_grid in neighbors.py puts them. A search visits the query's bucket, then
// the ring of buckets around it, and so on; it ends when no unvisited point can be as near as the last one kept.
// Compiled at run time with -D NEAREST=k, so that the k best stay in registers. Needs no header.

#ifndef NEAREST
#define NEAREST 1
#endif

typedef long long whole;

#define LARGEST_WHOLE 0x7fffffffffffffffLL
#define LARGEST_REAL 1.7976931348623157e308

__device__ whole largest(whole) { return LARGEST_WHOLE; }
__device__ double largest(double) { return LARGEST_REAL; }
__device__ whole smaller(whole a, whole b) { return a < b ? a : b; }
__device__ double smaller(double a, double b) { return a < b ? a : b; }  // b where one is not a number
__device__ whole larger(whole a, whole b) { return a > b ? a : b; }

// Reals are rounded after every operation as in the reference: no fused multiply-add. What overflows or is not a number
// is as far as can be.
__device__ whole square(whole a) { return a * a; }
__device__ double square(double a) { return smaller(__dmul_rn(a, a), LARGEST_REAL); }
__device__ whole squared_length(whole dx, whole dy) { return dx * dx + dy * dy; }
__device__ double squared_length(double dx, double dy) {
    return smaller(__dadd_rn(__dmul_rn(dx, dx), __dmul_rn(dy, dy)), LARGEST_REAL);
}

// The bucket along one axis of a coordinate, the first or last one for what lies outside.
__device__ whole bucket_of(whole at, whole origin, whole side, whole buckets) {
    return smaller(larger((at - origin) / side, 0), buckets - 1);
}
__device__ whole bucket_of(double at, whole origin, whole side, whole buckets) {
    const double bucket = floor((at - (double)origin) / (double)side);
    return bucket > 0 ? (bucket < (double)buckets ? (whole)bucket : buckets - 1) : 0;  // not a number: 0
}

// Visit rings of buckets around (x, y) until best.certain(gap); an unvisited point is at least the gap away along one
// axis. That holds for reals too: subtracting and squaring round monotonically.
//   grid   (5,): x and y of the origin, side of a bucket, buckets across, buckets down
//   start  (across * down + 1,): where in the points each bucket begins
template <class Number, class Best>
__device__ void search(const whole *grid, const whole *start, Number x, Number y, Best &best) {
    const whole x0 = grid[0], y0 = grid[1], side = grid[2], across = grid[3], down = grid[4];
    const whole column = bucket_of(x, x0, side, across), row = bucket_of(y, y0, side, down);
    for (whole ring = 0;; ring++) {
        const whole left = column - ring, right = column + ring, top = row - ring, bottom = row + ring;
        for (whole j = larger(top, 0); j <= smaller(bottom, down - 1); j++) {
            const whole *line = start + j * across;
            if (j == top || j == bottom) {
                best.take(line[larger(left, 0)], line[smaller(right, across - 1) + 1]);
            } else {
                if (left >= 0) best.take(line[left], line[left + 1]);
                if (right < across) best.take(line[right], line[right + 1]);
            }
        }
        if (left <= 0 && top <= 0 && right >= across - 1 && bottom >= down - 1) return;  // all are visited
        Number gap = largest(x);
        if (left > 0) gap = smaller(gap, x - (Number)(x0 + left * side));
        if (top > 0) gap = smaller(gap, y - (Number)(y0 + top * side));
        if (right < across - 1) gap = smaller(gap, (Number)(x0 + (right + 1) * side) - x);
        if (bottom < down - 1) gap = smaller(gap, (Number)(y0 + (bottom + 1) * side) - y);
        if (best.certain(gap)) return;
    }
}

// The NEAREST best points, in order.
template <class Number>
struct Nearest {
    const whole *points, *items, *grid;  // points (B n, 2), items (B n,), grid (5,)
    Number x, y;
    whole raster;
    Number distance[NEAREST];  // squared
    whole tie[NEAREST], item[NEAREST];

    __device__ Nearest(const whole *points, const whole *items, const whole *grid, Number x, Number y, whole raster)
        : points(points), items(items), grid(grid), x(x), y(y), raster(raster) {
#pragma unroll
        for (int i = 0; i < NEAREST; i++) {
            distance[i] = largest(x);
            tie[i] = LARGEST_WHOLE;
            item[i] = 0;
        }
    }

    __device__ bool before(Number d, whole t, int i) const {
        return d < distance[i] || (d == distance[i] && t < tie[i]);
    }

    __device__ void put(int i, Number d, whole t, whole number) {
        distance[i] = d;
        tie[i] = t;
        item[i] = number;
    }

    __device__ void take(whole first, whole end) {
        for (whole place = first; place < end; place++) {
            const whole px = points[2 * place], py = points[2 * place + 1];
            const Number d = squared_length(x - (Number)px, y - (Number)py);
            const whole t = raster ? (py - grid[1]) * 0x100000000LL + (px - grid[0]) : items[place];
            if (before(d, t, NEAREST - 1)) insert(d, t, items[place]);
        }
    }

    __device__ void insert(Number d, whole t, whole number) {
#pragma unroll
        for (int i = NEAREST - 1; i > 0; i--) {  // every index is known to the compiler
            if (before(d, t, i - 1)) {
                put(i, distance[i - 1], tie[i - 1], item[i - 1]);
            } else if (before(d, t, i)) {
                put(i, d, t, number);
            }
        }
        if (before(d, t, 0)) put(0, d, t, number);
    }

    __device__ bool certain(Number gap) const { return gap > 0 && distance[NEAREST - 1] < square(gap); }
};

// The squared distance to the nearest point but one.
struct NearestOther {
    const whole *points, *items;  // (B n, 2), (B n,)
    whole x, y, self, l1, squared;

    __device__ void take(whole first, whole end) {
        for (whole place = first; place < end; place++) {
            const whole dx = x - points[2 * place], dy = y - points[2 * place + 1];
            const whole sum = (dx < 0 ? -dx : dx) + (dy < 0 ? -dy : dy);
            if (items[place] != self) squared = smaller(squared, l1 ? square(sum) : squared_length(dx, dy));
        }
    }

    __device__ bool certain(whole gap) const { return squared <= square(gap); }
};

__device__ whole thread_number() { return (whole)blockIdx.x * blockDim.x + threadIdx.x; }

template <class Number>
__device__ void nearest(const Number *queries, const whole *points, const whole *items, const whole *start,
                        const whole *grid, whole *found, whole total, whole q, whole n, whole buckets, whole raster) {
    const whole thread = thread_number();
    if (thread >= total) return;
    const whole image = thread / q;
    const Number x = queries[2 * thread], y = queries[2 * thread + 1];
    Nearest<Number> best(points, items, grid + 5 * image, x, y, raster);
    search(grid + 5 * image, start + buckets * image, x, y, best);
#pragma unroll
    for (int i = 0; i < NEAREST; i++) found[NEAREST * thread + i] = best.item[i] - n * image;
}

extern "C" __global__ void nearest_whole(
    const whole *queries,  // (B, q, 2)
    const whole *points,   // (B n, 2): bucket after bucket, image after image
    const whole *items,    // (B n,): the number image * n + i of each of these points
    const whole *start,    // (B buckets + 1,): where each bucket begins
    const whole *grid,     // (B, 5): x and y of the origin, side of a bucket, buckets across, buckets down
    whole *found,          // (B, q, NEAREST): written
    whole total,           // B q
    whole q, whole n,
    whole buckets,  // an image, used or not
    whole raster    // how ties are broken: 1: raster order, 0: lower number
) {
    nearest(queries, points, items, start, grid, found, total, q, n, buckets, raster);
}

extern "C" __global__ void nearest_real(
    const double *queries,  // (B, q, 2)
    const whole *points,    // (B n, 2); this and the rest as above
    const whole *items, const whole *start, const whole *grid, whole *found, whole total, whole q, whole n,
    whole buckets, whole raster) {
    nearest(queries, points, items, start, grid, found, total, q, n, buckets, raster);
}

extern "C" __global__ void local_stride(
    const whole *positions,  // (B, n, 2), n >= 2
    const whole *points,     // (B n, 2); points, items, start and grid as above
    const whole *items, const whole *start, const whole *grid,
    whole *stride,  // (B, n): written
    whole total,    // B n
    whole n, whole buckets,
    whole l1  // 1: |dx| + |dy|, 0: the Euclidean distance
) {
    const whole thread = thread_number();
    if (thread >= total) return;
    const whole image = thread / n;
    NearestOther best = {points, items, positions[2 * thread], positions[2 * thread + 1], thread, l1, LARGEST_WHOLE};
    search(grid + 5 * image, start + buckets * image, best.x, best.y, best);
    whole t = 1;
    while (t * t < best.squared) t *= 2;
    stride[thread] = t;
}
