"""Image preparation and patch embedding: numbers, padding, gradients in evaluation, and refused images."""

import numpy as np
import pytest
import torch

import fast.patch_embedding
from parity_tests import plain
from parity_tests.cases import DTYPES, LOW
from parity_tests.compare import GRADIENT, assert_equal, assert_layers, assert_parity
from parity_tests.gradients import assert_directional, backward, flat
from parity_tests.weights import fill, tensors
from reference.patch_embedding import grid_positions, patch_embedding, prepare_image

SHAPES = [(1, 32, 32, 8), (3, 36, 52, 12), (1, 64, 32, 6)]  # B, H, W, C
rng = np.random.default_rng(6)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def module_for(dim, dtype):
    module = fast.patch_embedding.PatchEmbedding(dim).eval()
    weights = fill(module, seed=5, dtype=dtype)
    return module.to(dtype), {name: w for name, w in weights.items() if not name.endswith("tracked")}


@pytest.mark.parametrize("height, width", [(32, 32), (33, 47), (65, 130), (34, 35)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.float32], ids=str)
def test_prepared_images_agree(height, width, dtype, device):
    values = (
        rng.integers(0, 256, (2, 3, height, width))
        if dtype == torch.uint8
        else rng.standard_normal((2, 3, height, width))
    )
    image = torch.from_numpy(values).to(dtype)
    got = fast.patch_embedding.prepare_image(image.to(device))
    oracle = np.stack([prepare_image(i) for i in image.numpy()])
    assert_parity(got, oracle, oracle, torch.float32 if dtype == torch.uint8 else dtype, name="prepare_image")
    assert got.shape[2] == -(-height // 4) * 4 and got.shape[3] == -(-width // 4) * 4
    assert not got[:, :, height:].any() and not got[:, :, :, width:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_patch_embedding_agrees(shape, dtype, device):
    batch, height, width, dim = shape
    module, weights = module_for(dim, dtype)
    image = torch.from_numpy(normal(batch, 3, height, width)).to(dtype)
    got = module.to(device)(image.to(device))
    oracle = np.stack([patch_embedding(i, weights) for i in image.double().numpy()])
    baseline = torch.stack([plain.patch_embedding(i, tensors(weights, dtype)) for i in image])
    assert_parity(got, oracle, baseline, dtype, name="patch_embedding")


def test_gradients_agree_with_central_differences_of_the_reference():
    module, weights = module_for(6, torch.float64)
    image, grad_out = torch.from_numpy(normal(2, 3, 12, 8)), torch.from_numpy(normal(2, 6, 6, seed=1))
    gradients = backward(module, {"image": image}, lambda i: module(i["image"]), grad_out)
    assert_directional(
        gradients,
        lambda inputs: np.stack([patch_embedding(i, inputs) for i in inputs["image"]]),
        {"image": image.numpy(), **weights},
        grad_out.numpy(),
        name="patch_embedding gradient",
    )


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_every_element_of_the_gradients_agrees(dtype, device):
    module, weights = module_for(12, dtype)
    image, grad_out = (
        torch.from_numpy(normal(2, 3, 12, 8)).to(dtype),
        torch.from_numpy(normal(2, 6, 12, seed=1)).to(dtype),
    )
    run = module.to(device)
    got = backward(run, {"image": image.to(device)}, lambda i: run(i["image"]), grad_out.to(device))

    def formula(inputs):
        return torch.stack([plain.patch_embedding(i, inputs) for i in inputs["image"]])

    start = {"image": image, **tensors(weights, dtype)}
    fixed = {name: value for name, value in start.items() if "running" in name}
    references = [
        flat(start, lambda i, d=d: formula({**i, **cast(fixed, d)}), grad_out, d) for d in (torch.float64, dtype)
    ]
    assert_layers(got, *references, dtype, GRADIENT, name="patch_embedding gradient")


def cast(values, dtype):
    return {name: value.to(dtype) for name, value in values.items()}


@pytest.mark.parametrize("grid_size", [(1, 1), (5, 3), (8, 33)], ids=str)
def test_grid_positions_agree(grid_size, device):
    expected = grid_positions(grid_size)
    assert_equal(fast.patch_embedding.grid_positions(grid_size, device), expected, name="grid_positions")
    assert expected.tolist() == [[x, y] for y in range(grid_size[0]) for x in range(grid_size[1])]


def test_uint8_is_normalised_like_imagenet():
    image = np.zeros((3, 32, 32), dtype=np.uint8)
    image[:, 0, 0] = 255
    prepared = prepare_image(image)
    np.testing.assert_allclose(prepared[:, 0, 0], [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    np.testing.assert_allclose(prepared[:, 1, 1], [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])


NAN = np.zeros((3, 32, 32))
NAN[1, 4, 5] = np.nan
BAD = {
    "too_small": (np.zeros((3, 31, 40)), ValueError, "at least 32 x 32 pixels, but is 31 x 40"),
    "one_channel": (np.zeros((1, 32, 32)), ValueError, "image must have 3 channels"),
    "channels_last": (np.zeros((32, 32, 3)), ValueError, "image must have 3 channels"),
    "int64": (np.zeros((3, 32, 32), dtype=np.int64), TypeError, "uint8 or floating point, not .*int64"),
    "bool": (np.zeros((3, 32, 32), dtype=bool), TypeError, "uint8 or floating point, not .*bool"),
    "nan": (NAN, ValueError, "NaN or infinite"),
    "infinite": (np.full((3, 32, 32), np.inf), ValueError, "NaN or infinite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_get_the_same_error_from_both(name):
    image, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        prepare_image(image)
    with pytest.raises(kind, match=message):
        fast.patch_embedding.prepare_image(torch.from_numpy(image)[None])


@pytest.mark.parametrize("dims", [2, 3, 5])
def test_wrong_number_of_axes_is_refused(dims):
    with pytest.raises(ValueError, match="image must have 3 channels"):
        fast.patch_embedding.prepare_image(torch.zeros([3] * (dims - 2) + [32, 32]))


def test_the_bad_image_of_a_batch_is_named():
    images = torch.zeros(4, 3, 32, 32)
    images[2, 0, 9, 9] = torch.nan
    with pytest.raises(ValueError, match=r"number \[2\] of the batch"):
        fast.patch_embedding.prepare_image(images)


@pytest.mark.parametrize("side", [34, 35, 36])
def test_padding_is_zeros_after_normalisation(side):
    """An image of odd sides gives what its own padded copy gives."""
    module, _ = module_for(8, torch.float64)
    image = torch.from_numpy(normal(1, 3, side, 37))
    padded = torch.zeros(1, 3, 36, 40, dtype=torch.float64)
    padded[:, :, :side, :37] = image
    prepare = fast.patch_embedding.prepare_image
    assert torch.equal(module(prepare(image)), module(prepare(padded)))
