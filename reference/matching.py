"""Matching queries to objects, and the losses of the pairs (Cheng et al., Mask2Former, sec. 3.3 and 4.1).

Masks are compared at sampled points only. All logits are in natural units; targets are 0 or 1, or between at an edge.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from .checks import check_arrays, check_indices, check_number
from .layers import log_softmax, sigmoid, softplus

CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 2.0, 5.0, 5.0
NO_OBJECT_WEIGHT = 0.1


def sample_points(maps, points):
    """Read maps (m, h, w) at points (p, 2), (x, y) in [0, 1]: bilinear, zero outside -> (m, p).

    Mask2Former, sec. 3.3.
    """
    check_arrays(maps=(maps, "real", "m h+ w+"), points=(points, "real", "p 2"))
    h, w = maps.shape[1:]
    x, y = points[:, 0] * w - 0.5, points[:, 1] * h - 0.5
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)))
    out = 0.0
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        share = (1 - np.abs(x - x0 - dx)) * (1 - np.abs(y - y0 - dy))
        out = out + share * padded[:, np.clip(y0 + dy + 1, 0, h + 1), np.clip(x0 + dx + 1, 0, w + 1)]
    return out


def matching_costs(class_logits, mask_logits, labels, targets):
    """Cost of every query for every object (Mask2Former, sec. 3.3).

    Parameters
    ----------
    class_logits : (q, classes + 1) array
    mask_logits : (q, p) array
        At the p sampled points.
    labels : (g,) int array
        Classes of the objects.
    targets : (g, p) array
        Their masks at the same points.

    Returns
    -------
    (q, g) array
        2 (-probability of the class) + 5 (mean cross-entropy) + 5 (1 - dice).
    """
    check_arrays(
        class_logits=(class_logits, "real", "q classes"), mask_logits=(mask_logits, "real", "q p+"),
        labels=(labels, "whole", "g"), targets=(targets, "real", "g p"),
    )  # fmt: skip
    check_indices("labels", labels, class_logits.shape[-1])
    p = mask_logits.shape[1]
    class_cost = -np.exp(log_softmax(class_logits))[:, labels]
    mask_cost = (softplus(-mask_logits) @ targets.T + softplus(mask_logits) @ (1 - targets).T) / p
    prob = sigmoid(mask_logits)
    overlap = prob @ targets.T
    dice_cost = 1 - (2 * overlap + 1) / (prob.sum(axis=1)[:, None] + targets.sum(axis=1) + 1)
    return CLASS_WEIGHT * class_cost + MASK_WEIGHT * mask_cost + DICE_WEIGHT * dice_cost


def match(costs):
    """Pair queries with objects at the least total cost (Hungarian method): (q, g) -> queries (r,), objects (r,).

    Mask2Former, sec. 3.3.
    """
    check_arrays(costs=(costs, "real or whole", "q g"))
    try:
        return linear_sum_assignment(costs)
    except ValueError as error:
        raise ValueError(f"costs must be numbers that leave a way to pair: {error}") from None


def class_loss(class_logits, queries, labels):
    """Cross-entropy of all queries, those without an object (weight 0.1) against the last class.

    Mask2Former, sec. 4.1.

    class_logits (q, classes + 1); ``queries`` (r,) are paired with ``labels`` (r,). Weighted mean over the queries.
    """
    check_arrays(
        class_logits=(class_logits, "real", "q classes"), queries=(queries, "whole", "r"), labels=(labels, "whole", "r")
    )  # fmt: skip
    check_indices("queries", queries, len(class_logits))
    check_indices("labels", labels, class_logits.shape[1])
    target = np.full(len(class_logits), class_logits.shape[1] - 1)
    target[queries] = labels
    weight = np.where(target == class_logits.shape[1] - 1, NO_OBJECT_WEIGHT, 1.0)
    loss = -log_softmax(class_logits)[np.arange(len(target)), target]
    return (weight * loss).sum() / weight.sum()


def mask_losses(mask_logits, targets, objects):
    """Mask cross-entropy and dice loss of the pairs, each summed over the pairs and divided by ``objects``.

    Mask2Former, sec. 4.1.

    mask_logits and targets (r, p) at the sampled points.
    """
    check_arrays(mask_logits=(mask_logits, "real", "r p"), targets=(targets, "real", "r p"))
    check_number("objects", objects)
    entropy = (softplus(mask_logits) - mask_logits * targets).mean(axis=1)
    prob = sigmoid(mask_logits)
    dice = 1 - (2 * (prob * targets).sum(axis=1) + 1) / (prob.sum(axis=1) + targets.sum(axis=1) + 1)
    return entropy.sum() / objects, dice.sum() / objects
