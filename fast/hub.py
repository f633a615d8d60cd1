"""Models in the form of the Hugging Face hub: ``save_pretrained``, ``from_pretrained``, ``push_to_hub``.

    hub.wrap(model, classes=["cat", "dog"]).save_pretrained("my_model")     # weights, config.json, model card
    model = hub.from_pretrained("my_model")                                 # a folder, or USER/NAME of the hub

Needs huggingface_hub (and safetensors); a folder needs no network. ``config.json`` holds what making the model takes:
kind, head, all fields of ``Config`` and ``HeadConfig``, the names of the classes, and the images' mean and std. A
wrapped model shares its modules with the one it was made of, and is used like it.
"""

import json
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download

from .backbone import AutoFocusFormer, Config
from .checkpoint_files import CheckpointError
from .hcformer import HCFormer
from .interface import MEAN, STD
from .mask2former import HeadConfig, Mask2Former
from .models import weights_of_file

CONFIG, WEIGHTS = "config.json", "model.safetensors"
CARD = """---
{{ card_data }}
---

# {{ title }}

{{ description | default("No description was given.", true) }}

{{ parameters }} parameters; images are normalised by mean {{ mean }} and std {{ std }} (red, green, blue in 0..1).
Classes, in the order of their numbers: {{ classes | default("not named", true) }}.

```python
from autofocusformer.fast import hub

model = hub.from_pretrained("FOLDER or USER/NAME")
output = model(images)  # float32 (B, 3, H, W), normalised
```

AutoFocusFormer: Image Segmentation off the Grid (CVPR 2023), [paper]({{ paper_url }}).
"""


