"""Odd values are refused by both twins in one line of ours, before anything is allocated."""

import importlib

import numpy as np
import pytest
import torch

import fast
import fast.backbone
import fast.clustering
import fast.grid_prior
import fast.mask2former
import fast.neighborhoods
import reference.backbone
import reference.clustering
import reference.mask2former
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


MORE = [
    *(("depths", value, "at most 64") for value in ([65, 1, 1, 1], [10**9] * 4)),
    ("dims", [10**9] * 4, "at most 16,384"),
    ("neighborhood", [10**30] * 4, "at most 16,777,216"),
    *(("num_classes", value, "from 0 to 1,048,576") for value in (10**9, 10**30)),
    ("mlp_ratio", 10**6, "at most 64"),
    *(("rate", value, "in .0, 1") for value in (np.zeros((2, 2)), "x" * 10**5, 10**400, 1j, None)),
    *(("curve", value, "one of") for value in (np.zeros((2, 2)), None, ["hilbert"])),
]
SIZES = (
    *("num_classes", "hidden_dim", "num_queries", "heads", "points", "encoder_layers", "decoder_layers"),
    *("encoder_ffn", "decoder_ffn"),
)
HEADS = [
    *((name, value) for name in SIZES for value in (0, -1, True, 2.0, "4", None, 10**9, np.zeros(2))),
    *(("hidden_dim", 6), ("heads", 3), ("lookup", "nearest"), ("lookup", None), ("sine_max", 3)),
]


