"""Enter the variants in timm's list of models: after ``import fast.timm_models``, ``timm.create_model("aff_tiny")``.

Needs timm. ``timm.list_models("aff*")`` names them; ``features_only=True`` returns maps (B, C, h, w), each cell with
the features of its nearest token, as timm's detectors and segmenters read them. No ImageNet weights ship; official
files load through ``pretrained_cfg_overlay={"file": PATH}``.
"""

from dataclasses import fields
from functools import partial

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from . import checkpoints
from .backbone import Config
from .models import ALIASES, create_model, list_models, model_config

__all__ = list_models()
_ARGUMENTS = {"global_pool", "in_chans", "drop_rate", *ALIASES, *(field.name for field in fields(Config))}


def _default_cfg(name):
    known = create_model(name, **_SMALLEST).default_cfg
    return {**known, "num_classes": model_config(name).num_classes, "architecture": None}


_SMALLEST = {"depths": (1,) * 4, "dims": (4,) * 4, "heads": (1,) * 4}  # the input does not depend on them
default_cfgs = generate_default_cfgs({name: _default_cfg(name) for name in list_models()})


def checkpoint_filter_fn(state_dict, model):
    """Return weights by our names, whether a file has them or the official ones."""
    official = any(name.startswith("patch_embed.") for name in checkpoints.unwrapped(state_dict))
    return checkpoints.from_official(state_dict) if official else state_dict


def _model(name, device=None, dtype=None, drop_rate=0.0, **options):
    unknown = sorted(set(options) - _ARGUMENTS)
    if unknown:
        raise TypeError(f"{name} takes no argument {', '.join(unknown)}; there are {', '.join(sorted(_ARGUMENTS))}")
    if drop_rate:
        raise ValueError(f"drop_rate must be 0, not {drop_rate}: the classifier has no dropout; use drop_path_rate")
    return create_model(name, **options).to(device=device, dtype=dtype)


def _register(name):
    def entry(pretrained=False, **options):
        features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
        return build_model_with_cfg(
            partial(_model, name),
            name,
            pretrained,
            feature_cfg=features,
            pretrained_filter_fn=checkpoint_filter_fn,
            **options,
        )

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"Make {name}; arguments as ``fast.create_model``."
    globals()[name] = register_model(entry)


for _name in list_models():
    _register(_name)
