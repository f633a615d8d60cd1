"""What the tests of the segmentation heads share: token sets of four levels, small heads, and segmenters to compare."""

import numpy as np
import torch

import fast
import fast.backbone
import reference.backbone
import reference.hcformer
import reference.mask2former
from parity_tests.weights import fill
from reference.patch_embedding import grid_positions

SMALL_HEAD = {
    "num_classes": 5,
    "hidden_dim": 16,
    "num_queries": 6,
    "heads": 2,
    "points": 3,
    "encoder_layers": 2,
    "decoder_layers": 4,
    "encoder_ffn": 24,
    "decoder_ffn": 20,
}
DIMS = (6, 8, 10, 12)


def small_config(**overrides):
    """The small head's configuration in both twins: fast's, the reference's."""
    options = {**SMALL_HEAD, **overrides}
    return fast.HeadConfig(**options), reference.mask2former.HeadConfig(**options)


def level_positions(grid_size, batch=1, seed=0):
    """Positions (B, n, 2) of res2..res5: the grid, then nested subsets of about a third that keep every 4th cell."""
    rng, sets = np.random.default_rng(seed), [np.tile(grid_positions(grid_size), (batch, 1, 1))]
    for level in range(1, 4):
        spacing, images = 2 ** (level + 1), []
        keep = max(len(sets[-1][0]) // 3, -(-grid_size[0] // spacing) * -(-grid_size[1] // spacing))
        for positions in sets[-1]:
            free = (positions % spacing).any(axis=1)
            images.append(positions[np.sort(np.lexsort((rng.random(len(positions)), free))[:keep])])
        sets.append(np.stack(images))
    return sets


def token_sets(grid_size, batch=1, dims=DIMS, dtype=torch.float64, seed=0):
    """Random TokenSets res2..res5, and the same for the reference: a list of (positions, features) for each image."""
    rng, ours = np.random.default_rng(seed + 1), []
    for positions, dim in zip(level_positions(grid_size, batch, seed), dims, strict=True):
        features = torch.from_numpy(rng.standard_normal((*positions.shape[:2], dim))).to(dtype)
        ours.append(fast.backbone.TokenSet(torch.from_numpy(positions), features, grid_size))
    theirs = [[(t.positions[i].numpy(), t.features[i].double().numpy()) for t in ours] for i in range(batch)]
    return ours, theirs


def segmenter(head, dtype=torch.float32, backbone_overrides=None, **overrides):
    """A nano segmenter in evaluation, with non-trivial weights rounded to ``dtype``, and those weights."""
    options = {**SMALL_HEAD, **overrides}
    model = fast.create_segmenter("aff_nano", head, backbone_overrides=backbone_overrides, **options).eval()
    return model, fill(model, seed=9, dtype=dtype)


def reference_segment(model, weights, image, largest=None):
    """The reference's predictions of one image (3, H, W), for a model of either head: list of (classes, masks)."""
    config = reference.backbone.Config(**vars(model.backbone.config))
    head = reference.mask2former.HeadConfig(**vars(model.config))
    part = reference.backbone.subset(weights, "backbone")
    stages = reference.backbone.forward_features(config, part, image)
    sets = reference.backbone.token_sets(part, stages)
    grid_size = tuple(-(-side // 4) for side in image.shape[1:])
    if isinstance(model, fast.hcformer.HCFormer):
        return reference.hcformer.forward(stages, sets, grid_size, weights, head, largest)
    return reference.mask2former.forward(sets, grid_size, weights, head, largest)[0]


def predictions(output):
    """All (class logits, mask logits) of a SegmenterOutput, the result last, as tensors."""
    names = ("class_queries_logits", "masks_queries_logits")
    return [tuple(a[n] for n in names) for a in output.auxiliary_logits] + [tuple(getattr(output, n) for n in names)]


def pictures(height, width, batch=2, seed=8):
    """Coarse tiles under noise, normalised, float64 (B, 3, H, W)."""
    rng = np.random.default_rng(seed)
    tiles = rng.standard_normal((batch, 3, -(-height // 8), -(-width // 8))).repeat(8, axis=2).repeat(8, axis=3)
    return tiles[..., :height, :width] + 0.5 * rng.standard_normal((batch, 3, height, width))
