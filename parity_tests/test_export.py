"""Models for use elsewhere: torch.export with a free batch, 16-bit weights, 8-bit linear layers."""

import io
import warnings

import pytest
import torch
from torch.export import Dim, export
from torch.utils import _pytree as pytree

from fast.ops import dispatch
from parity_tests.heads import segmenter
from parity_tests.test_models import images, nano

# One block of each sort, and a decoder layer for each level, are enough; a trace takes as long as it has nodes.
DEPTHS, LAYERS = {"depths": (1, 1, 1, 1)}, {"encoder_layers": 1, "decoder_layers": 3}
MODELS = {
    "classifier": lambda: nano(**DEPTHS),
    "features": lambda: nano(features_only=True, **DEPTHS),
    "mask2former": lambda: segmenter("mask2former", backbone_overrides=DEPTHS, **LAYERS)[0],
    "hcformer": lambda: segmenter("hcformer", backbone_overrides=DEPTHS, **LAYERS)[0],
}
PLAIN = {operator: paths[-1] for operator, paths in dispatch.PATHS.items()}


def leaves(output):
    """Tensors and numbers of an output."""
    return pytree.tree_leaves(output)


@pytest.mark.parametrize("name, paths", [*((name, "best") for name in MODELS), ("classifier", "plain")])
@torch.no_grad()
def test_exported_models_take_any_batch(name, paths, monkeypatch):
    """Also where the first call of all is the export: paths are chosen, and geometry is kept, outside of the trace."""
    model = MODELS[name]()
    monkeypatch.setattr(dispatch, "_chosen", {})
    with dispatch.force(**(PLAIN if paths == "plain" else {})):
        program = export(model, (images(2, 3, 48, 64),), dynamic_shapes=({0: Dim("batch", max=64)},))
        file = io.BytesIO()
        torch.export.save(program, file)
        loaded = torch.export.load(io.BytesIO(file.getvalue())).module()
        for batch in (2, 1, 5):
            x = images(batch, 3, 48, 64, seed=batch)
            expected, found = model(x), loaded(x)
            assert type(found) is type(expected)
            for a, b in zip(leaves(found), leaves(expected), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if paths == "plain":
        called = {str(node.target) for node in program.graph.nodes}
        assert not any(name in target for target in called for name in ("aff.attention", "aff.merge"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_16_bit_weights(name, dtype):
    model, x = MODELS[name](), images(2, 3, 64, 64)
    expected = model(x)
    found = model.to(dtype)(x)
    floats = [a for a in leaves(found) if torch.is_tensor(a) and a.is_floating_point()]
    assert floats and all(a.isfinite().all() for a in floats)
    first = (found, expected) if name == "classifier" else (leaves(found)[1], leaves(expected)[1])
    if name in ("classifier", "features"):  # of a segmenter, masks whose signs flip send queries elsewhere
        torch.testing.assert_close(first[0].float(), first[1].float(), rtol=0.1, atol=0.1 * first[1].abs().max().item())
    assert torch.equal(leaves(model(x.to(dtype)))[0].isfinite(), leaves(found)[0].isfinite())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_8_bit_linear_layers(name):
    model, x = MODELS[name](), images(2, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated: torchao is its successor
        small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    kinds = [type(module).__module__ for module in small.modules()]
    assert sum("quantized.dynamic" in kind for kind in kinds) > 10
    expected, found = model(x), small(x)
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        assert not torch.is_tensor(a) or a.shape == b.shape and a.isfinite().all()
    if name == "classifier":
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())
        assert not torch.equal(found, expected)
