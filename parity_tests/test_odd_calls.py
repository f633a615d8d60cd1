"""Odd values are refused by both twins in one line of ours, before anything is allocated."""

import numpy as np
import pytest
import torch

import fast
import fast.backbone
import fast.clustering
import fast.neighborhoods
import reference.backbone
import reference.clustering
import reference.neighborhoods

NAN, INF = float("nan"), float("inf")
ODD = [
    *(("alpha", value, "finite number") for value in (NAN, INF, -INF, "x", None, True)),
    *(("rate", value, "in .0, 1") for value in (NAN, 0, 1.5, "a", True)),
    *(("mlp_ratio", value, "positive") for value in (-1, 0, 0.001, NAN, "x")),
    *(("layer_scale", value, "finite number or None") for value in ("x", INF)),
    *(("drop_path", value, r"in \[0, 1") for value in (1.5, NAN, "x")),
    *(("reserve", value, "True or False") for value in (-1, "x", None)),
    *(("num_classes", value, "whole number") for value in (-1, 1.5, "3", True)),
    *(("cluster_size", value, "cluster_size must be") for value in (8.0, "8", True, 0, -1, 10**9)),
    *(
        (name, value, "4 positive whole")
        for name in ("depths", "heads")
        for value in (None, [1], [1, 1, 1, 0], [True] * 4)
    ),
    ("dims", [8, 16, 16, 25.0], "4 positive whole"),
    ("curve", "z", "one of"),
    ("stride_metric", 3, "one of"),
]


@pytest.mark.parametrize("config", [fast.backbone.Config, reference.backbone.Config])
@pytest.mark.parametrize("name, value, message", ODD)
def test_odd_shapes_of_a_backbone(config, name, value, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        config(**{name: value})
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [10**9, 2**16 + 1, 0, 8.0, True, None])
def test_clusters_of_odd_sizes_are_not_made(size):
    positions, grid_size = np.stack(np.meshgrid(range(8), range(8)), -1).reshape(-1, 2), (8, 8)
    tokens = torch.from_numpy(positions)[None]
    calls = (
        lambda: reference.clustering.balanced_clusters(positions, size, grid_size),
        lambda: reference.neighborhoods.stage_geometry(positions, size, 16, grid_size),
        lambda: fast.clustering.balanced_clusters(tokens, size, grid_size),
        lambda: fast.neighborhoods.stage_geometry(tokens, size, 16, grid_size),
    )
    for call in calls:
        with pytest.raises((ValueError, TypeError), match="cluster_size must be"):
            call()


IMAGES = {
    "none": (None, TypeError),
    "array": (np.zeros((1, 3, 64, 64)), TypeError),
    "sparse": (torch.zeros(1, 3, 64, 64).to_sparse(), TypeError),
    "whole numbers": (torch.zeros(1, 3, 64, 64, dtype=torch.int64), TypeError),
    "complex": (torch.zeros(1, 3, 64, 64, dtype=torch.complex64), TypeError),
    "truth values": (torch.zeros(1, 3, 64, 64, dtype=torch.bool), TypeError),
    "three axes": (torch.zeros(3, 64, 64), ValueError),
    "four channels": (torch.zeros(1, 4, 64, 64), ValueError),
    "small": (torch.zeros(1, 3, 31, 64), ValueError),
    "nan": (torch.full((1, 3, 64, 64), NAN), ValueError),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_odd_images(kind):
    image, error = IMAGES[kind]
    for model in (fast.create_model("aff_nano", num_classes=2), fast.create_segmenter("aff_nano", num_classes=2)):
        with pytest.raises(error, match="^image"):
            model.eval()(image)


def test_odd_lists_of_images_and_masks():
    for images in (3, [], [None], [torch.zeros(32, 32)]):
        with pytest.raises(TypeError):
            fast.pad_images(images)
    for odd in (torch.zeros(1, 32, 32), torch.zeros(3, 32, 32, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="^images must have 3 channels and one dtype"):
            fast.pad_images([torch.zeros(3, 32, 32), odd])
    model = fast.create_segmenter("aff_nano", num_classes=2).eval()
    with pytest.raises(TypeError, match="^pixel_mask must be a tensor, not int"):
        model(torch.zeros(1, 3, 64, 64), 3)
