"""The mirror: same stems, same names, same arguments in both packages; neither leans on what it must not."""

import ast
import dataclasses
import importlib
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
ONLY_REFERENCE = {"layers"}  # fast takes these from torch.nn
ONLY_FAST = {  # names and files; the operators are in fast/ops
    *("checkpoint_files", "checkpoints", "doctor", "interface", "models", "plain_pickle", "pretrained", "segmenter"),
    *("hub", "onnx_export", "timm_models"),
}
STEMS = sorted(p.stem for p in (ROOT / "reference").glob("*.py") if p.stem not in {"__init__", *ONLY_REFERENCE})
# Reference functions that take weights: the method that stands for each in fast, and the arguments that it does not
# have there, because the module itself holds them (weights, sizes) or as the comment says.
MODULES = {
    "attention.attention": ("Attention.forward", {"weights", "heads"}),
    "attention.attention_block": ("AttentionBlock.forward", {"weights", "heads"}),
    "merging.merging": ("Merging.forward", {"weights"}),
    "merging.slot_weights": ("slot_weights", {"weights"}),  # which are the matrix `parameters`
    "patch_embedding.patch_embedding": ("PatchEmbedding.forward", {"weights"}),
    "selection.importance": ("Importance.forward", {"weights"}),
    "backbone.forward": ("AutoFocusFormer.forward", {"config", "weights"}),
    "backbone.forward_features": ("AutoFocusFormer.forward_features", {"config", "weights"}),
    "backbone.forward_head": ("AutoFocusFormer.forward_head", {"weights"}),
    "backbone.token_sets": ("AutoFocusFormer.run_token_sets", {"weights", "stages"}),
    "pointconv.pointconv": ("PointConv.forward", {"weights"}),
    "deformable.deformable_attention": ("DeformableAttention.forward", {"weights", "heads", "points", "lookup"}),
    "soft_clusters.soft_assignment": ("SoftAssignment.forward", {"weights"}),
    "mask2former.encoder_layer": ("EncoderLayer.forward", {"weights", "config"}),
    "mask2former.pixel_decoder": ("PixelDecoder.forward", {"weights", "config", "grid_size", "largest"}),
    "mask2former.decoder_layer": ("DecoderLayer.forward", {"weights", "heads"}),
    "mask2former.predict": ("QueryDecoder.predict", {"weights"}),
    "mask2former.query_decoder": ("QueryDecoder.forward", {"weights", "config", "grid_size", "largest"}),
    "mask2former.forward": ("Mask2Former.forward", {"weights", "config", "token_sets", "grid_size", "largest"}),
    "hcformer.forward": ("HCFormer.forward", {"weights", "config", "stages", "token_sets", "grid_size", "largest"}),
    "backbone.forward_stage": ("Stage.forward", {"config", "weights", "index", "grid_size"}),  # geometry is handed in
}
REFERENCE_ONLY = {"neighborhoods.scaled_distances", "checks.check_span"}  # steps of the brute-force search
FAST_ONLY = {  # unchecked forms, how to gather, how to begin, and what the reference writes in place
    *("cluster_order", "cluster_tokens", "choose", "weight_network", "projection", "lookup_tables"),
    *("init_matrices", "level_codes", "output", "important_points", "position_terms"),
}
RENAMED = {"image": "images"}  # the backbone of fast takes a batch
EXTRA = {  # what fast may take beside; add: of the residual sum
    *("add", "dtype", "device", "return_stages", "pre_logits", "checkpointing", "geometry"),
    *(
        "images",
        "tables",
        "query_pos",
        "at",
        "pixel_mask",
        "parameters",
        "grid_size",
        "weight_sum",
        "auxiliary",
        "output_auxiliary_logits",
        "pixel_values",
        "mask_labels",
        "class_labels",
        "add",
    ),
}
SHARED_VALUES = {
    "curves": ["CURVES"],
    "grid_prior": ["METRICS"],
    "patch_embedding": ["MEAN", "STD", "SMALLEST_SIDE"],
}


def public(module, kind):
    """Public functions or classes that a module defines itself."""
    members = inspect.getmembers(module, kind)
    return {name: m for name, m in members if m.__module__ == module.__name__ and not name.startswith("_")}


