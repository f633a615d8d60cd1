"""Named variants (paper Table 1) and how to make them."""

import difflib
from dataclasses import fields
from fnmatch import fnmatchcase

from . import checkpoints
from .backbone import STAGES, AutoFocusFormer, Config
from .checks import LONGEST, is_whole, shown
from .hcformer import HCFormer
from .interface import pretrained_cfg
from .mask2former import HeadConfig, Mask2Former
from .pretrained import backbone_weights, choose, list_pretrained, pretrained_facts, put, settled

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


ALIASES = {"num_heads": "heads", "embed_dims": "dims", "drop_path_rate": "drop_path"}  # timm's names of fields


def list_models(filter="", pretrained=False, exclude_filters=""):
    """Return the names that ``create_model`` knows; "1_5" stands for a rate of 1/5, "384" for the image size.

    Parameters
    ----------
    filter, exclude_filters : str or sequence of str
        Names, in which * and ? stand for any characters: those wanted (by default all) and those not.
    pretrained : bool
        Only models of which classifiers ship.
    """
    for what, given in (("filter", filter), ("exclude_filters", exclude_filters)):
        many = given if isinstance(given, tuple | list | set | frozenset) else [given]
        if not all(isinstance(each, str) for each in many):
            raise TypeError(f"{what} must be a string or several, not {shown(given)}")
    wanted, unwanted = ([x] if isinstance(x, str) else list(x) for x in (filter, exclude_filters))
    names = [name for name in _VARIANTS if not any(wanted) or any(fnmatchcase(name, each) for each in wanted)]
    if pretrained:
        facts = map(pretrained_facts, list_pretrained())
        there = {each["model"] for each in facts if each["kind"] == "classifier"}
        names = [name for name in names if name in there]
    return [name for name in names if not any(fnmatchcase(name, each) for each in unwanted)]


def create_model(
    name=None,
    features_only=False,
    pretrained=None,
    checkpoint_path=None,
    out_indices=None,
    global_pool="avg",
    in_chans=3,
    **overrides,
):
    """Make an AutoFocusFormer with fresh weights, with some that ship in the package, or with those of a file.

    Parameters
    ----------
    name : str
        One of ``list_models()``; may be left out with ``pretrained``.
    features_only : bool
        No classifier; ``forward`` returns the four stages' ``TokenSet``.
    pretrained : str or True, optional
        A classifier of ``list_pretrained()``, for a feature extractor also a segmenter; True: the only one there is for
        the model. With another num_classes the classifier has fresh weights, as norms of a feature extractor have that
        a classifier has not trained. The model's fields are those that the weights were trained with.
    checkpoint_path : str or path, optional
        A file of weights for exactly this model, with our names or the official ones (``checkpoints.load``).
    out_indices : int or sequence of int, optional
        With ``features_only``: the stages returned, a number for the last so many; what they do not need is left out.
    global_pool : {"avg", ""}
        Of the classifier: mean over the tokens, or none.
    in_chans : int
        Channels of the images: 3, there is no other.
    **overrides
        Fields of ``Config``: num_classes, depths, dims, heads, mlp_ratio, cluster_size, neighborhood (tokens, one
        number a stage), rate, alpha, reserve, layer_scale, drop_path, curve, stride_metric. timm's names num_heads,
        embed_dims and drop_path_rate will do.

    Returns
    -------
    AutoFocusFormer

    Raises
    ------
    ValueError
        Unknown name or override (the message gives the closest one), a value that makes no model, unknown weights or
        an override that contradicts them.
    CheckpointError
        A file that is no checkpoint or not of this model.
    """
    if not is_whole(in_chans) or in_chans != 3:
        raise ValueError(
            f"in_chans must be 3 (images are red, green, blue), not {shown(in_chans)}: repeat or mix channels"
        )
    if out_indices is not None and not features_only:
        raise ValueError("out_indices needs features_only=True: a classifier returns no stages")
    model = _create_model(name, features_only, pretrained, global_pool, own_names(overrides))
    if checkpoint_path is not None:
        model.load_state_dict(weights_of_file(checkpoint_path, model))
    if out_indices is not None:
        model.prune_intermediate_layers(out_indices)
    return model


def _create_model(name, features_only, pretrained, global_pool, overrides):
    _check_pretrained(pretrained)
    if not pretrained:
        config, more = model_config(name, **overrides), {"size": 384 if name.endswith("_384") else 224}
        model = AutoFocusFormer(config, features_only, global_pool)
    else:
        _check_overrides(Config, overrides)
        kinds = ("classifier", "segmenter") if features_only else ("classifier",)
        chosen, weights, facts = choose(pretrained, name, kinds)
        config, name = Config(**settled(chosen, facts["backbone"], overrides)), facts["model"]
        model = AutoFocusFormer(config, features_only, global_pool)
        put(model, backbone_weights(weights, model) if features_only else weights)
        more = _cfg_of(chosen, facts, 0 if features_only else config.num_classes)
    model.pretrained_cfg = model.default_cfg = pretrained_cfg(config, name, **more)
    return model


