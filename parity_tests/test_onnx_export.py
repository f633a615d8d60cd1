"""ONNX files in onnxruntime: the model's tokens, and its numbers within float32's rounding."""

import json
import sys

import numpy as np
import pytest
import torch
from skimage import data

from fast.onnx_export import Named, export_onnx
from parity_tests.test_export import MODELS
from parity_tests.test_models import nano

onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
SIZE = (64, 96)  # two stages with more tokens than a neighbourhood
TOLERANCE = 1e-5  # of the largest value


def photographs():
    """Two crops of real photographs and an image of one colour, all of whose tokens tie, normalised."""
    crops = [data.astronaut()[40:104, 200:296], data.chelsea()[100:164, 150:246], np.full((*SIZE, 3), 100)]
    return torch.from_numpy(np.stack(crops).transpose(0, 3, 1, 2).astype(np.float32) / 64 - 2)


def session(content):
    """An onnxruntime session of one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", ["mask2former", "hcformer"])  # half a minute each; a classifier is a part of them
@torch.no_grad()
def test_onnxruntime_computes_what_the_model_does(name):
    model = MODELS[name]()
    content = export_onnx(model, SIZE, ["a", "b"], positions=True)
    proto = onnx.load_from_string(content)
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} == {""} and not proto.functions
    assert b"site-packages" not in content and b".py" not in content
    metadata = {each.key: each.value for each in proto.metadata_props}
    assert json.loads(metadata["classes"]) == ["a", "b"] and json.loads(metadata["input_size"]) == list(SIZE)
    run, x = session(content), photographs()
    for batch in (x, x[:1]):
        expected = Named(model, positions=True).named(batch)
        assert [each.name for each in run.get_outputs()] == list(expected)
        assert sum("positions" in each for each in expected) == 4
        for (key, wanted), found in zip(expected.items(), run.run(None, {"images": batch.numpy()}), strict=True):
            tolerance = 0 if "positions" in key else TOLERANCE * wanted.abs().max().item()
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=tolerance)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="Got: 32 Expected: 64"):
        run.run(None, {"images": np.zeros((1, 3, 32, 96), np.float32)})


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        ((16, 64), ValueError, "size must be at least 32 x 32 pixels, not 16 x 64"),
        ((64,), TypeError, "two whole numbers, height and width"),
        ((36, 36), ValueError, "use rate >= "),
    ],
)
def test_a_size_that_does_not_fit_is_refused(size, error, message):
    with pytest.raises(error, match=message):
        export_onnx(nano(rate=0.2), size)


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="must be an AutoFocusFormer or a segmenter, not 'Linear'"):
        export_onnx(torch.nn.Linear(1, 1), SIZE)
    with pytest.raises(ValueError, match=r"not torch.float16 on cpu: model.float\(\).cpu\(\)"):
        export_onnx(MODELS["classifier"]().half(), SIZE)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r'needs the package onnxscript: pip install "autofocusformer\[onnx\]"'):
        export_onnx(MODELS["classifier"](), SIZE)
