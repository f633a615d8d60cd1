"""Space-filling curves over any nh x nw patches (paper sec. 3.1.1, ref. [24]).

A curve visits every patch once; its ranks on 4 x 4 patches:

    scanline        Morton          Hilbert         Peano (on 3 x 3)
     0  1  2  3      0  1  4  5      0  1 14 15      0  5  6
     7  6  5  4      2  3  6  7      3  2 13 12      1  4  7
     8  9 10 11      8  9 12 13      4  7  8 11      2  3  8
    15 14 13 12     10 11 14 15      5  6  9 10

Consecutive patches share an edge on scanline, Hilbert and Peano for every nh and nw; on Morton they do not.
"""

import numpy as np

from .checks import check_choice, check_sides

CURVES = ("scanline", "hilbert", "peano", "morton")


def curve_ranks(nh, nw, curve="scanline"):
    """Rank every patch along a curve that starts at the top left (sec. 3.1.1, ref. 24).

    Parameters
    ----------
    nh, nw : int
        Patches down and across, at least 1 each.
    curve : {"scanline", "hilbert", "peano", "morton"}

    Returns
    -------
    (nh, nw) int64 array
        ``ranks[iy, ix]``: a permutation of 0 ... nh nw - 1.

    Raises
    ------
    ValueError
        Unknown curve, or a side below 1.
    """
    check_choice("curve", curve, CURVES)
    check_sides("a curve's patches", (nh, nw))
    walk = {"scanline": _scanline, "hilbert": _hilbert, "peano": _peano, "morton": _morton}[curve]
    path = walk(nh, nw)  # (nh nw, 2): (iy, ix) of the patches in the order of the visit
    ranks = np.empty((nh, nw), dtype=np.int64)
    ranks[path[:, 0], path[:, 1]] = np.arange(nh * nw)
    return ranks


def _scanline(nh, nw):
    """Row by row: even rows left to right, odd rows right to left."""
    rows = [[(iy, ix) for ix in range(nw)] for iy in range(nh)]
    for row in rows[1::2]:
        row.reverse()
    return np.array(rows).reshape(-1, 2)


def _morton(nh, nw):
    """Sort by the number whose even bits are those of ix and whose odd bits are those of iy."""
    iy, ix = np.indices((nh, nw)).reshape(2, -1)
    code = np.zeros(nh * nw, dtype=np.int64)
    for bit in range(max(nh, nw).bit_length()):
        code |= (ix >> bit & 1) << 2 * bit | (iy >> bit & 1) << 2 * bit + 1
    return np.stack([iy, ix], axis=1)[np.argsort(code)]


def _hilbert(nh, nw):
    """Hilbert's curve, generalised to rectangles by halving sides instead of counting bits.

    It runs from one end of the main side to the other. That side is the longer one, unless that is odd and the other
    even: then no walk from corner to corner along it could take only steps to a patch that shares an edge.
    """
    down, across = np.array([nh, 0]), np.array([0, nw])
    across_is_main = nw >= nh
    if max(nh, nw) % 2 == 1 and min(nh, nw) % 2 == 0:
        across_is_main = not across_is_main
    main, other = (across, down) if across_is_main else (down, across)
    return np.array(_hilbert_steps(np.array([0, 0]), main, other))


def _hilbert_steps(start, main, other):
    """Visit the rectangle at ``start`` spanned by ``main`` and ``other``, ending at the far end of ``main``."""
    length, breadth = abs(main.sum()), abs(other.sum())
    main_step, other_step = np.sign(main), np.sign(other)
    if breadth == 1:
        return [tuple(start + i * main_step) for i in range(length)]
    if length == 1:
        return [tuple(start + i * other_step) for i in range(breadth)]
    half_main, half_other = length // 2 * main_step, breadth // 2 * other_step
    if 2 * length > 3 * breadth:  # long: two rectangles, one after the other
        half_main = _made_even(half_main, main_step, length)
        return _hilbert_steps(start, half_main, other) + _hilbert_steps(start + half_main, main - half_main, other)
    half_other = _made_even(half_other, other_step, breadth)
    return (  # aside, along, and back again
        _hilbert_steps(start, half_other, half_main)
        + _hilbert_steps(start + half_other, main, other - half_other)
        + _hilbert_steps(start + main - main_step + half_other - other_step, -half_other, half_main - main)
    )


def _made_even(half, step, whole):
    """Lengthen an odd half by one step, unless the whole is only two long."""
    return half + step if abs(half.sum()) % 2 == 1 and whole > 2 else half


def _peano(nh, nw):
    """Peano's curve, generalised to rectangles by cutting each side into three odd or any parts.

    A rectangle with an odd side can be crossed from corner to opposite corner, shared edge by shared edge; one with two
    even sides cannot, and is first cut into two rectangles that are odd along its longer side.
    """
    if nh % 2 == 1 or nw % 2 == 1:
        return _peano_steps(nh, nw)
    if nw < nh:
        return _peano(nw, nh)[:, ::-1]
    left = nw // 2 - (nw // 2 + 1) % 2
    second = _peano_steps(nh, nw - left)
    second = np.stack([nh - 1 - second[:, 0], second[:, 1] + left], axis=1)  # upwards, to the right of the first
    return np.concatenate([_peano_steps(nh, left), second])


def _peano_steps(nh, nw):
    """Visit nh x nw patches, one side of them odd, from (0, 0) to (nh - 1, nw - 1)."""
    if nh == 1 or nw == 1:
        return np.indices((nh, nw)).reshape(2, -1).T
    heights = _three_parts(nh) if 2 * nh > nw else [nh]
    widths = _three_parts(nw) if 2 * nw > nh else [nw]
    pieces = []
    for j, width in enumerate(widths):  # columns of blocks: down, up, down
        blocks = list(enumerate(heights))
        for i, height in blocks if j % 2 == 0 else reversed(blocks):
            block = _peano_steps(height, width)
            iy = height - 1 - block[:, 0] if j % 2 == 1 else block[:, 0]
            ix = width - 1 - block[:, 1] if i % 2 == 1 else block[:, 1]
            pieces.append(np.stack([iy + sum(heights[:i]), ix + sum(widths[:j])], axis=1))
    return np.concatenate(pieces)


def _three_parts(side):
    """Cut a side into three parts of about a third, all odd if the side is odd; below 3 it stays whole."""
    if side < 3:
        return [side]
    third = (side + 1) // 3
    if side % 2 == 1 and third % 2 == 0:
        third += 1 if side > 3 * third else -1
    return [third, side - 2 * third, third]
