"""Space-filling curves over any nh x nw patches (paper sec. 3.1.1). Same ranks as ``reference.curves``."""

from functools import lru_cache

import torch

from .checks import check_choice, check_sides

CURVES = ("scanline", "hilbert", "peano", "morton")


def curve_ranks(nh, nw, curve="scanline", device=None):
    """Rank every patch along a curve that starts at the top left.

    Parameters
    ----------
    nh, nw : int
        Patches down and across, at least 1 each.
    curve : {"scanline", "hilbert", "peano", "morton"}
    device : torch.device, optional

    Returns
    -------
    (nh, nw) int64 tensor

    Raises
    ------
    ValueError
        Unknown curve, or a side below 1.
    """
    check_choice("curve", curve, CURVES)
    check_sides("a curve's patches", (nh, nw))
    iy, ix = torch.arange(nh, device=device)[:, None], torch.arange(nw, device=device)
    if curve == "scanline":
        return iy * nw + torch.where(iy % 2 == 0, ix, nw - 1 - ix)
    if curve == "morton":
        code = _spread_bits(ix) | _spread_bits(iy) << 1
        return code.flatten().argsort().argsort().reshape(nh, nw)
    cells = torch.tensor(_recursive_path(nh, nw, curve), device=device)  # iy * nw + ix, in the order of the visit
    return cells.scatter(0, cells, torch.arange(nh * nw, device=device)).reshape(nh, nw)


def _spread_bits(x):
    """Return x, below 2^16, with its bit i at bit 2 i."""
    for shift, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        x = (x | x << shift) & mask
    return x


@lru_cache(maxsize=32)
def _recursive_path(nh, nw, curve):
    """Visit order of a recursive curve as a tuple of iy * nw + ix. Depends on the shape alone, hence the small cache.

    A rectangle is (y, x, dy, dx): its first cell and its signed extents. Rectangles wait on a stack, last in first out,
    until they are one cell wide.
    """
    split = {"hilbert": _split_hilbert, "peano": _split_peano}[curve]
    path, stack = [], [split(nh, nw)]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack.extend(reversed(item))
            continue
        y, x, main, other = item[:4]
        length, width = abs(main[0] + main[1]), abs(other[0] + other[1])
        if length > 1 and width > 1:
            stack.append(item[4](*item[:4]))
            continue
        step = _sign(main) if length > 1 else _sign(other)
        path.extend((y + i * step[0]) * nw + x + i * step[1] for i in range(max(length, width)))
    return tuple(path)


def _sign(v):
    return ((v[0] > 0) - (v[0] < 0), (v[1] > 0) - (v[1] < 0))


def _scaled(v, length):
    step = _sign(v)
    return (step[0] * length, step[1] * length)


def _split_hilbert(nh, nw):
    """The whole rectangle, main side first: the longer one unless only the other is even."""
    across = nw >= nh
    if max(nh, nw) % 2 == 1 and min(nh, nw) % 2 == 0:
        across = not across
    main, other = ((0, nw), (nh, 0)) if across else ((nh, 0), (0, nw))
    return [(0, 0, main, other, _hilbert_children)]


def _hilbert_children(y, x, main, other):
    """Two halves of a long rectangle, or aside, along and back for a square-ish one."""
    length, width = abs(main[0] + main[1]), abs(other[0] + other[1])
    half, aside = length // 2, width // 2
    if 2 * length > 3 * width:
        half += half % 2 == 1 and length > 2
        first, rest = _scaled(main, half), _scaled(main, length - half)
        return [(y, x, first, other, _hilbert_children), (y + first[0], x + first[1], rest, other, _hilbert_children)]
    aside += aside % 2 == 1 and width > 2
    to, beyond = _scaled(other, aside), _scaled(other, width - aside)
    last, back = _scaled(main, length - 1), _scaled(other, aside - 1)
    return [
        (y, x, to, _scaled(main, half), _hilbert_children),
        (y + to[0], x + to[1], main, beyond, _hilbert_children),
        (
            y + last[0] + back[0],
            x + last[1] + back[1],
            _scaled(other, -aside),
            _scaled(main, half - length),
            _hilbert_children,
        ),
    ]


def _split_peano(nh, nw):
    """The whole rectangle, or two that are odd along the longer side where both sides are even."""
    if nh % 2 == 1 or nw % 2 == 1:
        return [(0, 0, (nh, 0), (0, nw), _peano_children)]
    if nw >= nh:
        left = nw // 2 - (nw // 2 + 1) % 2
        return [(0, 0, (nh, 0), (0, left), _peano_children), (nh - 1, left, (-nh, 0), (0, nw - left), _peano_children)]
    top = nh // 2 - (nh // 2 + 1) % 2
    return [(0, 0, (0, nw), (top, 0), _peano_children), (top, nw - 1, (0, -nw), (nh - top, 0), _peano_children)]


def _peano_children(y, x, main, other):
    """Up to 3 x 3 rectangles, each crossed from corner to opposite corner; those along the main side come first."""
    length, width = abs(main[0] + main[1]), abs(other[0] + other[1])
    lengths = _thirds(length) if 2 * length > width else [length]
    widths = _thirds(width) if 2 * width > length else [width]
    children = []
    for j, across in enumerate(widths):
        for i, along in enumerate(lengths) if j % 2 == 0 else reversed(list(enumerate(lengths))):
            along_start = sum(lengths[:i]) + (along - 1 if j % 2 else 0)
            across_start = sum(widths[:j]) + (across - 1 if i % 2 else 0)
            a, b = _scaled(main, along_start), _scaled(other, across_start)
            child_main, child_other = (
                _scaled(main, -along if j % 2 else along),
                _scaled(other, -across if i % 2 else across),
            )
            children.append((y + a[0] + b[0], x + a[1] + b[1], child_main, child_other, _peano_children))
    return children


def _thirds(side):
    if side < 3:
        return [side]
    third = (side + 1) // 3
    if side % 2 == 1 and third % 2 == 0:
        third += 1 if side > 3 * third else -1
    return [third, side - 2 * third, third]
