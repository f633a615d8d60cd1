"""Translating the official names of weights to ours and back, and telling from weights which model they are of."""

import re

import torch

from .backbone import STAGES, AutoFocusFormer, Config
from .checkpoint_files import CheckpointError, is_finite
from .checkpoint_files import load as load
from .mask2former import LEVELS, HeadConfig, Mask2Former
from .plain_pickle import SIZES, shown

# Official names and ours, at the start of a name and inside it. The order of a tensor's elements never changes.
# Of the backbone:
_STARTS = [
    ("patch_embed.proj", "patch_embedding.conv"),
    ("patch_embed.bn.", "patch_embedding.batch_norm."),
    ("patch_embed.norm.", "patch_embedding.norm."),
    ("layers.", "stages."),
    *((f"norm{i}.", f"norms.{i}.") for i in range(STAGES)),
]
_PARTS = [
    (".attn.blank_k", ".attention.blank_key"),
    (".attn.blank_v", ".attention.blank_value"),
    (".attn.q.", ".attention.query."),
    (".attn.kv.", ".attention.key_value."),
    (".attn.pos_embed.", ".attention.position."),
    (".attn.proj.", ".attention.project."),
    (".gamma", ".scale"),
    (".downsample.", ".merging."),
    (".prob_net.", ".importance."),
]
# Of the Mask2Former head:
_PIXELS, _QUERIES, _MOST_LAYERS = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor.", 64
_HEAD_STARTS = [
    (f"{_PIXELS}input_proj.", "pixel_decoder.projections."),
    (f"{_PIXELS}transformer.level_embed", "pixel_decoder.level_embedding"),
    (f"{_PIXELS}transformer.encoder.layers.", "pixel_decoder.encoder."),
    (f"{_PIXELS}adapter_1.", "pixel_decoder.adapter."),
    (f"{_PIXELS}layer_1.0.", "pixel_decoder.pointconv."),
    (f"{_PIXELS}layer_1.1.", "pixel_decoder.pointconv_norm."),
    (f"{_PIXELS}mask_features.", "pixel_decoder.mask_features."),
    (f"{_QUERIES}decoder_norm.", "decoder.norm."),
    (f"{_QUERIES}query_feat.", "decoder.query_features."),
    (f"{_QUERIES}query_embed.", "decoder.query_positions."),
    (f"{_QUERIES}level_embed.", "decoder.level_embedding."),
    (f"{_QUERIES}class_embed.", "decoder.class_head."),
    (f"{_QUERIES}mask_embed.layers.", "decoder.mask_head."),
    *(
        (f"{_QUERIES}transformer_{official.format(i)}", f"decoder.layers.{i}.{ours}")
        for i in range(_MOST_LAYERS)
        for official, ours in [
            ("cross_attention_layers.{}.multihead_attn.", "cross_attention."),
            ("cross_attention_layers.{}.norm.", "cross_norm."),
            ("self_attention_layers.{}.self_attn.", "self_attention."),
            ("self_attention_layers.{}.norm.", "self_norm."),
            ("ffn_layers.{}.linear1.", "fc1."),
            ("ffn_layers.{}.linear2.", "fc2."),
            ("ffn_layers.{}.norm.", "ffn_norm."),
        ]
    ),
]
_HEAD_PARTS = [  # inside pixel_decoder.encoder
    (".self_attn.value_proj.", ".attention.value."),
    (".self_attn.output_proj.", ".attention.output."),
    (".self_attn.sampling_offsets.", ".attention.sampling_offsets."),
    (".self_attn.attention_weights.", ".attention.attention_weights."),
    (".self_attn.shepard_power", ".attention.shepard_power"),
    (".linear1.", ".fc1."),
    (".linear2.", ".fc2."),
]
_BACKBONE = "backbone."
_WRAPPERS, _PUT_BEFORE = ("model", "state_dict"), ("module.", "_orig_mod.")
MOST_BLOCKS, MOST_CHANNELS, MOST_LISTED = 64, 2**20, 100  # of a stage; of any axis; names of a kind in a message


def from_official(state_dict):
    """Rename an official state dict, of a classifier, a backbone or a whole segmenter, to this project's names.

    Parameters
    ----------
    state_dict : dict
        Official names to tensors or arrays. A file's whole content ``{"model": {...}, ...}`` or ``{"state_dict": ...}``
        will do, and so will names that ``DistributedDataParallel`` or ``torch.compile`` have put ``module.`` or
        ``_orig_mod.`` before.

    Returns
    -------
    dict
        Our names to the same values, ready for a strict ``load_state_dict``.

    Raises
    ------
    CheckpointError
        Missing, unknown or misshapen keys, numbers of the wrong type or not finite: all of them are listed, by the
        names in the file.
    """
    names = {}  # of each name without what was put before it: the one in the file
    weights = unwrapped(state_dict, names)
    given = {}  # our name: the one in the file
    for name in weights:
        given.setdefault(our_name(name), names[name])
    doubled = [names[name] for name in weights if given[our_name(name)] != names[name]]
    renamed = {our_name(name): value for name, value in weights.items() if given[our_name(name)] == names[name]}
    _check_complete(renamed, lambda name: given.get(name) or official_name(name), doubled)
    return renamed