def arguments(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


def twin_modules(stem):
    return importlib.import_module(f"reference.{stem}"), importlib.import_module(f"fast.{stem}")


def imports(path):
    """Top-level names of the absolute imports of a file, wherever in it they stand."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def inner_imports(path):
    """Names in the relative imports of a file: modules, and what is taken from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from (node.module, *(alias.name for alias in node.names))


def test_stems_are_the_same():
    found = {p.stem for p in (ROOT / "fast").glob("*.py") if p.stem != "__init__"}
    assert found - ONLY_FAST == set(STEMS)
    for stem in STEMS:
        assert (Path(__file__).parent / f"test_{stem}.py").is_file()


def reference_functions():
    """Names, with their stem, of all public functions of the reference that have a twin."""
    names = [f"{stem}.{name}" for stem in STEMS for name in public(twin_modules(stem)[0], inspect.isfunction)]
    return [name for name in names if name not in REFERENCE_ONLY and not name.endswith("_kdtree")]


@pytest.mark.parametrize("function", reference_functions())
def test_arguments_are_the_same(function):
    stem, name = function.split(".")
    ours, theirs = twin_modules(stem)
    path, own = MODULES.get(function, (name, set()))
    expected = [a for a in arguments(getattr(ours, name)) if a not in own]
    if stem == "backbone":
        expected = [RENAMED.get(a, a) for a in expected]
    for part in path.split("."):
        theirs = getattr(theirs, part)
    found = arguments(theirs)
    assert [a for a in found if a in expected or a not in EXTRA] == expected


@pytest.mark.parametrize("stem", STEMS)
def test_fast_has_no_public_function_without_a_twin(stem):
    ours, theirs = twin_modules(stem)
    extra = set(public(theirs, inspect.isfunction)) - set(public(ours, inspect.isfunction))
    assert extra <= FAST_ONLY


@pytest.mark.parametrize("stem", STEMS)
def test_defaults_are_the_same(stem):
    ours, theirs = (public(module, inspect.isfunction) for module in twin_modules(stem))
    for name in set(ours) & set(theirs):
        defaults = [inspect.signature(f[name]).parameters for f in (ours, theirs)]
        for argument in set(defaults[0]) & set(defaults[1]):
            assert defaults[0][argument].default == defaults[1][argument].default, (name, argument)


@pytest.mark.parametrize("name", ["backbone.Config", "backbone.StageTokens", "mask2former.HeadConfig"])
def test_values_that_are_passed_on_have_the_same_fields(name):
    stem, name = name.split(".")
    ours, theirs = (dataclasses.fields(getattr(module, name)) for module in twin_modules(stem))
    assert [(f.name, f.default) for f in ours] == [(f.name, f.default) for f in theirs]


def test_fast_geometry_holds_all_that_the_reference_s_does():
    ours, theirs = (module.StageGeometry for module in twin_modules("neighborhoods"))
    made_when_asked = {name for name, value in vars(theirs).items() if isinstance(value, property)}
    known = {f.name for f in dataclasses.fields(theirs)} | made_when_asked
    assert {f.name for f in dataclasses.fields(ours)} <= known and {"neighbors", "valid", "relative"} <= made_when_asked


@pytest.mark.parametrize("stem", SHARED_VALUES)
def test_shared_values_are_the_same(stem):
    ours, theirs = twin_modules(stem)
    for name in SHARED_VALUES[stem]:
        assert np.array_equal(getattr(ours, name), getattr(theirs, name))


def test_public_things_are_documented():
    for stem in STEMS:
        for module in twin_modules(stem):
            for member in (
                module,
                *public(module, inspect.isfunction).values(),
                *public(module, inspect.isclass).values(),
            ):
                assert member.__doc__, member


def test_reference_imports_no_torch():
    for path in (ROOT / "reference").glob("*.py"):
        assert set(imports(path)) <= {"numpy", "scipy", "math", "dataclasses"}, path
        assert "import torch" not in path.read_text() and "from torch" not in path.read_text()


def test_fast_imports_torch_and_numpy_alone():
    late = {"safetensors", "scipy"}  # only inside the functions that need them
    allowed = {"torch", "numpy", *late, *sys.stdlib_module_names}
    own = {
        "timm_models": {"timm"},
        "hub": {"huggingface_hub"},
        "onnx_export": {"onnx", "onnxscript"},
    }  # files that no other imports
    for path in (ROOT / "fast").glob("*.py"):
        assert set(imports(path)) <= allowed | own.get(path.stem, set()), path
        assert not set(own) & set(inner_imports(path)), path
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not any(name in ast.unparse(node) for node in top for name in late)


def run_python(code, blocked, cwd):
    """Run code in a fresh interpreter in which some modules cannot be imported; return what it printed."""
    start = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
    command = [sys.executable, "-W", "error", "-c", start + code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_reference_runs_where_there_is_no_torch():
    code = """
import numpy as np
import reference.backbone as b
from reference import curves, clustering, layers
config = b.Config(num_classes=2)
print(clustering.balanced_clusters(np.array([[1, 0], [0, 0]]), 8, (1, 2))[0].tolist())
"""
    assert run_python(code, ["torch", "torchvision", "timm", "fast", "train"], ROOT) == "[1, 0]\n"


def test_fast_runs_alone_under_another_name(tmp_path):
    """Copied into an empty folder, where none of the other packages can be imported."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fast", tmp_path / "borrowed", ignore=ignore)
    code = """
import torch, borrowed
model = borrowed.create_model("aff_nano", num_classes=3).eval()
model.load_state_dict(borrowed.checkpoints.from_official(borrowed.checkpoints.to_official(model.state_dict())))
torch.save(model.state_dict(), "weights.pth")
borrowed.checkpoints.load("weights.pth")
print(tuple(model(torch.zeros(2, 3, 32, 32)).shape), "fast" in sys.modules)
"""
    blocked = ["timm", "torchvision", "scipy", "safetensors", "reference", "train", "cupy", "skimage", "sklearn"]
    assert run_python(code, blocked, tmp_path) == "(2, 3) False\n"
