"""Whole segmenters: twins end to end, any size, any batch, any precision, gradients, and bad arguments."""

import copy

import numpy as np
import pytest
import torch

import fast
from fast.matching import Objects, SetLoss
from fast.patch_embedding import MEAN, STD
from parity_tests.heads import SMALL_HEAD, pictures, predictions, reference_segment, segmenter

HEADS = ("mask2former", "hcformer")
NEVER_MATTERS = "in_proj_bias"  # a softmax does not see what is added to all its keys: a third of it has no gradient


def batch_of(height, width, batch=2, dtype=torch.float32, seed=8):
    return torch.from_numpy(pictures(height, width, batch, seed)).to(dtype)


def flat(output):
    return [value for pair in predictions(output) for value in pair]


SETTINGS = {
    "usual": (64, 64, {}, {}),
    "padded": (33, 47, {}, {"rate": 0.4, "alpha": 8.0}),
    "smallest": (32, 32, {"num_queries": 30}, {}),
    "free": (60, 36, {"num_classes": 1}, {"reserve": False, "rate": 0.3, "stride_metric": "l1"}),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("head", HEADS)
def test_reference_reproduces_every_layer_from_the_image(head, name):
    """In "smallest", the last stage has one token, and there are more queries than tokens on every level."""
    height, width, options, backbone = SETTINGS[name]
    model, weights = segmenter(head, backbone_overrides=backbone, **options)
    images = batch_of(height, width, dtype=torch.float64)
    with torch.no_grad():
        got = predictions(model.double()(images, output_auxiliary_logits=True))
    for i, image in enumerate(images.numpy()):
        expected = reference_segment(model, weights, image)
        assert len(got) == len(expected)
        for ours, theirs in zip(got, expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(a[i], b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("height, width", [(32, 32), (33, 47), (65, 130), (150, 34), (96, 64)])
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_any_size_and_any_batch_after_any_other(head, height, width):
    model, _ = segmenter(head)
    h, w, layers = -(-height // 4), -(-width // 4), SMALL_HEAD["decoder_layers"]
    for batch in (1, 3, 2):
        output = model(batch_of(height, width, batch), output_auxiliary_logits=True)
        assert output.class_queries_logits.shape == (batch, 6, 6)
        assert output.masks_queries_logits.shape == (batch, 6, h, w)
        assert len(output.auxiliary_logits) == layers
        assert all(value.isfinite().all() and len(value) == batch for value in flat(output))


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_bytes_are_normalised_as_floats_are(head):
    model, _ = segmenter(head)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 40, 52), dtype=np.uint8))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    for a, b in zip(flat(model(image)), flat(model((image / 255 - mean) / std)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_an_image_does_not_see_its_batch_mates(head):
    model, _ = segmenter(head, backbone_overrides={"reserve": False}, sine_max="image")
    images = batch_of(64, 88, 3, torch.float64)
    whole = flat(model.double()(images))
    for i in range(3):
        for a, b in zip(flat(model(images[i : i + 1])), whole, strict=True):
            torch.testing.assert_close(a[0], b[i], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_with_the_sine_maximum_of_the_batch_it_does(head):
    """The option that the released weights were trained with; without reserved tokens, extents differ by image."""
    model, _ = segmenter(head, backbone_overrides={"reserve": False, "rate": 0.2}, sine_max="batch")
    images = batch_of(64, 88, 3, torch.float64)
    tops = torch.stack([t.positions.amax(dim=1) for t in model.double().backbone(images)[1:]])
    assert (tops != tops.amax(dim=1, keepdim=True)).any()
    whole, alone = model(images), [model(images[i : i + 1]) for i in range(3)]
    different = [
        (a.masks_queries_logits[0] - whole.masks_queries_logits[i]).abs().max() > 1e-6 for i, a in enumerate(alone)
    ]
    assert any(different)
    twice = model(images[:1].expand(2, -1, -1, -1)).masks_queries_logits[1]
    torch.testing.assert_close(twice, alone[0].masks_queries_logits[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_autocast_is_finite_forward_and_backward(head, dtype):
    model, _ = segmenter(head)
    with torch.autocast("cpu", dtype):
        output = model.train()(batch_of(48, 64))
    losses = SetLoss(60)(output, objects_for(48, 64))
    losses["loss"].backward()
    assert all(value.isfinite().all() for value in flat(output)) and losses["loss"].isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_first_prediction_under_autocast_is_close():
    """The later ones follow masks whose signs may flip; the pixel decoder runs in float32 (places need the digits)."""
    model, _ = segmenter("mask2former")
    images = batch_of(64, 64)
    sets = model.backbone(images)
    expected = model.pixel_decoder(sets)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.pixel_decoder(sets)
    assert torch.equal(got[0], expected[0]) and got[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        low = model.decoder.predict(model.decoder.query_features.weight[None], expected[0])
    for a, b in zip(low, model.decoder.predict(model.decoder.query_features.weight[None], expected[0]), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.03 * b.abs().max().item())


def objects_for(height, width):
    """Two images' Objects, as boxes: three in the first, one in the second."""
    masks = torch.zeros(4, height, width, dtype=torch.bool)
    for i, mask in enumerate(masks):
        mask[4 + 6 * i : 20 + 6 * i, 3 * i : 24 + 3 * i] = True
    return [Objects(torch.tensor([0, 3, 1]), masks[:3]), Objects(torch.tensor([4]), masks[3:])]


def gradients(model, images, objects):
    model.zero_grad()
    SetLoss(80)(model(images), objects, generator=torch.Generator().manual_seed(1))["loss"].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_learns_and_runs_repeat_to_the_bit(head):
    model, _ = segmenter(head, backbone_overrides={"layer_scale": 1.0})
    images, objects = batch_of(48, 64), objects_for(48, 64)
    first = gradients(model, images, objects)
    for name, gradient in first.items():
        assert gradient.isfinite().all() and gradient.any(), name
        if not name.endswith(NEVER_MATTERS) and gradient.ndim < 2:
            assert (gradient != 0).float().mean() > 0.2, name  # some ReLUs are at rest
    again = gradients(copy.deepcopy(model), images, objects)
    assert all(torch.equal(first[name], again[name]) for name in first)
    model.backbone.set_grad_checkpointing(True)
    recomputed = gradients(model, images, objects)
    for name, gradient in first.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_fresh_weights_train(head):
    """A new segmenter is finite, and a few steps on two pictures lower its loss."""
    torch.manual_seed(0)
    model = fast.create_segmenter("aff_nano", head, **SMALL_HEAD)
    images, objects = batch_of(48, 64), objects_for(48, 64)
    optimiser, losses = torch.optim.AdamW(model.parameters(), 2e-3), []
    for _ in range(8):
        loss = SetLoss(80)(model(images), objects, generator=torch.Generator().manual_seed(1))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@torch.no_grad()
def test_transformers_reads_the_output_unchanged():
    processor = pytest.importorskip("transformers").Mask2FormerImageProcessor()
    model, _ = segmenter("mask2former")
    output, sizes = model(batch_of(64, 48)), [(64, 48), (30, 21)]
    maps = processor.post_process_semantic_segmentation(output, target_sizes=sizes)
    things = processor.post_process_instance_segmentation(output, threshold=0.0, target_sizes=sizes)
    both = processor.post_process_panoptic_segmentation(
        output, threshold=0.1, target_sizes=sizes, label_ids_to_fuse={1}
    )
    for i, size in enumerate(sizes):
        assert all(
            tuple(found.shape) == size for found in (maps[i], things[i]["segmentation"], both[i]["segmentation"])
        )
        assert maps[i].max() < SMALL_HEAD["num_classes"] and len(things[i]["segments_info"]) <= 6


ERRORS = {
    "head": ("aff_nano", "mask2fromer", {}, "unknown head 'mask2fromer'; did you mean 'mask2former'"),
    "override": ("aff_nano", "hcformer", {"num_query": 3}, "unknown override 'num_query'; did you mean 'num_queries'"),
    "backbone": ("aff_nanno", "hcformer", {}, "unknown model 'aff_nanno'; did you mean 'aff_nano'"),
    "backbone_override": (
        "aff_nano",
        "hcformer",
        {"backbone_overrides": {"ratte": 1}},
        "unknown override 'ratte'; did you mean 'rate'",
    ),
    "sine_max": ("aff_nano", "mask2former", {"sine_max": "imgae"}, "sine_max must be one of image, batch, not 'imgae'"),
    "lookup": ("aff_nano", "mask2former", {"lookup": "near"}, "lookup must be one of rounded, exact, not 'near'"),
    "heads": (
        "aff_nano",
        "hcformer",
        {"hidden_dim": 20, "heads": 8},
        "hidden_dim 20 must be a multiple of 4 and of heads 8",
    ),
    "hidden": ("aff_nano", "hcformer", {"hidden_dim": 18, "heads": 3}, "hidden_dim 18 must be a multiple of 4"),
    "queries": (
        "aff_nano",
        "hcformer",
        {"num_queries": 0},
        "num_queries must be a whole number from 1 to 65,536, not 0",
    ),
    "classes": (
        "aff_nano",
        "mask2former",
        {"num_classes": 2.5},
        "num_classes must be a whole number from 1 to 1,048,576, not 2.5",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_arguments_are_named(name):
    backbone, head, options, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        fast.create_segmenter(backbone, head, **options)


@pytest.mark.parametrize("head", HEADS)
def test_backbone_is_a_feature_extractor(head):
    with pytest.raises(ValueError, match=r"must be a feature extractor: create_model\(\.\.\., features_only=True\)"):
        fast.create_segmenter(fast.create_model("aff_nano"), head)
    backbone = fast.create_model("aff_nano", features_only=True)
    assert fast.create_segmenter(backbone, head, **SMALL_HEAD).backbone is backbone


def test_neighbourhoods_are_the_same_in_all_stages_unless_told_otherwise():
    with torch.device("meta"):
        sizes = {
            name: fast.create_segmenter(name).backbone.config.neighborhood for name in ("aff_tiny", "aff_base_384")
        }
        other = fast.create_segmenter("aff_nano", backbone_overrides={"neighborhood": (24, 24, 24, 16)})
    assert sizes == {"aff_tiny": (48,) * 4, "aff_base_384": (144,) * 4}
    assert other.backbone.config.neighborhood == (24, 24, 24, 16)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", [(1, 3, 1, 5000), (1, 3, 31, 64), (1, 1, 64, 64), (3, 64, 64)], ids=str)
def test_images_that_cannot_be_segmented_are_named(head, shape):
    model, _ = segmenter(head)
    with pytest.raises(ValueError, match=r"image"):
        model(torch.zeros(shape))
    with pytest.raises(ValueError, match="NaN|finite"):
        model(torch.full((1, 3, 32, 32), torch.nan))
