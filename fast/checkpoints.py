"""Reading checkpoints without running them, and translating the official names of weights to ours and back."""

import pickle
import re
import warnings
import zipfile
from _codecs import encode
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from .backbone import STAGES, AutoFocusFormer, Config
from .mask2former import LEVELS, HeadConfig, Mask2Former

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


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or whose keys or shapes are not those of an AutoFocusFormer."""


def load(path):
    """Read a checkpoint file without running anything in it.

    Parameters
    ----------
    path : str or Path
        A file of ``torch.save``, a pickle of arrays ``*.pkl`` as detectron2 writes it or, with safetensors installed,
        ``*.safetensors``.

    Returns
    -------
    dict
        What the file holds, on the CPU: tensors and plain containers. A pickled configuration (as the official
        classification files carry) comes back as an ordered dict.

    Raises
    ------
    FileNotFoundError
        No such file.
    CheckpointError
        A file that is truncated or corrupted, that would run code to be read, or that holds no dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    if path.suffix == ".pkl" and not zipfile.is_zipfile(path):
        return _load_pickle(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_plain_types()):
            warnings.simplefilter("ignore")  # of torch, on unusual pickle protocols: what it cannot read, it refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|Unsupported class|function) ([\w.]+)", str(error))
        if refused:
            message = (
                f"{path} was refused: reading it would run {refused[1]}; only tensors and plain containers are read"
            )
        else:
            message = f"{path} is not a checkpoint, or is corrupted ({str(error).splitlines()[0][:80]})"
        raise CheckpointError(message) from None
    except Exception as error:  # bytes at random raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
        raise CheckpointError(f"{path} is truncated or corrupted ({reason})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    return content


def _plain_types():
    """What a file may name besides torch's own tensors: configurations as dicts, numpy's numbers and arrays."""
    core = np.core.multiarray if np.lib.NumpyVersion(np.__version__) < "2.0.0" else np._core.multiarray
    numpy_types = [np.dtype, np.ndarray, *{type(np.dtype(t)) for t in "?bhilqBHILQefd"}]
    functions = [
        (f, f"numpy.{m}.multiarray.{f.__name__}") for f in (core.scalar, core._reconstruct) for m in ("core", "_core")
    ]
    return [(OrderedDict, "yacs.config.CfgNode"), *numpy_types, *functions]


def _load_safetensors(path):
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError("reading .safetensors needs the package safetensors: pip install safetensors") from None
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupted ({error})") from None


def _load_pickle(path):
    """Read a plain pickle of a dict of arrays; whatever names anything but arrays and plain containers is refused."""
    pairs = (entry if isinstance(entry, tuple) else (entry, None) for entry in [*_plain_types(), OrderedDict, encode])
    known = {name or f"{item.__module__}.{item.__name__}": item for item, name in pairs}

    class PlainUnpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if f"{module}.{name}" not in known:
                what = f"reading it would run {module}.{name}; only arrays and plain containers are read"
                raise CheckpointError(f"{path} was refused: {what}")
            return known[f"{module}.{name}"]

    try:
        with path.open("rb") as file:
            content = PlainUnpickler(file, encoding="latin1").load()
    except CheckpointError:
        raise
    except Exception as error:  # bytes at random raise nearly anything
        raise CheckpointError(f"{path} is truncated or corrupted ({type(error).__name__}: {str(error)[:80]})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    return _tensors(content)


def _tensors(value):
    """Turn the numeric arrays of nested dicts into tensors."""
    if isinstance(value, dict):
        return {name: _tensors(item) for name, item in value.items()}
    return torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" else value


def from_official(state_dict):
    """Rename an official state dict, of a classifier, a backbone or a whole segmenter, to this project's names.

    Parameters
    ----------
    state_dict : dict
        Official names to tensors or arrays; a file's whole content ``{"model": {...}, ...}`` will do.

    Returns
    -------
    dict
        Our names to the same values, ready for a strict ``load_state_dict``.

    Raises
    ------
    CheckpointError
        Missing, unknown or misshapen keys: all of them are listed, by their official names.
    """
    state_dict = state_dict["model"] if isinstance(state_dict.get("model"), dict) else state_dict
    given = {}  # our name: the one in the file
    for name in state_dict:
        given.setdefault(our_name(name), name)
    doubled = [name for name in state_dict if given[our_name(name)] != name]
    renamed = {ours: state_dict[name] for ours, name in given.items()}
    _check_complete(renamed, lambda name: given.get(name) or official_name(name), doubled)
    return renamed


def to_official(state_dict):
    """Rename a state dict of this project to the official names: the inverse of ``from_official``, as strict."""
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
    """Work out from a state dict of this project which model it belongs to.

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
        Names or shapes that leave the model unknown.
    """
    shapes = {name: _shape(value) for name, value in state_dict.items()}

    def first(pattern):
        found = [shapes[name] for name in sorted(shapes) if re.fullmatch(pattern, name)]
        if not found or not found[0]:
            raise CheckpointError(f"not the weights of an AutoFocusFormer: no key is like {pattern}")
        return found[0]

    stages, block = range(STAGES), r"stages\.{}\.blocks\.\d+\."
    blocks = [[int(n.split(".")[3]) for n in shapes if re.match(block.format(i), n)] for i in stages]
    dims = [first(block.format(i) + r"norm\d\.weight")[0] for i in stages]
    hidden = first(block.format(0) + r"mlp\.fc1\.weight")[0]
    features_only = any(name.startswith("norms.") for name in shapes)
    config = Config(
        num_classes=0 if features_only or "head.weight" not in shapes else shapes["head.weight"][0],
        depths=tuple(max(b, default=-1) + 1 for b in blocks),
        dims=tuple(dims),
        heads=tuple(first(block.format(i) + r"attention\.position\.weight")[0] for i in stages),
        mlp_ratio=hidden / dims[0],
        layer_scale=1e-5 if any(".scale1" in name for name in shapes) else None,
    )
    return config, features_only


def head_config_from(state_dict):
    """Work out the HeadConfig of a Mask2Former state dict of this project; points, lookup, sine_max: the defaults."""
    shapes = {name: _shape(value) for name, value in state_dict.items()}
    try:
        queries, hidden = shapes["decoder.query_features.weight"]
        return HeadConfig(
            num_classes=shapes["decoder.class_head.weight"][0] - 1,
            hidden_dim=hidden,
            num_queries=queries,
            heads=shapes["pixel_decoder.encoder.0.attention.attention_weights.weight"][0]
            // (LEVELS * HeadConfig.points),
            encoder_layers=1 + max(int(n.split(".")[2]) for n in shapes if n.startswith("pixel_decoder.encoder.")),
            decoder_layers=1 + max(int(n.split(".")[2]) for n in shapes if n.startswith("decoder.layers.")),
            encoder_ffn=shapes["pixel_decoder.encoder.0.fc1.weight"][0],
            decoder_ffn=shapes["decoder.layers.0.fc1.weight"][0],
        )
    except KeyError as error:
        raise CheckpointError(f"not the weights of a Mask2Former: {official_name(error.args[0])} is missing") from None


def expected_model(state_dict):
    """Make, without memory for its weights, the model that a state dict of this project describes."""
    backbone = {n[len(_BACKBONE) :]: v for n, v in state_dict.items() if n.startswith(_BACKBONE)}
    config, features_only = config_from(backbone or state_dict)
    with torch.device("meta"):
        model = AutoFocusFormer(config, features_only)
        return Mask2Former(model, head_config_from(state_dict)) if backbone else model


def _check_complete(state_dict, shown_name, doubled=()):
    """Compare names and shapes with those of the model that they describe; list all that is wrong.

    ``doubled`` are further names, in the words of the file, that mean a weight already there.
    """
    expected = expected_model(state_dict).state_dict()
    missing = [shown_name(name) for name in expected if name not in state_dict]
    unknown = [shown_name(name) for name in state_dict if name not in expected] + list(doubled)
    misshapen = [
        f"{shown_name(name)} is {_shape(value)}, not {_shape(expected[name])}"
        for name, value in state_dict.items()
        if name in expected and _shape(value) != _shape(expected[name])
    ]
    found = [("missing", missing), ("unknown", unknown), ("misshapen", misshapen)]
    problems = "; ".join(f"{what}: {', '.join(names)}" for what, names in found if names)
    if problems:
        raise CheckpointError(f"the checkpoint does not fit: {problems}")


def _shape(value):
    """Shape of a tensor or array as a tuple; () for anything else."""
    return tuple(getattr(value, "shape", ()))
