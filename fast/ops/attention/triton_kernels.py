"""The Triton kernels of ``fast.triton.attention``, which says what they compute.

Tokens are worked on in places: cluster after cluster, m to a cluster. A program computes one head of one image for the
rows of a group of whole clusters (HEIGHT, of which ROWS are used), WIDTH columns at a time: the places of the clusters
that any row of it sees. A row that does not see one has its logits masked. The backward recomputes the softmax from the
saved log-sum-exp: one kernel goes the same way for the queries, another by groups of keys over the clusters that see
them. No atomics: the results are the same every time. Logits are in base 2 inside. Products take the inputs' dtype,
sums are WIDE: float32, or float64 for float64. `pair` holds keys and values, (B, P, H, 2, d).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
IEEE = tl.constexpr("ieee")  # no TF32: float32 stays float32


@triton.jit
def _program(groups, heads):
    """Image, group of clusters, head: heads next to each other, as in memory."""
    program = tl.program_id(0)
    return (program // heads // groups).to(tl.int64), program // heads % groups, program % heads


@triton.jit
def _cells(cells, place, places, inside, WIDE: tl.constexpr):
    """Whether there is a token at some places, and its x and y: up to 2^24, whole numbers in float32."""
    there = tl.load(cells + place, mask=inside, other=0) > 0
    x = tl.load(cells + places + place, mask=there, other=0)
    y = tl.load(cells + 2 * places + place, mask=there, other=0)
    return there, x.to(WIDE), y.to(WIDE)


@triton.jit
def _own_places(group, places, ROWS: tl.constexpr, HEIGHT: tl.constexpr):
    """Places of a group's rows, and which of them it has."""
    row = tl.arange(0, HEIGHT)
    place = group * ROWS + row
    return place, (row < ROWS) & (place < places)


@triton.jit
def _rows(base, place, there, stride, D: tl.constexpr, CHANNELS: tl.constexpr):
    """(places, CHANNELS) of a matrix, zeros where there is no token."""
    channel = tl.arange(0, CHANNELS)
    mask = there[:, None] & (channel < D)[None]
    return tl.load(base + place[:, None] * stride + channel[None], mask=mask, other=0.0)