class HubModel(PyTorchModelHubMixin):
    """What all classes of this file share; ``classes`` and ``normalization`` (mean, std) belong to the saved model."""

    classes, normalization = None, (MEAN, STD)

    def facts(self):
        """Return what ``config.json`` holds, a dict of plain values."""
        check_names(self.classes, self)
        mean, std = self.normalization
        return {
            **self.shape(),
            "classes": None if self.classes is None else list(self.classes),
            "input": {"mean": list(mean), "std": list(std)},
        }

    def save_pretrained(self, save_directory, *, model_card_kwargs=None, **options):
        """Write weights, ``config.json`` and, if there is none, the model card README.md into a folder.

        Parameters
        ----------
        save_directory : str or path
        model_card_kwargs : dict, optional
            ``title`` and ``description`` of the card.
        **options
            Of ``ModelHubMixin.save_pretrained``: repo_id, push_to_hub.
        """
        facts = self.facts()
        card = {
            "title": type(self).__name__,
            "parameters": f"{sum(p.numel() for p in self.parameters()):,}",
            "classes": ", ".join(facts["classes"] or []),
            **facts["input"],
            **(model_card_kwargs or {}),
        }
        return super().save_pretrained(save_directory, config=facts, model_card_kwargs=card, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **options):
        """Make the model of a folder that ``save_pretrained`` wrote, or of the hub; in evaluation.

        Parameters
        ----------
        pretrained_model_name_or_path : str or path
        **options
            Of ``ModelHubMixin.from_pretrained``: revision, token, cache_dir, force_download, local_files_only; and
            ``map_location``, the device.

        Raises
        ------
        CheckpointError
            No ``config.json``, one that makes no such model, or weights that do not fit it.
        """
        config = read_config(pretrained_model_name_or_path, **options)
        wanted = kind_of(config, pretrained_model_name_or_path)
        if wanted is not cls:
            raise CheckpointError(
                f"{pretrained_model_name_or_path} holds a {wanted.__name__}: use it, not {cls.__name__}"
            )
        return super().from_pretrained(pretrained_model_name_or_path, facts=config, **options)

    @classmethod
    def _from_pretrained(cls, *, model_id, facts, map_location="cpu", **options):
        try:
            model = wrap(cls.made(facts), facts.get("classes"))
            model.normalization = tuple(facts["input"]["mean"]), tuple(facts["input"]["std"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{CONFIG} of {model_id} makes no {cls.__name__}: {error}") from error
        path = fetch(model_id, WEIGHTS, **options)
        model.load_state_dict(weights_of_file(path, model))
        return model.to(map_location).eval()


_CARD = {
    "library_name": "autofocusformer",
    "license": "apache-2.0",
    "paper_url": "https://arxiv.org/abs/2304.12406",
    "model_card_template": CARD,
}


class HubAutoFocusFormer(AutoFocusFormer, HubModel, pipeline_tag="image-classification", **_CARD):
    """A classifier, or a feature extractor."""

    def shape(self):
        """Return the part of ``config.json`` that says what the model is."""
        kind = "features" if self.features_only else "classifier"
        backbone = asdict(self.config) | {"num_classes": self.num_classes}  # which reset_classifier changes
        return {"kind": kind, "backbone": backbone, "global_pool": self.global_pool}

    @staticmethod
    def made(facts):
        """Make the model with fresh weights."""
        return AutoFocusFormer(Config(**facts["backbone"]), facts["kind"] == "features", facts["global_pool"])


class _Segmenter(HubModel):
    def shape(self):
        """Return the part of ``config.json`` that says what the model is."""
        head = next(name for name, kind in KINDS.items() if kind is type(self))
        fields = {"backbone": asdict(self.backbone.config), "head_config": asdict(self.config)}
        return {"kind": "segmenter", "head": head, **fields}

    @classmethod
    def made(cls, facts):
        """Make the model with fresh weights."""
        backbone = AutoFocusFormer(Config(**facts["backbone"]), features_only=True)
        return cls.__bases__[0](backbone, HeadConfig(**facts["head_config"]))


class HubMask2Former(Mask2Former, _Segmenter, pipeline_tag="image-segmentation", **_CARD):
    """A segmenter with the Mask2Former head."""


class HubHCFormer(HCFormer, _Segmenter, pipeline_tag="image-segmentation", **_CARD):
    """A segmenter with the HCFormer head."""


KINDS = {
    "classifier": HubAutoFocusFormer,
    "features": HubAutoFocusFormer,
    "mask2former": HubMask2Former,
    "hcformer": HubHCFormer,
}
_OF = {kind.__bases__[0]: kind for kind in KINDS.values()}


def wrap(model, classes=None, normalization=None):
    """Add the methods of the hub to a model.

    Parameters
    ----------
    model : AutoFocusFormer, Mask2Former or HCFormer
        Its modules are shared, not copied.
    classes : sequence of str, optional
        Names of the classes, in the order of their numbers; by default those of shipped weights.
    normalization : (mean, std), optional
        Of the pictures it was trained on, each three numbers; by default of ``model.pretrained_cfg``, or ImageNet's.

    Returns
    -------
    HubAutoFocusFormer, HubMask2Former or HubHCFormer

    Raises
    ------
    TypeError
        Another model.
    ValueError
        Another number of names than the model has classes.
    """
    if type(model) not in _OF:
        raise TypeError(f"model must be one of {', '.join(kind.__name__ for kind in _OF)}, not {type(model).__name__}")
    check_names(classes, model)
    kind = _OF[type(model)]
    wrapped = kind.__new__(kind)
    wrapped.__dict__.update(model.__dict__)
    known = getattr(model, "backbone", model).pretrained_cfg
    names = known.get("label_names")
    wrapped.classes = names if classes is None and _fits(names, model) else classes
    wrapped.normalization = normalization or (known["mean"], known["std"])
    return wrapped


def check_names(classes, model):
    """Raise ValueError unless there is a name for each class of the model, or none at all."""
    if classes is not None and not _fits(classes, model):
        count = _count(model)
        raise ValueError(f"classes must hold {count} names, as many as the model has classes, not {str(classes):.80}")


def _fits(classes, model):
    return classes is not None and not isinstance(classes, str) and len(classes) == _count(model)


def _count(model):
    return getattr(model, "num_classes", model.config.num_classes)


def from_pretrained(pretrained_model_name_or_path, **options):
    """Make the model of a folder or of the hub, whichever class it is; arguments as of ``HubModel.from_pretrained``."""
    config = read_config(pretrained_model_name_or_path, **options)
    return kind_of(config, pretrained_model_name_or_path).from_pretrained(pretrained_model_name_or_path, **options)


def kind_of(config, name):
    """Return the class that a ``config.json`` is of; CheckpointError if there is none."""
    what = config.get("head", config.get("kind")) if isinstance(config, dict) else None
    if not isinstance(what, str) or what not in KINDS:
        raise CheckpointError(f"{CONFIG} of {name} is of no model of ours: its kind is {what!r:.80}")
    return KINDS[what]


def read_config(name, **options):
    """Read the ``config.json`` of a folder or of the hub; CheckpointError where there is none."""
    path = fetch(name, CONFIG, **options)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error


def fetch(name, file, map_location=None, **options):
    """Return the path of a file of a folder, or of a repository of the hub; CheckpointError where it is not there."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} has no {file}: name a folder that save_pretrained wrote")
        return folder / file
    try:
        return Path(hf_hub_download(str(name), file, **options))
    except (ValueError, OSError) as error:  # all errors of the hub are one of these
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"no folder {name}, and not found on the hub: {reason}") from error
