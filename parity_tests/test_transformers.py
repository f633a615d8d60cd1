"""Segmenters as a user of transformers calls them: its names, its processor before and after, its form of outputs."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils import _pytree as pytree

import fast
from fast.matching import SetLoss
from parity_tests.heads import segmenter
from parity_tests.test_segmenters import batch_of, objects_for

HEADS = ("mask2former", "hcformer")
NAMES = ["class_queries_logits", "masks_queries_logits"]


@pytest.fixture
def module():
    """The package transformers, a test-only dependency."""
    return pytest.importorskip("transformers")


def labels_for(height, width):
    """Two images' mask_labels and class_labels."""
    objects = objects_for(height, width)
    return {"mask_labels": [o.masks for o in objects], "class_labels": [o.labels for o in objects]}


@torch.no_grad()
def test_five_lines_from_pictures_to_objects(module):
    """The example of the README, on the nuclei's sample pictures: the same masks as without the processor."""
    folder = fast.pretrained.FOLDER / "nuclei_samples"
    pictures = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))[:2]]

    processor = module.Mask2FormerImageProcessor(size={"height": 256, "width": 256})
    segmenter = fast.create_segmenter(pretrained="nuclei").eval()
    inputs = processor(pictures, return_tensors="pt")
    sizes = [picture.size[::-1] for picture in pictures]
    found = processor.post_process_instance_segmentation(segmenter(**inputs), threshold=0.5, target_sizes=sizes)

    for result, size in zip(found, sizes, strict=True):
        assert tuple(result["segmentation"].shape) == size and len(result["segments_info"]) > 3
    small = [torch.from_numpy(np.array(p)).permute(2, 0, 1)[None].float() for p in pictures]
    small = torch.cat([torch.nn.functional.interpolate(x, (256, 256), mode="bilinear", antialias=True) for x in small])
    ours = segmenter(small.round().to(torch.uint8))
    scores, wanted = (x.class_queries_logits.softmax(-1)[..., 0] for x in (segmenter(**inputs), ours))
    torch.testing.assert_close(scores.sum(), wanted.sum(), rtol=0.05, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_names_of_arguments_are_those_of_transformers(head):
    model, images = segmenter(head)[0], batch_of(48, 64)
    mask = torch.ones(2, 48, 64, dtype=torch.int64)
    expected = model(images)
    assert torch.equal(model(pixel_values=images, pixel_mask=mask)[1], expected.masks_queries_logits)
    for wrong in ({}, {"images": images, "pixel_values": images}):
        with pytest.raises(TypeError, match="images must be given once: as images or as pixel_values"):
            model(**wrong)


@torch.no_grad()
def test_output_is_a_mapping_as_in_transformers(module):
    """Every way to read an output, against transformers' own class holding the same."""
    model, images = segmenter("mask2former")[0], batch_of(48, 64)
    kind = module.models.mask2former.modeling_mask2former.Mask2FormerForUniversalSegmentationOutput
    for options in ({}, {"output_auxiliary_logits": True}, labels_for(48, 64)):
        output = model(images, **options)
        theirs = kind(**output)
        assert list(output) == list(output.keys()) == list(theirs.keys()) and len(output) == len(theirs)
        assert all(output[name] is theirs[name] for name in output) and output[:2] == theirs[:2]
        assert all(a is b for a, b in zip(output.to_tuple(), theirs.to_tuple(), strict=True))
        assert output[0] is theirs[0] and output[-1] is theirs[-1] and ("loss" in output) == ("loss" in theirs)
    assert list(output) == ["loss", *NAMES] and list(model(images)) == NAMES
    with pytest.raises(KeyError):
        model(images)["loss"]
    classes, masks = model(images).to_tuple()
    assert classes.shape == (2, 6, 6) and masks.shape == (2, 6, 12, 16)


@torch.no_grad()
def test_output_is_a_pytree():
    output = segmenter("hcformer")[0](batch_of(48, 64), output_auxiliary_logits=True, **labels_for(48, 64))
    leaves, spec = pytree.tree_flatten(output)
    again = pytree.tree_unflatten(leaves, spec)
    assert len(leaves) == 2 + 2 * len(output.auxiliary_logits) + 1 and type(again) is fast.SegmenterOutput
    assert list(again) == list(output) and again.loss is output.loss
    halves = pytree.tree_map(torch.Tensor.half, output)
    assert halves.auxiliary_logits[0][NAMES[1]].dtype == torch.float16
    copied = pickle.loads(pickle.dumps(output))
    assert torch.equal(copied.loss, output.loss)


@pytest.mark.parametrize("head", HEADS)
def test_labels_give_the_loss(head):
    model, images, labels = segmenter(head)[0].train(), batch_of(48, 64), labels_for(48, 64)
    torch.manual_seed(0)
    output = model(pixel_values=images, **labels)
    output.loss.backward()
    assert len(output.auxiliary_logits) > 0 and all(p.grad is not None for p in model.parameters())
    torch.manual_seed(0)
    expected = SetLoss()(model(images), objects_for(48, 64))["loss"]
    assert torch.equal(output.loss, expected)
    with torch.no_grad():
        torch.manual_seed(0)
        alone = model.eval()(images, **labels)
        torch.manual_seed(0)
        wanted = SetLoss()(model(images, output_auxiliary_logits=True), objects_for(48, 64))["loss"]
        assert alone.auxiliary_logits == [] and torch.equal(alone.loss, wanted)


BAD_LABELS = {
    "one": ({"mask_labels": [torch.ones(1, 8, 8)] * 2}, "go together"),
    "images": ({"mask_labels": [torch.ones(1, 8, 8)], "class_labels": [torch.zeros(1)]}, "not 1 and 1 for 2"),
    "shapes": (
        {"mask_labels": [torch.ones(1, 8, 8)] * 2, "class_labels": [torch.zeros(2, dtype=torch.int64)] * 2},
        r"shapes \(g, H, W\) and \(g,\), not \(1, 8, 8\) and \(2,\)",
    ),
    "range": (
        {"mask_labels": [torch.ones(1, 8, 8)] * 2, "class_labels": [torch.tensor([5])] * 2},
        "class_labels 0 must be whole numbers from 0 to 4",
    ),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_labels_that_do_not_fit_are_refused(name):
    labels, message = BAD_LABELS[name]
    with pytest.raises(ValueError, match=message):
        segmenter("mask2former")[0](batch_of(48, 64), **labels)


def test_labels_of_the_processor_train(module):
    """Its form of annotations, of two sizes, padded by it: mask, labels and images go in as they come."""
    processor = module.Mask2FormerImageProcessor(do_resize=False, ignore_index=255, do_reduce_labels=False)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((64, 48), (40, 64))]
    maps = [np.where(np.arange(p.shape[1]) < 20, 1, 255)[None].repeat(len(p), 0).astype(np.uint8) for p in pictures]
    inputs = processor(pictures, segmentation_maps=maps, return_tensors="pt")
    model, _ = segmenter("mask2former")
    output = model.train()(**inputs)
    output[0].backward()
    assert output["loss"].isfinite() and output.loss is output[0]