def unwrapped(state_dict, names=None):
    """Take the weights out of a file's content, and ``module.`` and ``_orig_mod.`` off the start of all their names.

    Parameters
    ----------
    state_dict : dict
    names : dict, optional
        Gets each name's form before.

    Returns
    -------
    dict

    Raises
    ------
    CheckpointError
        No dict with names for keys.
    """
    for _ in range(len(_WRAPPERS)):
        inner = [state_dict[key] for key in _WRAPPERS if isinstance(state_dict, dict) and key in state_dict]
        state_dict = next((each for each in inner if isinstance(each, dict)), state_dict)
    if not isinstance(state_dict, dict):
        raise CheckpointError(f"weights must be a dict of names to tensors, not a {type(state_dict).__name__}")
    odd = next((key for key in state_dict if not isinstance(key, str)), None)
    if odd is not None or None in state_dict:
        raise CheckpointError(f"the names of weights must be strings; there is {str(odd)[:40]}, a {type(odd).__name__}")
    short = {name: name for name in state_dict}
    while len(short) and (start := next((p for p in _PUT_BEFORE if all(name.startswith(p) for name in short)), None)):
        short = {name.removeprefix(start): whole for name, whole in short.items()}
    if names is not None:
        names.update(short)
    return {name: state_dict[whole] for name, whole in short.items()}


def to_official(state_dict):
    """Rename a state dict of this project to the official names: the inverse of ``from_official``, as strict."""
    state_dict = unwrapped(state_dict)
    _check_complete(state_dict, str)
    return {official_name(name): value for name, value in state_dict.items()}


def our_name(official):
    """Translate one official name to ours."""
    if official.startswith(_BACKBONE):
        return _BACKBONE + _translate(official[len(_BACKBONE) :], _STARTS, _PARTS)
    if official.startswith((_PIXELS, _QUERIES)):
        name = _translate(official, _HEAD_STARTS, [])
        return _translate(name, [], _HEAD_PARTS) if name.startswith("pixel_decoder.encoder.") else name
    return _translate(official, _STARTS, _PARTS)


def official_name(ours):
    """Translate one of our names to the official one."""
    starts, parts, head_starts, head_parts = (
        [pair[::-1] for pair in table] for table in (_STARTS, _PARTS, _HEAD_STARTS, _HEAD_PARTS)
    )
    if ours.startswith(_BACKBONE):
        return _BACKBONE + _translate(ours[len(_BACKBONE) :], starts, parts)
    if ours.startswith("pixel_decoder.encoder."):
        return _translate(_translate(ours, [], head_parts), head_starts, [])
    if ours.startswith(("pixel_decoder.", "decoder.")):
        return _translate(ours, head_starts, [])
    return _translate(ours, starts, parts)


def _translate(name, starts, parts):
    for old, new in starts:
        if name.startswith(old):
            name = new + name[len(old) :]
            break
    for old, new in parts:
        name = name.replace(old, new)
    return name


def config_from(state_dict):
    """Return which model a state dict of this project belongs to.

    Returns
    -------
    config : Config
        num_classes, depths, dims, heads, mlp_ratio and the presence of layer scale are read off the shapes. What shapes
        do not show (cluster size, neighbourhoods, rate, alpha, ...) has ``Config``'s defaults: replace what differs.
    features_only : bool
        Whether it is a feature extractor (``norms.*`` instead of ``norm.*`` and ``head.*``).

    Raises
    ------
    CheckpointError
        Names or shapes that leave the model unknown, or are of none.
    """
    shapes = _shapes(state_dict)

    def first(pattern):
        found = [shapes[name] for name in sorted(shapes) if re.fullmatch(pattern, name)]
        if not found or not found[0]:
            raise CheckpointError(f"not the weights of an AutoFocusFormer: no key is like {pattern}")
        return found[0]

    stages, block = range(STAGES), r"stages\.{}\.blocks\.\d+\."
    depths = [_count(shapes, f"stages.{i}.blocks.", MOST_BLOCKS) for i in stages]
    dims = [first(block.format(i) + r"norm\d\.weight")[0] for i in stages]
    hidden = first(block.format(0) + r"mlp\.fc1\.weight")[0]
    features_only = any(name.startswith("norms.") for name in shapes)
    classes = 0 if features_only or "head.weight" not in shapes else first(r"head\.weight")[0]
    try:
        config = Config(
            num_classes=classes,
            depths=tuple(depths),
            dims=tuple(dims),
            heads=tuple(first(block.format(i) + r"attention\.position\.weight")[0] for i in stages),
            mlp_ratio=hidden / max(1, dims[0]),
            layer_scale=1e-5 if any(".scale1" in name for name in shapes) else None,
        )
    except ValueError as error:
        raise CheckpointError(f"not the weights of an AutoFocusFormer: {error}") from None
    return config, features_only


