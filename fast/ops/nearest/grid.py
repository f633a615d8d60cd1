"""Exact nearest neighbours among points of a plane, at a cost that grows with their number and not with its square.

A uniform grid of square buckets, a few items each on average, is laid over the items; those of a bucket, and of a run
of buckets in one row, lie side by side. A query looks at the block of buckets around its own that holds enough items.
If nothing outside the block can be as near as the farthest one wanted, it has its answer; if not, it looks once more,
at every bucket within that distance. Nothing is assumed of how the items are spread.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .plain import LARGEST, check_range, fits, nearest_of_all, pairs_at_once, smallest, squared_distances, widened

FEW_PAIRS = 1 << 19  # of queries and items: up to here, comparing all is cheaper than laying a grid
SPARE = 1e-12  # added to squared distances in float64, relatively, so that rounding excludes nothing


@dataclass(frozen=True)
class Buckets:
    """Items of a batch, image by image, bucket after bucket in rows."""

    origin: tuple  # (x, y) of the first bucket's corner
    side: int  # of a bucket; it holds the coordinates origin + side * column ... + side - 1
    size: tuple  # (rows, columns)
    items: Tensor  # (2, B n) int64: x, y
    number: Tensor  # (B n,) int64: which item of its image each is
    start: Tensor  # (B rows columns + 1,) int64: where the items of each bucket begin
    table: Tensor  # (B, rows + 1, columns + 1) int64: items above and left of each corner

    @property
    def count(self):
        """n, the items of each image."""
        return len(self.number) // len(self.table)


def nearest_items(points, items, nearest, metric="l2"):
    """Find the nearest items of each point, through buckets, or by comparing all where there are few.

    Parameters
    ----------
    points : (B, q, 2) tensor
        (x, y): int64, or floating point; those are compared in float64.
    items : (B, n, 2) int64 tensor
    nearest : int
        k; all n if it is more than n.
    metric : {"l2", "l1"}

    Returns
    -------
    number : (B, q, k) int64 tensor
        Which items, nearest first; of two at the same distance the lower number comes first.
    squared : (B, q, k) tensor
        The square of each distance, int64 or float64.

    Raises
    ------
    ValueError
        Integers so large that a distance and a number do not fit in int64 together.
    """
    if len(points) * points.shape[1] * items.shape[1] <= FEW_PAIRS:
        return nearest_of_all(points, items, nearest, metric)
    return nearest_by_buckets(points, items, nearest, metric)


def nearest_by_buckets(points, items, nearest, metric="l2"):
    """``nearest_items`` through buckets."""
    (batch, q), n = points.shape[:2], items.shape[1]
    nearest = min(nearest, n)
    points = widened(points).flatten(0, 1).t().contiguous()  # (2, B q)
    if points.numel() * nearest == 0:
        return items.new_empty(batch, q, nearest), points.new_empty(batch, q, nearest)
    grid = _lay_out(items, per_bucket=max(1, nearest / 3))
    image = torch.arange(batch, device=items.device).repeat_interleave(q)
    block, certain = _first_block(grid, points, image, nearest, metric)
    everywhere = torch.full_like(certain, torch.inf)
    number, squared = _search(grid, points, image, block, everywhere, nearest, metric)
    again = (~(squared[:, -1] < certain * certain)).nonzero()[:, 0]  # "<": one just outside may have a lower number
    points, image, limit = (
        _pick(points, again),
        _pick(image, again),
        _pick(squared[:, -1], again).double() * (1 + SPARE),
    )
    block = _block_within(grid, points, limit)
    number[again], squared[again] = _search(grid, points, image, block, limit, nearest, metric)
    return number.unflatten(0, (batch, q)), squared.unflatten(0, (batch, q))


def _lay_out(items, per_bucket):
    """Sort items (B, n, 2) into Buckets of about ``per_bucket`` each, were they spread evenly."""
    batch, n = items.shape[:2]
    (x0, y0), (x1, y1) = torch.stack([items.amin(dim=(0, 1)), items.amax(dim=(0, 1))]).tolist()
    width, height = x1 - x0 + 1, y1 - y0 + 1
    side = math.ceil(max(math.sqrt(width * height * per_bucket / n), max(width, height) * per_bucket / n))
    rows, columns = (height - 1) // side + 1, (width - 1) // side + 1
    place = (items - items.new_tensor([x0, y0])) // side
    image = torch.arange(batch, device=items.device)[:, None]
    bucket = ((image * rows + place[..., 1]) * columns + place[..., 0]).flatten()
    bucket, order = bucket.sort(stable=True)
    start = torch.searchsorted(bucket, torch.arange(batch * rows * columns + 1, device=items.device))
    table = start.diff().view(batch, rows, columns).cumsum(dim=1).cumsum(dim=2)
    table = torch.nn.functional.pad(table, (1, 0, 1, 0))
    items = _pick(items.flatten(0, 1).t(), order)
    return Buckets((x0, y0), side, (rows, columns), items, order % n, start, table)


def _first_block(grid, points, image, nearest, metric):
    """The smallest block around each point's bucket that holds enough, and how near an item outside it can be.

    A block (4, q) is its first and last row and its first and last column.
    """
    rows, columns = grid.size
    (x, y), (x0, y0), side = points, grid.origin, grid.side
    column, row = _bucket(x - x0, side, columns), _bucket(y - y0, side, rows)
    radius = _pick(_radii(grid, nearest).flatten(), (image * rows + row) * columns + column)
    top, bottom, left, right = row - radius, row + radius, column - radius, column + radius
    above, below = y - (y0 + top * side - 1), y0 + (bottom + 1) * side - y  # to the nearest place outside
    before, behind = x - (x0 + left * side - 1), x0 + (right + 1) * side - x
    edges = torch.stack([above, below, before, behind])
    if not points.is_floating_point():
        farthest = 6 * int(edges.abs().amax())  # no distance looked at is larger, nor in the disc that may follow
        if not fits(farthest**2, grid.count):
            check_range(points, grid.items, grid.count, metric)
    ends = torch.stack([top <= 0, bottom >= rows - 1, left <= 0, right >= columns - 1])  # nothing lies beyond
    certain = edges.double().masked_fill_(ends, torch.inf).amin(dim=0)
    block = [top.clamp(min=0), bottom.clamp(max=rows - 1), left.clamp(min=0), right.clamp(max=columns - 1)]
    return torch.stack(block), certain


def _bucket(offset, side, count):
    """Row or column of an offset from the origin; the first or last one for what is outside."""
    if offset.is_floating_point():
        return (offset / side).floor().clamp(0, count - 1).long()
    return (offset // side).clamp(0, count - 1)


def _radii(grid, nearest):
    """Smallest r for each bucket (B, rows, columns) with ``nearest`` items in the (2 r + 1)^2 buckets around it."""
    batch, (rows, columns) = len(grid.table), grid.size
    device = grid.table.device
    image, row, column = (torch.arange(size, device=device) for size in (batch, rows, columns))
    image, row = image[:, None, None], row[:, None]
    low = torch.zeros_like(grid.table[:, 1:, 1:])
    high = low + max(rows, columns)
    for _ in range(max(rows, columns).bit_length()):
        middle = (low + high) // 2
        block = (row - middle).clamp(min=0), row + middle, (column - middle).clamp(min=0), column + middle
        enough = _count(grid, image, *block) >= nearest
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    return high


def _count(grid, image, top, bottom, left, right):
    """How many items a block holds; its last row and column are cut off at the grid's."""
    rows, columns = grid.size
    bottom, right = (bottom + 1).clamp(max=rows), (right + 1).clamp(max=columns)
    table, image = grid.table.flatten(), image * (rows + 1)
    corners = ((bottom, right), (top, right), (bottom, left), (top, left))
    a, b, c, d = (table.take((image + row) * (columns + 1) + column) for row, column in corners)
    return a - b - c + d


