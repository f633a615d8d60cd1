"""Matching queries to objects, and the losses of the pairs (Cheng et al., Mask2Former, sec. 3.3 and 4.1).

Masks are compared at sampled points only. Everything is in float32 (or wider), also under autocast.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, grid_sample, softplus

CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 2.0, 5.0, 5.0
NO_OBJECT_WEIGHT = 0.1
POINTS, OVERSAMPLE, IMPORTANT = 12544, 3, 0.75


def sample_points(maps, points):
    """Read maps (m, h, w) at points (p, 2) or (m, p, 2), (x, y) in [0, 1]: bilinear, zero outside -> (m, p)."""
    points = points.expand(len(maps), -1, -1)
    return grid_sample(maps[:, None], 2 * points[:, :, None] - 1, align_corners=False)[:, 0, :, 0]


def matching_costs(class_logits, mask_logits, labels, targets):
    """Cost of every query for every object.

    Parameters
    ----------
    class_logits : (q, classes + 1) tensor
    mask_logits : (q, p) tensor
        At the p sampled points.
    labels : (g,) int64 tensor
    targets : (g, p) tensor
        The objects' masks at the same points, 0 to 1.

    Returns
    -------
    (q, g) tensor
        2 (-probability of the class) + 5 (mean cross-entropy) + 5 (1 - dice).
    """
    p = mask_logits.shape[1]
    class_cost = -class_logits.softmax(dim=-1)[:, labels]
    mask_cost = (softplus(-mask_logits) @ targets.T + softplus(mask_logits) @ (1 - targets).T) / p
    prob = mask_logits.sigmoid()
    dice_cost = 1 - (2 * prob @ targets.T + 1) / (prob.sum(dim=1)[:, None] + targets.sum(dim=1) + 1)
    return CLASS_WEIGHT * class_cost + MASK_WEIGHT * mask_cost + DICE_WEIGHT * dice_cost


def match(costs):
    """Pair queries with objects at the least total cost (Hungarian method, SciPy): (q, g) -> queries, objects (r,)."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ImportError("matching queries to objects needs the package scipy: pip install scipy") from None
    pairs = linear_sum_assignment(costs.detach().cpu().double().numpy())
    return tuple(torch.as_tensor(side, device=costs.device) for side in pairs)


def class_loss(class_logits, queries, labels):
    """Cross-entropy of all queries, those without an object (weight 0.1) against the last class; weighted mean.

    class_logits (B, q, classes + 1); ``queries`` and ``labels`` hold one (r,) tensor an image.
    """
    last = class_logits.shape[-1] - 1
    target = torch.full(class_logits.shape[:2], last, device=class_logits.device)
    for image, (query, label) in enumerate(zip(queries, labels, strict=True)):
        target[image, query] = label
    weight = torch.ones(last + 1, device=class_logits.device, dtype=class_logits.dtype)
    weight[last] = NO_OBJECT_WEIGHT
    return cross_entropy(class_logits.transpose(1, 2), target, weight)


def mask_losses(mask_logits, targets, objects):
    """Mask cross-entropy and dice loss of the pairs, each summed over the pairs and divided by ``objects``.

    mask_logits and targets (r, p) at the sampled points.
    """
    entropy = binary_cross_entropy_with_logits(mask_logits, targets, reduction="none").mean(dim=1)
    prob = mask_logits.sigmoid()
    dice = 1 - (2 * (prob * targets).sum(dim=1) + 1) / (prob.sum(dim=1) + targets.sum(dim=1) + 1)
    return entropy.sum() / objects, dice.sum() / objects


def important_points(mask_logits, count, generator=None):
    """Draw ``count`` points a mask, three quarters of them where the mask is least certain.

    mask_logits (r, h, w) -> (r, count, 2) in [0, 1]: of 3 x count uniform points the least certain stay, the rest is
    uniform again.
    """
    r, device = len(mask_logits), mask_logits.device
    many = torch.rand(r, OVERSAMPLE * count, 2, device=device, generator=generator)
    uncertainty = -sample_points(mask_logits.detach(), many).abs()
    kept = int(IMPORTANT * count)
    best = uncertainty.topk(kept, dim=1).indices
    chosen = many.gather(1, best[..., None].expand(-1, -1, 2))
    return torch.cat([chosen, torch.rand(r, count - kept, 2, device=device, generator=generator)], dim=1)


@dataclass(frozen=True)
class Objects:
    """What there is to find in one image."""

    labels: Tensor  # (g,) int64
    masks: Tensor  # (g, h, w): bool or 0 to 1, any size that covers the same area as the predicted masks


class SetLoss(nn.Module):
    """The loss of a segmenter: match, then class, mask and dice losses, for the result and every auxiliary prediction.

    Parameters
    ----------
    points : int
        Sampled points a mask.
    """

    def __init__(self, points=POINTS):
        super().__init__()
        self.points = points

    def forward(self, output, objects, count=None, generator=None):
        """Compare a SegmenterOutput with a list of Objects, one an image.

        Parameters
        ----------
        output : SegmenterOutput
        objects : list of Objects
            An image may have none.
        count : float or tensor, optional
            What sums over pairs are divided by; by default the number of objects in the batch, at least 1.
            Data-parallel training passes the mean over its processes.
        generator : torch.Generator, optional
            For the sampled points.

        Returns
        -------
        dict of str to scalar tensor
            ``class``, ``mask``, ``dice``: weighted, summed over the predictions; ``loss``: their sum.
        """
        count = max(1, sum(len(o.labels) for o in objects)) if count is None else count
        last = {
            "class_queries_logits": output.class_queries_logits,
            "masks_queries_logits": output.masks_queries_logits,
        }
        totals = torch.zeros(3, device=output.class_queries_logits.device)
        with torch.autocast(totals.device.type, enabled=False):
            for prediction in [*output.auxiliary_logits, last]:
                classes, masks = (prediction[name].float() for name in last)
                totals = totals + torch.stack(self._losses(classes, masks, objects, count, generator))
        return {"class": totals[0], "mask": totals[1], "dice": totals[2], "loss": totals.sum()}

    def _losses(self, classes, masks, objects, count, generator):
        """Weighted class, mask and dice loss of one prediction."""
        pairs = [self._pair(c, m, o, generator) for c, m, o in zip(classes, masks, objects, strict=True)]
        labels = [o.labels[found] for o, (_, found) in zip(objects, pairs, strict=True)]
        entropy = dice = masks.sum() * 0  # keeps every output in the graph where there is nothing to match
        for mask, o, (query, found) in zip(masks, objects, pairs, strict=True):
            if len(query) == 0:
                continue
            chosen = mask[query]
            points = important_points(chosen, self.points, generator)
            targets = sample_points(o.masks[found].to(chosen.dtype), points)
            parts = mask_losses(sample_points(chosen, points), targets, count)
            entropy, dice = entropy + parts[0], dice + parts[1]
        first = class_loss(classes, [query for query, _ in pairs], labels)
        return CLASS_WEIGHT * first, MASK_WEIGHT * entropy, DICE_WEIGHT * dice

    @torch.no_grad()
    def _pair(self, classes, masks, objects, generator):
        """Match one image's queries (q, ...) with its objects at uniform points, the same for all."""
        points = torch.rand(1, self.points, 2, device=masks.device, generator=generator)
        targets = sample_points(objects.masks.to(masks.dtype), points)
        costs = matching_costs(classes, sample_points(masks, points), objects.labels, targets)
        return match(costs.nan_to_num(nan=1e10, posinf=1e10, neginf=1e10))  # the last that anyone would choose
