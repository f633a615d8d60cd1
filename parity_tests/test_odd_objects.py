"""Odd arguments of losses, heads, models and files end in one line of ours, in either twin, and crash no kernel."""

import numpy as np
import pytest
import torch

import fast
import fast.deformable
import fast.hcformer
import fast.interpolation
import fast.matching
import fast.neighborhoods
import reference.clustering
import reference.deformable
import reference.hcformer
import reference.interpolation
import reference.mask2former
import reference.matching
import reference.neighborhoods
from fast import checkpoints, clustering, mask2former

CELLS = np.stack(np.meshgrid(range(8), range(8)), -1).reshape(-1, 2)
TOKENS, HALF = torch.from_numpy(CELLS)[None], torch.full((1, 64, 8), 0.5)
LOGITS, IDS = torch.zeros(2, 5, 4), torch.tensor([0, 1])
NUMBERS = np.arange(64)[:, None]
NAMES = (None, 3, 1j, ["aff_nano"], np.zeros((2, 2)), "x" * 10**5)
CALLS = {
    "cells off the grid": [
        *(lambda x=x: clustering.cluster_order(TOKENS + x, 8, (8, 8)) for x in (1, -1, 2**40)),
        *(lambda x=x: fast.neighborhoods.stage_geometry(TOKENS + x, 8, 16, (8, 8)) for x in (1, -1, 2**40)),
        lambda: clustering.cluster_order(TOKENS[..., :0], 8, (8, 8)),
        lambda: clustering.cluster_order(None, 8, (8, 8)),
        lambda: fast.neighborhoods.stage_geometry(TOKENS, 8, 16, (8, 8), dtype=None),
        lambda: reference.clustering.cluster_sums(CELLS, np.arange(65), 8),
        lambda: reference.neighborhoods.nearest_clusters_kdtree(CELLS, CELLS, np.ones(64), 3),
    ],
    "no nearest token": [
        lambda: fast.interpolation.shepard(TOKENS, TOKENS, HALF, torch.zeros(1, 64, 0, dtype=torch.int64)),
        lambda: reference.interpolation.shepard(CELLS, CELLS, HALF[0].numpy(), np.zeros((64, 0), np.int64)),
    ],
    "power": [
        *(lambda x=x: fast.interpolation.shepard(TOKENS, TOKENS, HALF, TOKENS, x) for x in ("x", None, HALF)),
        *(lambda x=x: reference.interpolation.shepard(CELLS, CELLS, HALF[0].numpy(), NUMBERS, x) for x in ("x", CELLS)),
    ],
    "losses": [
        *(
            lambda x=x: fast.matching.class_loss(LOGITS, *x)
            for x in ((IDS, IDS), ([IDS], [IDS]), ([IDS, 3], [IDS] * 2))
        ),
        *(lambda x=x: fast.matching.class_loss(LOGITS, [IDS, x], [IDS, IDS]) for x in (IDS + 4, IDS[:1], IDS / 2)),
        lambda: fast.matching.class_loss(LOGITS, [IDS, IDS], [IDS, IDS + 3]),
        lambda: fast.matching.mask_losses(LOGITS[0], LOGITS[0, 1:], 1),
        *(lambda x=x: fast.matching.important_points(LOGITS, x) for x in (0, -1, 2.5, 10**10)),
        *(lambda x=x: fast.matching.SetLoss(x) for x in (0, None, 10**10)),
        lambda: reference.matching.class_loss(LOGITS[0].numpy(), np.array([5]), np.array([0])),
        lambda: reference.matching.class_loss(LOGITS[0].numpy(), np.array([0]), np.array([4])),
        lambda: reference.matching.mask_losses(np.zeros((2, 3)), np.zeros((2, 4)), 1),
    ],
    "heads": [
        *(lambda x=x: mask2former.sine_embedding(TOKENS, 8, x) for x in (3, LOGITS)),
        *(lambda x=x: reference.mask2former.sine_embedding(CELLS, 8, x) for x in (3, CELLS)),
        *(lambda x=x: fast.deformable.lookup_tables(x, (8, 8)) for x in (None, [], [TOKENS, TOKENS[:0]], [3])),
        lambda: fast.deformable.nearest_exact(TOKENS, TOKENS),
        lambda: reference.deformable.nearest_exact(CELLS[:, :1], CELLS),
        lambda: reference.deformable.nearest_by_table(CELLS, CELLS[:9], (8, 8)),
        *(lambda x=x: fast.hcformer.climb(LOGITS, x) for x in (None, [3], "ab")),
        *(lambda x=x: reference.hcformer.climb(LOGITS[0].numpy(), x) for x in (None, [3], "ab")),
        lambda: fast.hcformer.climb(None, []),
        *(lambda x=x: fast.TokenSet(TOKENS, HALF, (8, 8)).to_grid(*x) for x in ((0, 8), (8.0, 8), (10**6, 10**6))),
    ],
    "names": [
        *(lambda x=x: fast.create_model(x) for x in NAMES),
        *(lambda x=x: fast.model_config(x) for x in NAMES),
        *(lambda x=x: fast.create_segmenter("aff_nano", head=x) for x in NAMES[1:]),
        *(lambda x=x: fast.create_model("aff_nano", pretrained=x) for x in (3, ["digits"], np.zeros(2))),
        *(lambda x=x: fast.create_segmenter(x) for x in (3, np.zeros(2), torch.nn.Identity())),
        *(lambda x=x: fast.create_segmenter("aff_nano", backbone_overrides=x) for x in (3, "alpha", {3: 3})),
        *(lambda x=x: fast.list_models(x) for x in (None, 3, [3])),
        *(lambda x=x: fast.create_model("aff_nano", in_chans=x) for x in (np.zeros(2), True, "3")),
        *(lambda x=x: fast.create_model("aff_nano", global_pool=x) for x in (np.zeros(2), None, "max")),
    ],
    "files": [
        *(lambda x=x: checkpoints.load(x) for x in (None, 3, b"a")),
        *(lambda x=x: checkpoints.config_from(x) for x in (None, 3, {3: HALF})),
        lambda: checkpoints.head_config_from([HALF]),
        lambda: checkpoints.expected_model("x"),
    ],
}


