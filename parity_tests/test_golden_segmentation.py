"""Both twins reproduce the official segmentation networks: tokens exactly, every layer's numbers within 1e-4."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import fast
import reference.backbone
import reference.mask2former
from parity_tests.heads import predictions
from parity_tests.weights import golden_weights
from reference.layers import subset

GOLDEN = Path(__file__).parent / "golden"
NETWORKS = sorted(path.stem for path in GOLDEN.glob("seg_*.npz"))
OPTIONS = {"ds_rate": "rate", "nbhd_size": "neighborhood", "reserve_on": "reserve"}  # the official names of ours
HEAD = {
    "num_classes": 7,
    "hidden_dim": 64,
    "num_queries": 20,
    "heads": 8,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn": 128,
    "decoder_ffn": 128,
}
TOLERANCE = 1e-4  # relative to the largest value; the files hold float32 results of float32 networks


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """A golden file, the segmenter that it describes in evaluation, and its weights."""
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        golden = dict(file)
    config = ast.literal_eval(str(golden.pop("config")))
    name = config.pop("name")
    overrides = {OPTIONS.get(k, k): v for k, v in config.items()}
    sine_max = "batch" if "batch" in request.param else "image"
    model = fast.create_segmenter(f"aff_{name}", backbone_overrides=overrides, sine_max=sine_max, **HEAD).eval()
    weights = golden_weights(model)
    model.load_state_dict({key: torch.as_tensor(value) for key, value in weights.items()})
    return golden, model, weights


def check(golden, results):
    """Compare {name in the file: result}; positions exactly, the rest relative to the largest value."""
    assert set(results) == set(golden) - {"image"}
    for name, wanted in golden.items():
        if name.endswith("_pos"):
            assert (np.asarray(results[name]) == wanted).all(), name
        elif name != "image":
            error = np.abs(np.asarray(results[name]) - wanted).max() / np.abs(wanted).max()
            assert error <= TOLERANCE, f"{name}: relative error {error:.2e}"


def named(sets, mask_features, levels, pairs):
    """Results under the names of the file; ``sets`` and ``levels`` are of res2..res5 and of res5..res3."""
    results = {"mask_features": mask_features, "mask_features_pos": sets[0][0]}
    for i, (positions, features) in enumerate(sets, start=2):
        results |= {f"res{i}_pos": positions, f"res{i}": features}
    for i, level in enumerate(levels):
        results |= {f"level{i}": level, f"level{i}_pos": sets[3 - i][0]}
    for i, (classes, masks) in enumerate(pairs):
        name = "pred" if i == len(pairs) - 1 else f"aux{i}"
        results |= {f"{name}_logits": classes, f"{name}_masks": masks}
    return results


def test_files_are_there():
    assert NETWORKS == ["seg_nano_128x160", "seg_nano_batch2_132x150", "seg_nano_fifth_160x128"]


@torch.no_grad()
def test_fast_network(network):
    golden, model, _ = network
    images = torch.from_numpy(golden["image"]).permute(0, 3, 1, 2)
    sets = model.backbone(images)
    mask_features, levels = model.pixel_decoder(sets)
    pairs = predictions(model(images, output_auxiliary_logits=True))
    check(golden, named([(t.positions, t.features) for t in sets], mask_features, levels, pairs))


def test_reference_network(network):
    golden, model, weights = network
    config = reference.backbone.Config(**vars(model.backbone.config))
    head = reference.mask2former.HeadConfig(**vars(model.config))
    part, grid_size = subset(weights, "backbone"), tuple(golden["pred_masks"].shape[2:])
    images = np.moveaxis(golden["image"], 3, 1)
    sets = [
        reference.backbone.token_sets(part, reference.backbone.forward_features(config, part, image))
        for image in images
    ]
    deep = zip(*(image[:0:-1] for image in sets), strict=True)
    largest = [np.max([p.max(axis=0) for p, _ in level], axis=0) for level in deep]  # of the batch: "batch"
    results = []
    for image in sets:
        pairs, mask_features, levels = reference.mask2former.forward(image, grid_size, weights, head, largest)
        results.append(named(image, mask_features, levels, pairs))
    check(golden, {name: np.stack([r[name] for r in results]) for name in results[0]})