def _cfg_of(name, facts, num_classes):
    """Return what shipped weights say in pretrained_cfg; its label_names where the classifier is that of the file."""
    names = facts["classes"] if len(facts["classes"] or []) == num_classes else None
    mean, std = (tuple(facts["input"][key]) for key in ("mean", "std"))
    return {"tag": name, "mean": mean, "std": std, "label_names": names}


def own_names(overrides):
    """Return overrides with timm's names of fields replaced by ours; ValueError where both are given."""
    doubled = [f"{name} and {ALIASES[name]}" for name in overrides if ALIASES.get(name) in overrides]
    if doubled:
        raise ValueError(f"{doubled[0]} are two names of one thing: give one")
    return {ALIASES.get(name, name): value for name, value in overrides.items()}


def model_config(name, **overrides):
    """Return the ``Config`` of a named variant with some of its fields replaced; raises as ``create_model``."""
    overrides = own_names(overrides)
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
    _check_known("head", "mask2former" if head is None else head, list(HEADS))
    _check_pretrained(pretrained)
    if not isinstance(backbone_overrides, dict | None) or not all(isinstance(x, str) for x in backbone_overrides or ()):
        raise TypeError(f"backbone_overrides must be a dict, not {shown(backbone_overrides)}")
    _check_overrides(HeadConfig, overrides)
    if pretrained:
        return _pretrained_segmenter(backbone, head, backbone_overrides or {}, pretrained, overrides)
    if not isinstance(backbone, str | AutoFocusFormer | None):
        raise TypeError(f"backbone must be a name or a feature extractor, not {shown(type(backbone).__name__)}")
    if backbone is None or isinstance(backbone, str):
        config = model_config(backbone)
        same = {"neighborhood": config.neighborhood[:1] * STAGES, **(backbone_overrides or {})}
        backbone = create_model(backbone, features_only=True, **same)
    elif not backbone.features_only:
        raise ValueError(
            "the backbone of a segmenter must be a feature extractor: create_model(..., features_only=True)"
        )
    elif len(backbone.out_indices) != STAGES:
        raise ValueError(f"the backbone of a segmenter must return all {STAGES} stages, not {backbone.out_indices}")
    return HEADS["mask2former" if head is None else head](backbone, HeadConfig(**overrides))


def _pretrained_segmenter(backbone, head, backbone_overrides, pretrained, overrides):
    if not isinstance(backbone, str | None):
        raise ValueError("pretrained weights bring their own backbone: give its name, or leave it out")
    backbone_overrides = own_names(backbone_overrides)
    _check_overrides(Config, backbone_overrides)
    name, weights, facts = choose(pretrained, backbone, ("segmenter",))
    if head not in (None, facts["head"]):
        raise ValueError(f"the weights {name!r} have a {facts['head']} head, not {head}")
    body = AutoFocusFormer(Config(**settled(name, facts["backbone"], backbone_overrides)), features_only=True)
    head_config = HeadConfig(**settled(name, facts["head_config"], overrides))
    body.pretrained_cfg = pretrained_cfg(body.config, facts["model"], **_cfg_of(name, facts, head_config.num_classes))
    return put(HEADS[facts["head"]](body, head_config), weights)


def weights_of_file(path, model):
    """Return a file's weights by our names; CheckpointError unless they fit the model."""
    weights = checkpoints.unwrapped(checkpoints.load(path))
    if any(name.startswith(("patch_embed.", "backbone.patch_embed.")) for name in weights):
        weights = checkpoints.from_official(weights)
    expected = model.state_dict()
    wrong = [
        *(f"{name} is missing" for name in expected if name not in weights),
        *(f"{name} is not of this model" for name in weights if name not in expected),
        *(
            f"{n} is {tuple(weights[n].shape)}, not {tuple(x.shape)}"
            for n, x in expected.items()
            if n in weights and weights[n].shape != x.shape
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise checkpoints.CheckpointError(f"{path} does not fit the model: {'; '.join(wrong[:3])}{more}")
    return weights


def _check_pretrained(pretrained):
    if not isinstance(pretrained, str | bool | None):
        raise TypeError(f"pretrained must be a name, True or None, not {shown(pretrained)}")


def _check_overrides(kind, overrides):
    for key in overrides:
        _check_known("override", key, [field.name for field in fields(kind)])


def _check_known(what, name, known):
    if isinstance(name, str) and name in known:
        return
    close = difflib.get_close_matches(str(name)[:LONGEST], known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    raise ValueError(f"unknown {what} {shown(name)}; {hint}")
