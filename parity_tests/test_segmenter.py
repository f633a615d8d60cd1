"""Batches of images of several sizes, and of none, through both heads."""

import pytest
import torch

import fast
from parity_tests.weights import fill

HEADS = ("mask2former", "hcformer")
SIZES = [(64, 96), (50, 70), (64, 96), (96, 37)]
SMALL = {"num_classes": 3, "num_queries": 5, "hidden_dim": 32, "heads": 4}
SMALL |= {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn": 32, "decoder_ffn": 32}


def segmenter(head, **more):
    model = fast.create_segmenter("aff_nano", head, **SMALL, **more).double().eval()
    fill(model, seed=5, dtype=torch.float64)
    return model


def pictures():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, *size, generator=generator, dtype=torch.float64) for size in SIZES]


@pytest.mark.parametrize("head", HEADS)
def test_padding_changes_nothing_of_the_unpadded_part(head):
    model, images = segmenter(head), pictures()
    with torch.no_grad():
        together = model(*fast.pad_images(images), output_auxiliary_logits=True)
        alone = [model(image[None], output_auxiliary_logits=True) for image in images]
    for i, one in enumerate(alone):
        h, w = one.masks_queries_logits.shape[2:]
        layers = zip([*together.auxiliary_logits, vars(together)], [*one.auxiliary_logits, vars(one)], strict=True)
        for got, want in layers:
            masks = got["masks_queries_logits"][i]
            torch.testing.assert_close(masks[:, :h, :w], want["masks_queries_logits"][0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(got["class_queries_logits"][i], want["class_queries_logits"][0])
            assert (masks[:, h:] == -20).all() and (masks[:, :, w:] == -20).all()


def test_what_lies_in_the_padding_does_not_matter():
    model, (images, mask) = segmenter("mask2former"), fast.pad_images(pictures())
    with torch.no_grad():
        clean, dirty = model(images, mask), model(images.masked_fill(~mask[:, None], 7.0), mask.int())
    assert torch.equal(clean.masks_queries_logits, dirty.masks_queries_logits)


@pytest.mark.parametrize("head", HEADS)
def test_without_auxiliary_logits_the_result_is_the_same(head):
    model, image = segmenter(head), pictures()[0][None]
    with torch.no_grad():
        whole, alone = model(image, output_auxiliary_logits=True), model(image)
    assert len(whole.auxiliary_logits) == 2 and alone.auxiliary_logits == []
    for name in ("class_queries_logits", "masks_queries_logits"):
        torch.testing.assert_close(getattr(alone, name), getattr(whole, name), rtol=1e-9, atol=1e-9)
    assert len(model(image).auxiliary_logits) == 2  # where gradients are recorded


@pytest.mark.parametrize("head", HEADS)
def test_a_batch_of_no_images(head):
    out = segmenter(head)(torch.zeros(0, 3, 50, 64, dtype=torch.float64))
    assert out.class_queries_logits.shape == (0, 5, 4) and out.masks_queries_logits.shape == (0, 5, 13, 16)
    assert len(out.auxiliary_logits) == 2


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(2, 64, 64), r"shape \(B, H, W\) = \(1, 64, 64\), not \(2, 64, 64\)"),
        (torch.ones(1, 64, 64).index_fill(1, torch.tensor([3]), 0), "no rectangle at the top left"),
        (torch.ones(1, 64, 64).index_fill(2, torch.tensor([0]), 0), "no rectangle at the top left"),
    ],
    ids=["shape", "gap", "left"],
)
def test_odd_pixel_masks_are_refused(mask, said):
    with pytest.raises(ValueError, match=said):
        segmenter("mask2former")(torch.zeros(1, 3, 64, 64, dtype=torch.float64), mask)


def test_the_maximum_of_a_batch_of_several_sizes_is_refused():
    with pytest.raises(ValueError, match='use sine_max="image"'):
        segmenter("mask2former", sine_max="batch")(*fast.pad_images(pictures()))