def _block_within(grid, points, squared):
    """The block (4, q) that holds all buckets within a distance of points (2, q), given its square."""
    (rows, columns), (x0, y0), (x, y), reach = grid.size, grid.origin, points.double(), _reach(squared)
    top, bottom = (_bucket(y - y0 + r, grid.side, rows) for r in (-reach, reach))
    left, right = (_bucket(x - x0 + r, grid.side, columns) for r in (-reach, reach))
    return torch.stack([top, bottom, left, right])


def _reach(squared):
    """A distance from its square (float64), and one more, in case that a place is rounded away from it."""
    return squared.sqrt() + 1


def _search(grid, points, image, block, limit, nearest, metric):
    """The nearest items of points (2, q) in their blocks, as far as a squared distance: number, squared (q, k).

    There must be as many as are wanted; of what is farther, some may be looked at.
    """
    number = image.new_empty(len(image), nearest)
    squared = points.new_empty(len(image), nearest)
    cost = torch.maximum(_count(grid, image, *block), block[1] - block[0] + 1)
    order = cost.argsort(descending=True, stable=True)  # alike together, for each slice is padded to its widest
    most, start = pairs_at_once(points.device), 0
    while start < len(order):
        some = order[start : start + max(1, most // int(cost[order[start]]))]
        pairs = _candidates(grid, *(_pick(x, some) for x in (points, image, block, limit)), metric)
        number[some], squared[some] = smallest(*pairs, nearest, grid.count)
        start += len(some)
    return number, squared


def _candidates(grid, points, image, block, limit, metric):
    """Squared distances and numbers (q, T) of the items to look at for points (2, q), padded to the longest list."""
    owner, begin, count = _runs(grid, points, image, block, limit)
    held = torch.zeros_like(image).index_add_(0, owner, count)
    width = int(held.max())
    run, item = _ranges(begin, count)
    owner = _pick(owner, run)  # one entry for each pair of point and item
    shift = torch.arange(len(held), device=held.device) * width - (held.cumsum(0) - held)
    slot = torch.arange(len(owner), device=held.device) + _pick(shift, owner)
    distance = squared_distances(*_pick(points, owner), *_pick(grid.items, item), metric)
    farthest = torch.inf if distance.is_floating_point() else LARGEST // grid.count - 1
    padded = distance.new_full((len(held) * width,), farthest).scatter_(0, slot, distance)
    index = item.new_full((len(held) * width,), grid.count).scatter_(0, slot, _pick(grid.number, item))
    return padded.view(-1, width), index.view(-1, width)


def _runs(grid, points, image, block, limit):
    """The stretches of sorted items to look at, one for each row of each block: whose, its first item, its length."""
    (rows, columns), (x0, y0), side = grid.size, grid.origin, grid.side
    top, bottom, left, right = block
    owner, row = _ranges(top, bottom - top + 1)
    x, y = _pick(points, owner).double()
    low = y0 + row * side
    gap = torch.maximum(low - y, y - (low + side - 1)).clamp_(min=0)  # from the point to the row
    reach = _reach((_pick(limit, owner) - gap * gap).clamp_(min=0))
    first = torch.maximum(_pick(left, owner), _bucket(x - x0 - reach, side, columns))
    last = torch.minimum(_pick(right, owner), _bucket(x - x0 + reach, side, columns))
    line = (_pick(image, owner) * rows + row) * columns
    begin = _pick(grid.start, line + first)
    return owner, begin, _pick(grid.start, line + last + 1) - begin


def _ranges(first, count):
    """first[i], first[i] + 1, ... (count[i] of them), one i after the other: each one's i, and itself."""
    owner = torch.repeat_interleave(count)
    within = first - (count.cumsum(0) - count)
    return owner, torch.arange(len(owner), device=count.device) + _pick(within, owner)


def _pick(x, index):
    """``x[..., index]``, several times as fast on a CPU."""
    return x.gather(-1, index.expand(*x.shape[:-1], -1))
