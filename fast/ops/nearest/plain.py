"""Exact nearest neighbours by comparing all pairs: the definition of this side."""

import torch

PAIRS_AT_ONCE = 1 << 18  # distances held at a time: bounds memory, and a CPU keeps them in its cache
WIDER = 64  # times as many elsewhere, where a step costs the same for few as for many
LARGEST = 2**63 - 1


def nearest_of_all(points, items, nearest, metric="l2"):
    """Find the nearest items of each point by comparing all pairs.

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
    (batch, q), n = points.shape[:2], items.shape[1]
    real = points.is_floating_point()
    number = items.new_empty(batch, q, min(nearest, n))
    squared = torch.empty_like(number, dtype=torch.float64 if real else torch.int64)
    if number.numel() == 0:
        return number, squared
    if not real:
        check_range(points, items, n, metric)
    each = torch.arange(n, device=items.device)
    rows = max(1, pairs_at_once(items.device) // (batch * n))
    for part in (slice(start, start + rows) for start in range(0, q, rows)):
        distance = squared_distances(
            *widened(points[:, part, None]).unbind(-1), *items[:, None].unbind(-1), metric
        )  # (B, rows, n)
        number[:, part], squared[:, part] = smallest(distance, each.expand_as(distance), number.shape[2], n)
    return number, squared


def pairs_at_once(device):
    """Return how many distances to hold at a time on a device."""
    return PAIRS_AT_ONCE * (1 if device.type == "cpu" else WIDER)


def widened(points):
    """Real numbers as float64; what is no number counts as 0, and beyond 1e100 all items are as far anyway."""
    return points.double().nan_to_num(0).clamp(-1e100, 1e100) if points.is_floating_point() else points


def squared_distances(x, y, item_x, item_y, metric):
    """Squares of the distances, int64 or float64 as the points are."""
    dx, dy = x - item_x, y - item_y
    return dx.mul_(dx).add_(dy.mul_(dy)) if metric == "l2" else dx.abs_().add_(dy.abs_()).square_()


def smallest(distance, index, nearest, n):
    """The ``nearest`` smallest of distances (..., T) by (distance, index): their indices and distances."""
    if distance.is_floating_point():
        index, order = index.sort(dim=-1)
        squared, order = distance.gather(-1, order).sort(dim=-1, stable=True)
        return index.gather(-1, order)[..., :nearest], squared[..., :nearest]
    key = (distance * n + index).topk(nearest, dim=-1, largest=False).values  # one integer says it all
    return key % n, key // n


def fits(squared, n):
    """Whether one int64 can hold squared distances up to this and the number of one of n items."""
    return squared * n + n <= LARGEST


def check_range(points, items, n, metric):
    """Refuse integers so far apart that a squared distance and the number of one of n items do not fit in one int64."""
    low, high = torch.stack([points.amin(), items.amin()]).amin(), torch.stack([points.amax(), items.amax()]).amax()
    span = int(high) - int(low)
    if not fits((2 if metric == "l2" else 4) * span**2, n):
        raise ValueError(
            f"distances of {span} units among {n} items are too large for exact integers; use a smaller image"
        )