@pytest.mark.parametrize("config", [fast.backbone.Config, reference.backbone.Config])
@pytest.mark.parametrize("name, value, message", MORE)
def test_sizes_that_would_fill_the_memory_and_odd_objects(config, name, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        config(**{name: value})
    assert name in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("name, value", HEADS)
def test_odd_heads_are_refused_by_both_twins(name, value):
    messages = []
    for config in (fast.mask2former.HeadConfig, reference.mask2former.HeadConfig):
        with pytest.raises(ValueError, match=name) as caught:
            config(**{name: value})
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "\n" not in messages[0]
    with pytest.raises(ValueError, match=name):
        fast.create_segmenter("aff_nano", **{name: value})


CELLS = np.stack(np.meshgrid(range(8), range(8)), -1).reshape(-1, 2)
RNG = np.random.default_rng(0)
LOGITS = {"class_logits": RNG.normal(size=(5, 4)), "mask_logits": RNG.normal(size=(5, 8, 8))}
CALLS = {  # of both twins, with arguments that are right
    "curves.curve_ranks": {"nh": 4, "nw": 5, "curve": "hilbert"},
    "clustering.balanced_clusters": {"positions": CELLS, "cluster_size": 8, "grid_size": (8, 8), "curve": "scanline"},
    "clustering.patch_grid": {"n": 64, "cluster_size": 8, "grid_size": (8, 8)},
    "neighborhoods.nearest_count": {"neighborhood": 48, "cluster_size": 8, "k": 8},
    "neighborhoods.nearest_tokens": {"queries": CELLS, "positions": CELLS, "nearest": 4},
    "neighborhoods.stage_geometry": {"positions": CELLS, "cluster_size": 8, "neighborhood": 16, "grid_size": (8, 8)},
    "position.relative_position": {"offsets": CELLS},
    "grid_prior.local_stride": {"positions": CELLS, "metric": "l2"},
    "grid_prior.grid_prior": {"positions": CELLS, "stride": np.ones(64, dtype=np.int64)},
    "grid_prior.reserved_tokens": {"positions": CELLS, "stage": 1},
    "selection.token_counts": {"grid_size": (8, 8), "rate": 0.5, "reserve": True, "stages": 4},
    "selection.select": {
        **{"scores": RNG.random(64), "prior": RNG.random(64), "reserved": np.zeros(64, dtype=bool)},
        **{"keep": 9, "alpha": 4.0},
    },
    "interpolation.shepard": {
        **{"points": CELLS, "positions": CELLS, "features": RNG.random((64, 8))},
        **{"nearest": RNG.integers(0, 64, (64, 4))},
    },
    "patch_embedding.grid_positions": {"grid_size": (8, 8)},
    "postprocess.semantic": LOGITS,
    "postprocess.instances": LOGITS | {"top": 9},
    "postprocess.panoptic": LOGITS | {"things": {0, 1}, "object_threshold": 0.1, "overlap_threshold": 0.5},
    "postprocess.resize_bilinear": {"maps": LOGITS["mask_logits"], "size": (16, 16)},
    "matching.match": {"costs": RNG.random((5, 3))},
    "matching.matching_costs": {
        **{"class_logits": LOGITS["class_logits"], "mask_logits": RNG.random((5, 9)), "labels": np.array([0, 2])},
        **{"targets": RNG.random((2, 9))},
    },
    "matching.sample_points": {"maps": LOGITS["mask_logits"], "points": RNG.random((7, 2))},
    "soft_clusters.decode_clusters": {
        **{"values": RNG.random((64, 8)), "candidates": RNG.integers(0, 64, (64, 4))},
        **{"assignment": RNG.random((64, 4))},
    },
}
SINGLE = ("postprocess.", "matching.")  # without a batch axis in fast


def odd_values(value):
    """Values that are wrong in the place of a right one."""
    if isinstance(value, np.ndarray):
        yield from (None, 3, "x", value.tolist(), value.astype(complex), np.array(value.flat[0]))
        yield value > 0 if value.dtype != bool else value.astype(float)
        return
    yield from (None, 1j, np.zeros((2, 2)), object(), {"a"} if isinstance(value, set) else [])
    if isinstance(value, tuple):
        yield from ((8,), (8, 8, 8), (0, 8), (-8, 8), (8.0, 8.0), ("8", "8"), (10**10, 10**10), (NAN, 8), (True, 8), 8)
    elif isinstance(value, float):
        yield from (NAN, INF, "x")
    elif not isinstance(value, bool | str | set):
        yield from (True, -1, 0, 1.5, NAN, INF, "x", 10**30)


@pytest.mark.parametrize("name", CALLS)
def test_odd_calls_end_alike_in_both_twins(name):
    stem, function = name.split(".")
    twins = [getattr(importlib.import_module(f"{package}.{stem}"), function) for package in ("reference", "fast")]
    right = CALLS[name]

    def given(value):
        tensor = torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
        return tensor if tensor is value or name.startswith(SINGLE) else tensor[None]

    twins[0](**right)
    twins[1](**{key: given(value) for key, value in right.items()})
    for key, value in right.items():
        for odd in () if (name, key) == ("selection.token_counts", "reserve") else odd_values(value):
            errors = []
            for twin, make in ((twins[0], lambda each: each), (twins[1], given)):
                arguments = {k: make(v) for k, v in right.items()}
                arguments[key] = make(odd) if isinstance(value, np.ndarray) else odd
                with pytest.raises((ValueError, TypeError)) as caught:
                    twin(**arguments)
                text, last = str(caught.value), caught.traceback[-1]
                assert "\n" not in text and len(text) < 250, text
                assert last.path.parent.name in ("reference", "fast"), (key, odd, text)
                assert str(last.statement).strip().startswith("raise"), (key, odd, text)
                errors.append(type(caught.value))
            assert errors[0] is errors[1], (key, odd)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_positions_of_any_whole_dtype_are_read_as_such(dtype):
    """The compiled kernels take int64: others were read and written beyond their end."""
    cells = torch.from_numpy(CELLS)[None]
    odd, nearest = cells.to(dtype), fast.neighborhoods.nearest_tokens
    assert torch.equal(nearest(odd, odd, 9), nearest(cells, cells, 9))
    assert torch.equal(fast.grid_prior.local_stride(odd), fast.grid_prior.local_stride(cells))
    order = fast.clustering.balanced_clusters(odd, 8, (8, 8))[0]
    assert torch.equal(order, fast.clustering.balanced_clusters(cells, 8, (8, 8))[0])
    geometry = fast.neighborhoods.stage_geometry(odd, 8, 16, (8, 8))
    assert torch.equal(geometry.nearest, fast.neighborhoods.stage_geometry(cells, 8, 16, (8, 8)).nearest)


def test_positions_may_be_the_first_of_the_queries():
    """They are the same memory then, but not the same points."""
    queries = torch.from_numpy(CELLS)[None]
    for count in (63, 40, 5):
        expected = reference.neighborhoods.nearest_tokens(CELLS, CELLS[:count], 4)
        found = fast.neighborhoods.nearest_tokens(queries, queries[:, :count], 4)
        assert np.array_equal(found[0], expected)


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