@pytest.mark.parametrize("kind", CALLS)
def test_odd_arguments(kind):
    for number, call in enumerate(CALLS[kind]):
        with pytest.raises((ValueError, TypeError)) as caught:
            call()
        text, last = str(caught.value), caught.traceback[-1]
        assert "\n" not in text and len(text) < 400, (number, text)
        assert last.path.parent.name in ("reference", "fast"), (number, text)
        assert str(last.statement).strip().startswith("raise"), (number, text)


def test_odd_calls_of_models():
    small = {"depths": (1,) * 4, "dims": (8,) * 4, "heads": (1,) * 4, "num_classes": 3}
    model = fast.create_model("aff_nano", **small)
    for classes in (-1, True, 2.0, None, 10**9):
        with pytest.raises((ValueError, TypeError), match="^num_classes must be"):
            model.reset_classifier(classes)
    for features in (None, torch.zeros(2, 3), torch.zeros(2, 3, 9)):
        with pytest.raises((ValueError, TypeError), match="^features must"):
            model.forward_head(features)
    for indices in (0, 5, True, 1.5, [], [4], ["a"], [None], "1", 10**9):
        with pytest.raises(ValueError, match="^there are 4 stages"):
            model.prune_intermediate_layers(indices)
    for name in ("a" * 10**5, "a\0b", "a\nb"):
        with pytest.raises(FileNotFoundError, match="^no checkpoint at .*$") as caught:
            checkpoints.load(name)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    segmenter, images = fast.create_segmenter("aff_nano", num_classes=2), torch.zeros(1, 3, 64, 64)
    mask, label = torch.zeros(1, 64, 64), torch.tensor([1])
    for masks, labels in ((3, [label]), ([mask], 3), ([mask], [1]), ([None], [label]), ([mask], [label + 1])):
        with pytest.raises((ValueError, TypeError), match="^(mask_labels|class_labels)"):
            segmenter(images, mask_labels=masks, class_labels=labels)