@triton.jit
def _store_rows(base, place, inside, stride, rows, D: tl.constexpr, CHANNELS: tl.constexpr):
    """Store what is right for a place without a token too: zeros, as long as no NaN went in."""
    channel = tl.arange(0, CHANNELS)
    mask = inside[:, None] & (channel < D)[None]
    tl.store(base + place[:, None] * stride + channel[None], rows.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _blank(blank, head, D: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr):
    """The blank token's key and value for a head, (1, CHANNELS) each."""
    channel = tl.arange(0, CHANNELS)
    at = blank + 2 * D * head + channel
    k = tl.load(at, mask=channel < D, other=0.0).to(WIDE)
    v = tl.load(at + D, mask=channel < D, other=0.0).to(WIDE)
    return k[None], v[None]


@triton.jit
def _list(start, index, places, M: tl.constexpr, R: tl.constexpr):
    """A group's list of clusters: where it starts, and how many places the clusters have."""
    if R == 0:
        first, columns = 0, places
    else:
        first = tl.load(start + index)
        columns = (tl.load(start + index + 1) - first) * M
    return first, columns


@triton.jit
def _listed(lists, first, column, columns, M: tl.constexpr, R: tl.constexpr):
    """Places and clusters of some columns of a list."""
    if R == 0:
        place, cluster = column, column // M
    else:
        cluster = tl.load(lists + first + column // M, mask=column < columns, other=-1)
        place = cluster * M + column % M
    return place, cluster


@triton.jit
def _sees(near, places, place, there, cluster, other, R: tl.constexpr):
    """Whether the tokens at some places see others of some clusters; one (rows, 1), the other (1, columns)."""
    visible = there & other
    if R > 0:
        listed = visible & False
        for r in tl.static_range(R):
            listed |= tl.load(near + r * places + place, mask=there, other=-2) == cluster
        visible &= listed
    return visible


@triton.jit
def _weights(weight, bias, head, WIDE: tl.constexpr):
    """w and b of a head, for logits in base 2."""
    scale = tl.full([], LOG2E, WIDE)
    weight += 5 * head
    x, y, distance = tl.load(weight) * scale, tl.load(weight + 1) * scale, tl.load(weight + 2) * scale
    sine, cosine, b = tl.load(weight + 3) * scale, tl.load(weight + 4) * scale, tl.load(bias + head) * scale
    return x, y, distance, sine, cosine, b


@triton.jit
def _position_term(dx, dy, w):
    """w . e + b of Eq. 5 for whole dx, dy; and the square of the distance and its inverse, where the distance is not 0.

    Where it is 0, so are dx, dy and the square, and whatever multiplies them does not matter.
    """
    square = dx * dx + dy * dy
    inverse = tl.rsqrt(tl.maximum(square, 1.0))
    w_x, w_y, w_distance, w_sine, w_cosine, bias = w
    term = dx * (w_x + w_cosine * inverse) + dy * (w_y + w_sine * inverse) + (w_distance * square) * inverse + bias
    return term, square, inverse


@triton.jit
def forward_kernel(
    query, pair, blank, weight, bias, cells, near, start, lists, out, lse,
    query_image, query_place, query_head, pair_image, pair_place, pair_head, pair_value,
    places, groups, heads, own_geometry,
    M: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    D: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out and lse of one head of a group of clusters: softmax as the columns come; the blank token comes first."""
    image, group, head = _program(groups, heads)
    geometry, at = image * own_geometry, image * places * heads + head
    cells += geometry * 3 * places
    near += geometry * R * places
    key = pair + image * pair_image + head * pair_head
    place, inside = _own_places(group, places, ROWS, HEIGHT)
    there, x, y = _cells(cells, place, places, inside, WIDE)
    q = _rows(query + image * query_image + head * query_head, place, there, query_place, D, CHANNELS)
    blank_k, blank_v = _blank(blank, head, D, CHANNELS, WIDE)
    top = tl.sum(q.to(WIDE) * blank_k, 1) * LOG2E
    total = tl.full([HEIGHT], 1.0, WIDE)
    mean = tl.zeros([HEIGHT, CHANNELS], WIDE) + blank_v
    w = _weights(weight, bias, head, WIDE)
    first, columns = _list(start, geometry * groups + group, places, M, R)
    for begin in range(0, columns, WIDTH):
        column = begin + tl.arange(0, WIDTH)
        near_place, cluster = _listed(lists, first, column, columns, M, R)
        near_there, near_x, near_y = _cells(cells, near_place, places, column < columns, WIDE)
        k = _rows(key, near_place, near_there, pair_place, D, CHANNELS)
        v = _rows(key + pair_value, near_place, near_there, pair_place, D, CHANNELS)
        term, _, _ = _position_term(near_x[None] - x[:, None], near_y[None] - y[:, None], w)
        logit = tl.dot(q, tl.trans(k), input_precision=IEEE) * LOG2E + term
        visible = _sees(near, places, place[:, None], there[:, None], cluster[None], near_there[None], R)
        logit = tl.where(visible, logit, float("-inf"))
        higher = tl.maximum(top, tl.max(logit, 1))
        p, shrink = tl.exp2(logit - higher[:, None]), tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        mean = mean * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=IEEE)
        top = higher
    mean = tl.where(there[:, None], mean / total[:, None], 0.0)
    _store_rows(out + at * D, place, inside, heads * D, mean, D, CHANNELS)
    tl.store(lse + at + place * heads, (top + tl.log2(total)) / LOG2E, mask=inside)


@triton.jit
def query_kernel(
    query, pair, blank, weight, bias, cells, near, start, lists, grad_out, out, lse, delta, grad_query, partial,
    query_image, query_place, query_head, pair_image, pair_place, pair_head, pair_value,
    places, groups, heads, own_geometry,
    M: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    D: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries of a group, its part of the parameters', and delta = sum of grad_out * out."""
    image, group, head = _program(groups, heads)
    geometry, at = image * own_geometry, image * places * heads + head
    cells += geometry * 3 * places
    near += geometry * R * places
    key = pair + image * pair_image + head * pair_head
    place, inside = _own_places(group, places, ROWS, HEIGHT)
    there, x, y = _cells(cells, place, places, inside, WIDE)
    q = _rows(query + image * query_image + head * query_head, place, there, query_place, D, CHANNELS)
    up = _rows(grad_out + at * D, place, there, heads * D, D, CHANNELS)
    level = tl.load(lse + at + place * heads, mask=there, other=0.0) * LOG2E
    wide_q, wide_up = q.to(WIDE), up.to(WIDE)
    mean_slope = tl.sum(wide_up * _rows(out + at * D, place, there, heads * D, D, CHANNELS).to(WIDE), 1)
    tl.store(delta + at + place * heads, mean_slope, mask=there)

    blank_k, blank_v = _blank(blank, head, D, CHANNELS, WIDE)
    blank_p = tl.exp2(tl.sum(wide_q * blank_k, 1) * LOG2E - level)
    blank_slope = blank_p * (tl.sum(wide_up * blank_v, 1) - mean_slope)
    partial += tl.program_id(0).to(tl.int64) * (6 + 2 * D)
    channel = tl.arange(0, CHANNELS)
    tl.store(partial + 5, -tl.sum(blank_slope, 0))  # a row's slopes, the blank token's among them, sum to 0
    tl.store(partial + 6 + channel, tl.sum(blank_slope[:, None] * wide_q, 0), mask=channel < D)
    tl.store(partial + 6 + D + channel, tl.sum(blank_p[:, None] * wide_up, 0), mask=channel < D)

    grad = blank_slope[:, None] * blank_k
    grad_0 = tl.zeros([HEIGHT], WIDE)
    grad_1, grad_2, grad_3, grad_4 = grad_0, grad_0, grad_0, grad_0
    w = _weights(weight, bias, head, WIDE)
    first, columns = _list(start, geometry * groups + group, places, M, R)
    for begin in range(0, columns, WIDTH):
        column = begin + tl.arange(0, WIDTH)
        near_place, cluster = _listed(lists, first, column, columns, M, R)
        near_there, near_x, near_y = _cells(cells, near_place, places, column < columns, WIDE)
        k = _rows(key, near_place, near_there, pair_place, D, CHANNELS)
        v = _rows(key + pair_value, near_place, near_there, pair_place, D, CHANNELS)
        dx, dy = near_x[None] - x[:, None], near_y[None] - y[:, None]
        term, square, inverse = _position_term(dx, dy, w)
        logit = tl.dot(q, tl.trans(k), input_precision=IEEE) * LOG2E + term
        visible = _sees(near, places, place[:, None], there[:, None], cluster[None], near_there[None], R)
        p = tl.exp2(tl.where(visible, logit - level[:, None], float("-inf")))
        slope = p * (tl.dot(up, tl.trans(v), input_precision=IEEE) - mean_slope[:, None])
        grad += tl.dot(slope.to(k.dtype), k, input_precision=IEEE)
        grad_0 += tl.sum(slope * dx, 1)
        grad_1 += tl.sum(slope * dy, 1)
        slope *= inverse
        grad_2 += tl.sum(slope * square, 1)
        grad_3 += tl.sum(slope * dy, 1)
        grad_4 += tl.sum(slope * dx, 1)
    _store_rows(grad_query + at * D, place, inside, heads * D, grad, D, CHANNELS)
    tl.store(partial, tl.sum(grad_0, 0))
    tl.store(partial + 1, tl.sum(grad_1, 0))
    tl.store(partial + 2, tl.sum(grad_2, 0))
    tl.store(partial + 3, tl.sum(grad_3, 0))
    tl.store(partial + 4, tl.sum(grad_4, 0))


@triton.jit
def key_kernel(
    query, pair, weight, bias, cells, near, start, lists, grad_out, lse, delta, grad_pair,
    query_image, query_place, query_head, pair_image, pair_place, pair_head, pair_value,
    places, groups, heads, own_geometry,
    M: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    D: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of a group, over the queries that see them. Tiles are (keys, queries)."""
    image, group, head = _program(groups, heads)
    geometry, at = image * own_geometry, image * places * heads + head
    cells += geometry * 3 * places
    near += geometry * R * places
    query += image * query_image + head * query_head
    key = pair + image * pair_image + head * pair_head
    place, inside = _own_places(group, places, ROWS, HEIGHT)
    there, x, y = _cells(cells, place, places, inside, WIDE)
    own_cluster = (place // M)[:, None]
    k = _rows(key, place, there, pair_place, D, CHANNELS)
    v = _rows(key + pair_value, place, there, pair_place, D, CHANNELS)
    grad_key = tl.zeros([HEIGHT, CHANNELS], WIDE)
    grad_value = tl.zeros([HEIGHT, CHANNELS], WIDE)
    w = _weights(weight, bias, head, WIDE)
    first, columns = _list(start, geometry * groups + group, places, M, R)
    for begin in range(0, columns, WIDTH):
        column = begin + tl.arange(0, WIDTH)
        from_place, _ = _listed(lists, first, column, columns, M, R)
        from_there, from_x, from_y = _cells(cells, from_place, places, column < columns, WIDE)
        q = _rows(query, from_place, from_there, query_place, D, CHANNELS)
        up = _rows(grad_out + at * D, from_place, from_there, heads * D, D, CHANNELS)
        level = tl.load(lse + at + from_place * heads, mask=from_there, other=0.0) * LOG2E
        mean_slope = tl.load(delta + at + from_place * heads, mask=from_there, other=0.0)
        term, _, _ = _position_term(x[:, None] - from_x[None], y[:, None] - from_y[None], w)
        logit = tl.dot(k, tl.trans(q), input_precision=IEEE) * LOG2E + term
        visible = _sees(near, places, from_place[None], from_there[None], own_cluster, there[:, None], R)
        p = tl.exp2(tl.where(visible, logit - level[None], float("-inf")))
        grad_value += tl.dot(p.to(up.dtype), up, input_precision=IEEE)
        slope = p * (tl.dot(v, tl.trans(up), input_precision=IEEE) - mean_slope[None])
        grad_key += tl.dot(slope.to(q.dtype), q, input_precision=IEEE)
    grad_pair += 2 * at * D
    _store_rows(grad_pair, place, inside, 2 * heads * D, grad_key, D, CHANNELS)
    _store_rows(grad_pair + D, place, inside, 2 * heads * D, grad_value, D, CHANNELS)
