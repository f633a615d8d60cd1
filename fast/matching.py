"""Matching queries to objects, and the losses of the pairs (Cheng et al., Mask2Former, sec. 3.3 and 4.1).

Masks are compared at sampled points only. Everything is in float32 (or wider), also under autocast.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, grid_sample, pad, softplus

from .checks import check_arrays, check_indices, check_number, check_whole, shown
from .ops.indexing import gather_rows

CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 2.0, 5.0, 5.0
NO_OBJECT_WEIGHT = 0.1
POINTS, OVERSAMPLE, IMPORTANT = 12544, 3, 0.75
MOST_POINTS = 2**20


def sample_points(maps, points):
    """Read maps (m, h, w) at points (p, 2) or (m, p, 2), (x, y) in [0, 1]: bilinear, zero outside -> (m, p)."""
    several = isinstance(points, Tensor) and points.ndim == 3
    check_arrays(maps=(maps, "real", "m h+ w+"), points=(points, "real", "m p 2" if several else "p 2"))
    points = points.to(maps.dtype).expand(len(maps), -1, -1)
    return grid_sample(maps[:, None], 2 * points[:, :, None] - 1, align_corners=False)[:, 0, :, 0]


def matching_costs(class_logits, mask_logits, labels, targets):
    """Cost of every query for every object; all may have leading axes, as of a batch.

    Parameters
    ----------
    class_logits : (..., q, classes + 1) tensor
    mask_logits : (..., q, p) tensor
        At the p sampled points.
    labels : (..., g) int64 tensor
    targets : (..., g, p) tensor
        The objects' masks at the same points, 0 to 1.

    Returns
    -------
    (..., q, g) tensor
        2 (-probability of the class) + 5 (mean cross-entropy) + 5 (1 - dice).
    """
    check_arrays(
        class_logits=(class_logits, "real", "... q classes"), mask_logits=(mask_logits, "real", "... q p+"),
        labels=(labels, "whole", "... g"), targets=(targets, "real", "... g p"),
    )  # fmt: skip
    check_indices("labels", labels, class_logits.shape[-1])
    targets = targets.to(mask_logits.dtype)
    prob, labels = class_logits.softmax(dim=-1), labels.long()
    class_cost = -prob.gather(-1, labels[..., None, :].expand(*prob.shape[:-1], -1))
    # mean over the points of softplus(-x) t + softplus(x) (1 - t), which is softplus(x) - x t
    products = (targets @ mask_logits.mT).mT  # in this order: of the other, MKL takes ten times as long
    mask_cost = (softplus(mask_logits).sum(dim=-1, keepdim=True) - products) / mask_logits.shape[-1]
    prob = mask_logits.sigmoid()
    total = prob.sum(dim=-1, keepdim=True) + targets.sum(dim=-1)[..., None, :]
    dice_cost = 1 - (2 * (targets @ prob.mT).mT + 1) / (total + 1)
    return CLASS_WEIGHT * class_cost + MASK_WEIGHT * mask_cost + DICE_WEIGHT * dice_cost


def match(costs):
    """Pair queries with objects at the least total cost (Hungarian method, SciPy): (q, g) -> queries, objects (r,)."""
    check_arrays(costs=(costs, "real or whole", "q g"))
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ImportError("matching queries to objects needs the package scipy: pip install scipy") from None
    try:
        pairs = linear_sum_assignment(costs.detach().cpu().double().numpy())
    except ValueError as error:
        raise ValueError(f"costs must be numbers that leave a way to pair: {error}") from None
    return tuple(torch.as_tensor(side, device=costs.device) for side in pairs)


def class_loss(class_logits, queries, labels, weight_sum=None):
    """Cross-entropy of all queries, those without an object (weight 0.1) against the last class; weighted mean.

    class_logits (B, q, classes + 1); ``queries`` and ``labels`` hold one (r,) tensor an image. ``weight_sum``: what the
    weighted sum is divided by, if not the sum of the weights.
    """
    check_arrays(class_logits=(class_logits, "real", "B q classes"))
    for name, given in (("queries", queries), ("labels", labels)):
        if not isinstance(given, tuple | list) or len(given) != len(class_logits):
            raise TypeError(f"{name} must be a list of one tensor an image, not {shown(type(given).__name__)}")
    for query, label in zip(queries, labels, strict=True):
        check_arrays(queries=(query, "whole", "r"), labels=(label, "whole", "r"))
        check_indices("queries", query, class_logits.shape[1])
        check_indices("labels", label, class_logits.shape[2])
    if weight_sum is not None:
        _check_divisor("weight_sum", weight_sum)
    last = class_logits.shape[-1] - 1
    target = torch.full(class_logits.shape[:2], last, device=class_logits.device)
    target[_image_of(queries), torch.cat(queries).long()] = torch.cat(labels).long()
    weight = torch.ones(last + 1, device=class_logits.device, dtype=class_logits.dtype)
    weight[last] = NO_OBJECT_WEIGHT
    if weight_sum is None:
        return cross_entropy(class_logits.transpose(1, 2), target, weight)
    return cross_entropy(class_logits.transpose(1, 2), target, weight, reduction="sum") / weight_sum


def _check_divisor(name, value):
    """Refuse what is neither a number nor a tensor of one."""
    if isinstance(value, Tensor):
        check_arrays(**{name: (value.reshape(-1), "real or whole", "1")})
    else:
        check_number(name, value)


def _check_objects(objects, images):
    """Refuse what is no list of Objects, one an image, each with as many masks as labels."""
    if not isinstance(objects, tuple | list) or not all(isinstance(each, Objects) for each in objects):
        raise TypeError(f"objects must be a list of Objects, one an image, not {shown(type(objects).__name__)}")
    if len(objects) != images:
        raise ValueError(f"objects must be as many as images, {images}, not {len(objects)}")
    for i, each in enumerate(objects):
        if not isinstance(each.labels, Tensor) or not isinstance(each.masks, Tensor):
            raise TypeError(f"objects {i} must hold tensors, labels and masks")
        if each.labels.ndim != 1 or each.masks.ndim != 3 or len(each.labels) != len(each.masks):
            shapes = f"{tuple(each.labels.shape)} and {tuple(each.masks.shape)}"
            raise ValueError(f"labels and masks of objects {i} must have shapes (g,) and (g, h, w), not {shapes}")


def _image_of(per_image):
    """The number of the image of each entry of a list of (r,) tensors, one an image: -> (sum of r,)."""
    device = per_image[0].device
    return torch.cat([torch.full_like(x, i, device=device) for i, x in enumerate(per_image)])


def mask_losses(mask_logits, targets, objects):
    """Mask cross-entropy and dice loss of the pairs, each summed over the pairs and divided by ``objects``.

    mask_logits and targets (r, p) at the sampled points.
    """
    check_arrays(mask_logits=(mask_logits, "real", "r p"), targets=(targets, "real", "r p"))
    _check_divisor("objects", objects)
    entropy = binary_cross_entropy_with_logits(mask_logits, targets, reduction="none").mean(dim=1)
    prob = mask_logits.sigmoid()
    dice = 1 - (2 * (prob * targets).sum(dim=1) + 1) / (prob.sum(dim=1) + targets.sum(dim=1) + 1)
    return entropy.sum() / objects, dice.sum() / objects


def important_points(mask_logits, count, generator=None):
    """Draw ``count`` points a mask, three quarters of them where the mask is least certain.

    mask_logits (r, h, w) -> (r, count, 2) in [0, 1]: of 3 x count uniform points the least certain stay, the rest is
    uniform again.
    """
    check_arrays(mask_logits=(mask_logits, "real", "r h+ w+"))
    check_whole("count", count, 1, MOST_POINTS)
    return _most_uncertain(mask_logits, *_candidates(len(mask_logits), count, mask_logits.device, generator))


def _candidates(r, count, device, generator):
    """Uniform points of r masks: the 3 x count to choose from, and those that are added to the chosen."""
    many = torch.rand(r, OVERSAMPLE * count, 2, device=device, generator=generator)
    return many, torch.rand(r, count - int(IMPORTANT * count), 2, device=device, generator=generator)


def _most_uncertain(mask_logits, many, others):
    """``important_points`` of masks (r, h, w) among the candidates (r, 3 count, 2) and (r, count / 4, 2)."""
    kept = many.shape[1] // OVERSAMPLE - others.shape[1]
    uncertainty = -sample_points(mask_logits.detach(), many).abs()
    best = uncertainty.topk(kept, dim=1, sorted=False).indices
    return torch.cat([gather_rows(many, best), others], dim=1)


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
        check_whole("points", points, 1, MOST_POINTS)
        self.points = points

    def forward(self, output, objects, count=None, generator=None, class_weight_sum=None):
        """Compare a SegmenterOutput with a list of Objects, one an image.

        Parameters
        ----------
        output : SegmenterOutput
        objects : list of Objects
            An image may have none.
        count : float or tensor, optional
            What sums over pairs are divided by; by default the number of objects in the batch, at least 1.
            Data-parallel training passes the mean over its processes.
        generator : torch.Generator or list of them, optional
            For the sampled points; with a list, one an image, an image's points do not depend on its batch.
        class_weight_sum : float, optional
            What the weighted sum over queries of the class loss is divided by; by default the sum of the weights.

        Returns
        -------
        dict of str to scalar tensor
            ``class``, ``mask``, ``dice``: weighted, summed over the predictions; ``loss``: their sum.
        """
        _check_objects(objects, len(output.class_queries_logits))
        count = max(1, sum(len(o.labels) for o in objects)) if count is None else count
        generators = generator if isinstance(generator, list) else [generator] * len(objects)
        last = {
            "class_queries_logits": output.class_queries_logits,
            "masks_queries_logits": output.masks_queries_logits,
        }
        totals = torch.zeros(3, device=output.class_queries_logits.device)
        with torch.autocast(totals.device.type, enabled=False):
            for prediction in [*output.auxiliary_logits, last]:
                classes, masks = (prediction[name].float() for name in last)
                pairs = self._match(classes, masks, objects, generators)
                labels = [o.labels[found] for o, (_, found) in zip(objects, pairs, strict=True)]
                first = class_loss(classes, [query for query, _ in pairs], labels, class_weight_sum)
                entropy, dice = self._mask_losses(masks, objects, pairs, count, generators)
                totals = totals + torch.stack([CLASS_WEIGHT * first, MASK_WEIGHT * entropy, DICE_WEIGHT * dice])
        return {"class": totals[0], "mask": totals[1], "dice": totals[2], "loss": totals.sum()}

    @torch.no_grad()
    def _match(self, classes, masks, objects, generators):
        """Match each image's queries with its objects at uniform points: a list of (queries, objects), (r,) each."""
        draws = [torch.rand(1, self.points, 2, device=masks.device, generator=g) for g in generators]
        points = torch.cat(draws)  # (B, p, 2), the same for all masks of an image
        logits = grid_sample(masks, 2 * points[:, :, None] - 1, align_corners=False)[..., 0]  # (B, q, p)
        most = max(len(o.labels) for o in objects)
        labels = torch.stack([pad(o.labels, (0, most - len(o.labels))) for o in objects])
        targets = _sample_targets([o.masks for o in objects], points.unbind())
        targets = torch.stack([pad(t, (0, 0, 0, most - len(t))) for t in targets])  # (B, most, p)
        costs = matching_costs(classes, logits, labels, targets)
        costs = costs.nan_to_num(nan=1e10, posinf=1e10, neginf=1e10).cpu()  # the last that anyone would choose
        pairs = [match(c[:, : len(o.labels)]) for c, o in zip(costs, objects, strict=True)]
        return [tuple(side.to(masks.device) for side in pair) for pair in pairs]

    def _mask_losses(self, masks, objects, pairs, count, generators):
        """Mask cross-entropy and dice loss of all pairs of a batch, at points of their own."""
        queries = [query for query, _ in pairs]
        if not any(map(len, queries)):
            return (masks.sum() * 0,) * 2  # keeps every output in the graph where there is nothing to match
        chosen = masks[_image_of(queries), torch.cat(queries)]  # (R, h, w)
        draws = [_candidates(len(q), self.points, masks.device, g) for q, g in zip(queries, generators, strict=True)]
        points = _most_uncertain(chosen, *(torch.cat(side) for side in zip(*draws, strict=True)))
        found = [o.masks[which] for o, (_, which) in zip(objects, pairs, strict=True)]
        targets = torch.cat(_sample_targets(found, points.split([len(q) for q in queries])))
        entropy, dice = mask_losses(sample_points(chosen, points), targets, count)
        return entropy + masks.sum() * 0, dice


def _sample_targets(masks, points):
    """Read each image's masks (g, h, w), bool or 0 to 1, at its points (p, 2) or (g, p, 2): a list of (g, p)."""
    if len({m.shape[1:] for m in masks}) > 1:  # images of several sizes
        return [sample_points(m.float(), p) for m, p in zip(masks, points, strict=True)]
    counts = [len(m) for m in masks]
    points = torch.cat([p.expand(n, -1, -1) for n, p in zip(counts, points, strict=True)])
    return sample_points(torch.cat(masks).float(), points).split(counts)
