"""Models in the form of the Hugging Face hub, in a local folder, without network."""

import copy
import json

import huggingface_hub.constants
import pytest
import torch

import fast
from fast import hub
from fast.checkpoint_files import CheckpointError
from parity_tests.heads import segmenter
from parity_tests.test_models import images, nano

MODELS = {
    "classifier": (nano, hub.HubAutoFocusFormer),
    "features": (lambda: nano(features_only=True), hub.HubAutoFocusFormer),
    "mask2former": (lambda: segmenter("mask2former")[0], hub.HubMask2Former),
    "hcformer": (lambda: segmenter("hcformer")[0], hub.HubHCFormer),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    hub.wrap(nano(), list("abcde")).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_saved_model_comes_back_to_the_bit(name, tmp_path):
    make, kind = MODELS[name]
    model = make()
    classes = None if name == "features" else list("abcde")
    wrapped = hub.wrap(model, classes, ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0)))
    assert isinstance(wrapped, type(model)) and next(wrapped.parameters()) is next(model.parameters())
    wrapped.save_pretrained(tmp_path, model_card_kwargs={"title": "Five letters"})
    x = images(1, 3, 64, 64)
    wanted = torch.utils._pytree.tree_leaves(model(x))
    for back in (hub.from_pretrained(tmp_path), kind.from_pretrained(tmp_path), copy.deepcopy(wrapped)):
        assert type(back) is kind and back.classes == classes and not back.training
        assert back.normalization == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
        found = torch.utils._pytree.tree_leaves(back(x))
        assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(found, wanted, strict=True))
    card = (tmp_path / "README.md").read_text()
    assert "# Five letters" in card and "library_name: autofocusformer" in card
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card
    assert ("a, b, c, d, e" in card) == (classes is not None)


@pytest.mark.parametrize("name, create", [("digits", fast.create_model), ("nuclei", fast.create_segmenter)])
def test_what_ships_keeps_its_classes_and_normalisation(tmp_path, name, create):
    hub.wrap(create(pretrained=name)).save_pretrained(tmp_path)
    facts, saved = fast.pretrained_facts(name), json.loads((tmp_path / "config.json").read_text())
    assert saved["input"] == {key: facts["input"][key] for key in ("mean", "std")}
    assert saved["classes"] == facts["classes"] == hub.from_pretrained(tmp_path).classes
    assert hub.wrap(create(pretrained=name, num_classes=3)).classes is None


def test_a_changed_classifier_is_saved_as_it_is(tmp_path):
    model = hub.wrap(nano())
    model.reset_classifier(3)
    model.save_pretrained(tmp_path)
    assert hub.from_pretrained(tmp_path).config.num_classes == 3


def rewrite(change):
    def apply(folder):
        facts = json.loads((folder / "config.json").read_text())
        change(facts)
        (folder / "config.json").write_text(json.dumps(facts))

    return apply


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json: name a folder that save_pretrained wrote"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\xff"), "config.json is no JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), "of no model of ours: its kind is None"),
        (rewrite(lambda facts: facts.update(kind="bert")), "of no model of ours: its kind is 'bert'"),
        (rewrite(lambda facts: facts.update(kind=["bert"])), "of no model of ours"),
        (rewrite(lambda facts: facts.pop("backbone")), "makes no HubAutoFocusFormer: 'backbone'"),
        (rewrite(lambda facts: facts["backbone"].update(depths=[1])), "makes no HubAutoFocusFormer: depths must"),
        (rewrite(lambda facts: facts["backbone"].update(colour=1)), "makes no HubAutoFocusFormer: .*colour"),
        (rewrite(lambda facts: facts["backbone"].update(dims=[8, 8, 8, 8], heads=[1, 1, 1, 1])), "not fit the model"),
        (rewrite(lambda facts: facts.update(classes=["a"])), "classes must hold 5 names"),
        (rewrite(lambda facts: facts.update(input={})), "makes no HubAutoFocusFormer: 'mean'"),
    ],
)
def test_a_spoilt_folder_is_one_line(folder, spoil, message):
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        hub.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_other_names_and_models_are_refused(folder):
    with pytest.raises(CheckpointError, match="holds a HubAutoFocusFormer: use it, not HubMask2Former"):
        hub.HubMask2Former.from_pretrained(folder)
    for name in ("somebody/nothing", folder / "config.json", "/no/folder"):
        with pytest.raises(CheckpointError, match="no folder .*, and not found on the hub: ") as caught:
            hub.from_pretrained(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="model must be one of AutoFocusFormer, Mask2Former, HCFormer, not Linear"):
        hub.wrap(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="classes must hold 5 names"):
        hub.wrap(nano(), ["a"])
