"""Named variants (paper Table 1) and how to make them."""

import difflib
from dataclasses import fields

from .backbone import STAGES, AutoFocusFormer, Config
from .hcformer import HCFormer
from .mask2former import HeadConfig, Mask2Former
from .pretrained import backbone_weights, choose, put, settled

_TINY = {
    "depths": (3, 4, 18, 5),
    "dims": (64, 128, 256, 512),
    "heads": (2, 4, 8, 16),
    "mlp_ratio": 3.0,
    "drop_path": 0.2,
}
_SMALL = {
    "depths": (3, 4, 18, 2),
    "dims": (96, 192, 384, 768),
    "heads": (3, 6, 12, 24),
    "mlp_ratio": 3.0,
    "layer_scale": 1e-5,
    "drop_path": 0.3,
}
_BASE = {**_SMALL, "dims": (128, 256, 512, 1024), "heads": (4, 8, 16, 32), "drop_path": 0.2}
_VARIANTS = {
    "aff_nano": {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64), "heads": (1, 2, 3, 4)},
    "aff_mini": {},
    "aff_mini_1_5": {"rate": 0.2},
    "aff_tiny": _TINY,
    "aff_tiny_1_5": {**_TINY, "rate": 0.2},
    "aff_small": _SMALL,
    "aff_small_1_5": {**_SMALL, "rate": 0.2},
    "aff_base": _BASE,
    "aff_base_384": {**_BASE, "cluster_size": 24, "neighborhood": (144, 144, 144, 144)},
}


def list_models():
    """Return the names that ``create_model`` knows; "1_5" stands for a rate of 1/5, "384" for the image size."""
    return list(_VARIANTS)


def create_model(name=None, features_only=False, pretrained=None, **overrides):
    """Make an AutoFocusFormer with fresh weights, or with some that ship in the package.

    Parameters
    ----------
    name : str
        One of ``list_models()``; may be left out with ``pretrained``.
    features_only : bool
        No classifier; ``forward`` returns the four stages' ``TokenSet``s.
    pretrained : str or True, optional
        A classifier of ``list_pretrained()``, for a feature extractor also a segmenter; True: the only one there is for
        the model. With another num_classes the classifier has fresh weights, as norms of a feature extractor have that
        a classifier has not trained. The model's fields are those that the weights were trained with.
    **overrides
        Fields of ``Config``: num_classes, depths, dims, heads, mlp_ratio, cluster_size, neighborhood (tokens, one
        number a stage), rate, alpha, reserve, layer_scale, drop_path, curve, stride_metric.

    Returns
    -------
    AutoFocusFormer

    Raises
    ------
    ValueError
        Unknown name or override (the message gives the closest one), a value that makes no model, unknown weights or
        an override that contradicts them.
    """
    if not pretrained:
        return AutoFocusFormer(model_config(name, **overrides), features_only)
    _check_overrides(Config, overrides)
    kinds = ("classifier", "segmenter") if features_only else ("classifier",)
    chosen, weights, facts = choose(pretrained, name, kinds)
    model = AutoFocusFormer(Config(**settled(chosen, facts["backbone"], overrides)), features_only)
    return put(model, backbone_weights(weights, model) if features_only else weights)


def model_config(name, **overrides):
    """Return the ``Config`` of a named variant with some of its fields replaced; raises as ``create_model``."""
    _check_known("model", name, list(_VARIANTS))
    _check_overrides(Config, overrides)
    return Config(**{**_VARIANTS[name], **overrides})


HEADS = {"mask2former": Mask2Former, "hcformer": HCFormer}


def create_segmenter(backbone=None, head=None, backbone_overrides=None, pretrained=None, **overrides):
    """Make a segmenter with fresh weights, or with some that ship in the package.

    Parameters
    ----------
    backbone : str or AutoFocusFormer
        A name of ``list_models()``, or a feature extractor (``features_only=True``) to build on. By name, all stages
        attend to neighbourhoods of 48 tokens (144 for "aff_base_384") unless ``backbone_overrides`` says otherwise.
        May be left out with ``pretrained``.
    head : {"mask2former", "hcformer"}, optional
        By default "mask2former", or that of the weights.
    backbone_overrides : dict, optional
        Fields of the backbone's ``Config``, such as ``{"alpha": 8}``.
    pretrained : str or True, optional
        A segmenter of ``list_pretrained()``; True: the only one there is for the backbone. With another num_classes the
        classifier has fresh weights. All fields are those that the weights were trained with.
    **overrides
        Fields of ``HeadConfig``: num_classes, num_queries, hidden_dim, heads, points, encoder_layers, decoder_layers,
        encoder_ffn, decoder_ffn, lookup, sine_max.

    Returns
    -------
    Mask2Former or HCFormer
        ``segmenter(images)`` gives a ``SegmenterOutput``.

    Raises
    ------
    ValueError
        Unknown backbone, head or override (the message gives the closest one), a backbone with a classifier, unknown
        weights or an override that contradicts them.
    """
    _check_known("head", head or "mask2former", list(HEADS))
    _check_overrides(HeadConfig, overrides)
    if pretrained:
        return _pretrained_segmenter(backbone, head, backbone_overrides or {}, pretrained, overrides)
    if backbone is None or isinstance(backbone, str):
        config = model_config(backbone)
        same = {"neighborhood": config.neighborhood[:1] * STAGES, **(backbone_overrides or {})}
        backbone = create_model(backbone, features_only=True, **same)
    elif not backbone.features_only:
        raise ValueError(
            "the backbone of a segmenter must be a feature extractor: create_model(..., features_only=True)"
        )
    return HEADS[head or "mask2former"](backbone, HeadConfig(**overrides))


def _pretrained_segmenter(backbone, head, backbone_overrides, pretrained, overrides):
    if not isinstance(backbone, str | None):
        raise ValueError("pretrained weights bring their own backbone: give its name, or leave it out")
    _check_overrides(Config, backbone_overrides)
    name, weights, facts = choose(pretrained, backbone, ("segmenter",))
    if head not in (None, facts["head"]):
        raise ValueError(f"the weights {name!r} have a {facts['head']} head, not {head}")
    body = AutoFocusFormer(Config(**settled(name, facts["backbone"], backbone_overrides)), features_only=True)
    return put(HEADS[facts["head"]](body, HeadConfig(**settled(name, facts["head_config"], overrides))), weights)


def _check_overrides(kind, overrides):
    for key in overrides:
        _check_known("override", key, [field.name for field in fields(kind)])


def _check_known(what, name, known):
    if name in known:
        return
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    raise ValueError(f"unknown {what} {name!r}; {hint}")