def head_config_from(state_dict):
    """Return the HeadConfig of a Mask2Former state dict of this project; points, lookup, sine_max: the defaults."""
    shapes = _shapes(state_dict)

    def length(name, axis=0):
        if len(shapes[name]) <= axis:
            raise CheckpointError(f"not the weights of a Mask2Former: {official_name(name)} is {shapes[name]}")
        return shapes[name][axis]

    try:
        per_head = LEVELS * HeadConfig.points
        return HeadConfig(
            num_classes=length("decoder.class_head.weight") - 1,
            hidden_dim=length("decoder.query_features.weight", 1),
            num_queries=length("decoder.query_features.weight"),
            heads=length("pixel_decoder.encoder.0.attention.attention_weights.weight") // per_head,
            encoder_layers=_count(shapes, "pixel_decoder.encoder.", _MOST_LAYERS),
            decoder_layers=_count(shapes, "decoder.layers.", _MOST_LAYERS),
            encoder_ffn=length("pixel_decoder.encoder.0.fc1.weight"),
            decoder_ffn=length("decoder.layers.0.fc1.weight"),
        )
    except KeyError as error:
        raise CheckpointError(f"not the weights of a Mask2Former: {official_name(error.args[0])} is missing") from None
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"not the weights of a Mask2Former: {error}") from None


def _shapes(state_dict):
    """Shapes by name, none so large that a model of them would be a burden even without its numbers."""
    if not isinstance(state_dict, dict) or not all(isinstance(name, str) for name in state_dict):
        raise CheckpointError(f"weights must be a dict of names to tensors, not {shown(type(state_dict).__name__)}")
    shapes = {name: _shape(value) for name, value in state_dict.items()}
    for name, shape in shapes.items():
        if max(shape, default=0) > MOST_CHANNELS:
            raise CheckpointError(f"{_short(name)} is {shape}: no axis of a weight has more than {MOST_CHANNELS:,}")
    return shapes


def _count(shapes, start, most):
    """One more than the largest number that follows ``start`` in a name."""
    numbers = [name[len(start) :].partition(".")[0] for name in shapes if name.startswith(start)]
    odd = [number for number in numbers if not re.fullmatch("[0-9]{1,4}", number) or int(number) >= most]
    if odd:
        raise CheckpointError(f"{_short(start + odd[0])}: such parts are numbered from 0 to at most {most - 1}")
    return 1 + max(map(int, numbers), default=-1)


def expected_model(state_dict):
    """Make, without memory for its weights, the model that a state dict of this project describes."""
    _shapes(state_dict)
    backbone = {n[len(_BACKBONE) :]: v for n, v in state_dict.items() if n.startswith(_BACKBONE)}
    config, features_only = config_from(backbone or state_dict)
    if backbone and not features_only:
        raise CheckpointError("not the weights of a segmenter: its backbone has no norms.* of its stages")
    with torch.device("meta"):
        model = AutoFocusFormer(config, features_only)
        return Mask2Former(model, head_config_from(state_dict)) if backbone else model


def _check_complete(state_dict, shown_name, doubled=()):
    """Compare names, shapes and kinds of numbers with those of the model that they describe; list all that is wrong.

    ``doubled`` are further names, in the words of the file, that mean a weight already there.
    """
    expected = expected_model(state_dict).state_dict()
    known = {name: value for name, value in state_dict.items() if name in expected}
    odd = [name for name, value in known.items() if not _same_kind(value, expected[name])]
    found = {
        "missing": [shown_name(name) for name in expected if name not in state_dict],
        "unknown": [shown_name(name) for name in state_dict if name not in expected] + list(doubled),
        "misshapen": [
            f"{shown_name(name)} is {_shape(value)}, not {_shape(expected[name])}"
            for name, value in known.items()
            if _shape(value) != _shape(expected[name])
        ],
        "of another type": [f"{shown_name(name)} is {_kind(known[name])}" for name in odd],
        "NaN or infinite": [
            shown_name(name)
            for name, value in known.items()
            if name not in odd and not is_finite(torch.as_tensor(value))
        ],
    }
    problems = "; ".join(f"{what}: {_listed(names)}" for what, names in found.items() if names)
    if problems:
        raise CheckpointError(f"the checkpoint does not fit: {problems}")


def _same_kind(value, expected):
    """Whether a value is a tensor or array of real floating-point numbers, or of whole ones, as ``expected``."""
    dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
    return dtype in (SIZES if not expected.is_floating_point() else ("float16", "bfloat16", "float32", "float64"))


def _kind(value):
    return str(getattr(value, "dtype", type(value).__name__))


def _listed(names):
    more = f" and {len(names) - MOST_LISTED:,} more" if len(names) > MOST_LISTED else ""
    return ", ".join(map(_short, names[:MOST_LISTED])) + more


def _short(name):
    return shown(name) if len(name) > 160 or not name.isprintable() else name


def _shape(value):
    """Shape of a tensor or array as a tuple; () for anything else."""
    return tuple(getattr(value, "shape", ()))
