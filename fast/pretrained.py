"""Weights that ship in the package: listed, checked and read from ``fast/weights``, without a network.

``SHA256SUMS`` there lists the files in the form that ``sha256sum -c`` reads; a file that is not as listed is refused.
Each NAME.safetensors says in its header, as JSON under the key HEADER, all that making its model takes (``facts``):

=============  ==================================================================================
kind           "classifier" or "segmenter"
model          the variant, a name of ``fast.list_models()``
backbone       all fields of the backbone's ``Config``
head           segmenter: "mask2former" or "hcformer"
head_config    segmenter: all fields of ``HeadConfig``
classes        names, in the order of their numbers
input          mean and std by which pictures in 0..1 are normalised, and the smallest side, pixels
parameters     how many
=============  ==================================================================================

and what else the exporter wrote (``train.export``): the training's config, scores, licence. NAME.md is the model card.
"""

import hashlib
import json
from pathlib import Path

import torch

from .checkpoint_files import CheckpointError
from .checks import shown

FOLDER = Path(__file__).parent / "weights"
SUMS, SUFFIX, HEADER = "SHA256SUMS", ".safetensors", "autofocusformer"
CLASSIFIERS = ("head.", "decoder.class_head.")  # what another number of classes replaces
_DTYPES = {"F16": torch.float16, "F32": torch.float32, "I64": torch.int64}
_FREE = ("num_classes", "drop_path")  # overrides that trained weights do not settle


def list_pretrained():
    """Return the names of the weights that ship, as ``create_model`` and ``create_segmenter`` take them."""
    return sorted(file.removesuffix(SUFFIX) for file in _sums() if file.endswith(SUFFIX))


def pretrained_file(name):
    """Return the path of shipped weights after comparing the file with its SHA-256.

    Raises
    ------
    ValueError
        No such weights; the message lists those that ship.
    CheckpointError
        The file is missing or is not the one that was shipped.
    """
    if not isinstance(name, str):
        raise ValueError(f"the name of weights must be a string, not {shown(name)}")
    sums, file = _sums(), f"{name}{SUFFIX}"
    if file not in sums:
        known = ", ".join(f"{each} ({_kind_of(each)})" for each in list_pretrained()) or "none"
        raise ValueError(f"no weights {shown(name)} ship with this package; there are: {known}")
    path = FOLDER / file
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: install the package again")
    if hashlib.sha256(path.read_bytes()).hexdigest() != sums[file]:
        raise CheckpointError(f"{path} is not as it was shipped (its SHA-256 differs): install the package again")
    return path


def pretrained_facts(name):
    """Return what shipped weights say of themselves, a dict as this module's docstring describes it."""
    return _read(pretrained_file(name))[1]


def load_pretrained(name):
    """Read shipped weights.

    Returns
    -------
    weights : dict of str to Tensor
        A whole state dict; numbers stored as float16 come back as float32.
    facts : dict
        As ``pretrained_facts``.

    Raises
    ------
    ValueError, CheckpointError
        As ``pretrained_file``.
    """
    return _read(pretrained_file(name))


def choose(pretrained, model, kinds):
    """Read the weights that a call of ``create_model`` or ``create_segmenter`` asks for.

    Parameters
    ----------
    pretrained : str or True
        A name; True takes the only weights of the model and of the first of ``kinds``.
    model : str or None
        The variant asked for; None takes the weights' own.
    kinds : tuple of str
        Kinds of weights that will do.

    Returns
    -------
    name : str
    weights, facts
        As ``load_pretrained``.

    Raises
    ------
    ValueError
        No such weights, or of another model or kind.
    """
    if pretrained is True:
        facts = {name: pretrained_facts(name) for name in list_pretrained()}
        fit = [name for name, f in facts.items() if f["kind"] == kinds[0] and model in (None, f["model"])]
        if len(fit) != 1:
            found = f"{len(fit)} {kinds[0]}s{f' of {model}' if model else ''}: {', '.join(fit) or 'none'}"
            raise ValueError(f"pretrained=True takes the only weights there are, but there ship {found}; name some")
        pretrained = fit[0]
    weights, facts = load_pretrained(pretrained)
    if facts["kind"] not in kinds:
        how = {"classifier": "create_model", "segmenter": "create_segmenter"}[facts["kind"]]
        also = " (features_only=True takes its backbone)" if kinds == ("classifier",) else ""
        raise ValueError(f"{pretrained!r} are weights of a {facts['kind']}: use {how}(pretrained={pretrained!r}){also}")
    if model not in (None, facts["model"]):
        raise ValueError(f"the weights {pretrained!r} are of {facts['model']}, not of {model}")
    return pretrained, weights, facts


def settled(name, fields, overrides):
    """Return the fields of a config that weights were trained with, and the overrides that they leave open.

    Raises
    ------
    ValueError
        An override that contradicts the weights.
    """
    for key, value in overrides.items():
        plain = list(value) if isinstance(value, tuple) else value
        if key not in _FREE and plain != fields[key]:
            raise ValueError(
                f"{key}={value!r} contradicts the weights {name!r}, which were trained with {fields[key]!r}: "
                f"leave it out, or make the model without pretrained"
            )
    return fields | overrides


def put(model, weights):
    """Load a state dict into a model, whose classifier stays as created where it is for another number of classes."""
    fresh = model.state_dict()
    kept = {
        name: value
        for name, value in weights.items()
        if not name.startswith(CLASSIFIERS) or (name in fresh and fresh[name].shape == value.shape)
    }
    model.load_state_dict({name: fresh[name] for name in fresh if name.startswith(CLASSIFIERS)} | kept)
    return model


def backbone_weights(weights, model):
    """Return a feature extractor's state dict from that of a segmenter or classifier; a classifier has no ``norms``."""
    inner = {name.removeprefix("backbone."): value for name, value in weights.items() if name.startswith("backbone.")}
    plain = {name: value for name, value in weights.items() if not name.startswith(("norm.", "head."))}
    return {n: v for n, v in model.state_dict().items() if n.startswith("norms.")} | (inner or plain)


def _sums():
    """SHA-256 by file name."""
    path = FOLDER / SUMS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {file: checksum for checksum, _, file in (line.partition("  ") for line in lines)}


def _kind_of(name):
    facts = _read(FOLDER / f"{name}{SUFFIX}")[1] if (FOLDER / f"{name}{SUFFIX}").is_file() else {}
    return f"{facts['kind']}, {facts['model']}" if facts else "missing"


def _read(path):
    """Weights and facts of a file known to be ours: 8 bytes of the header's length, the header, the numbers."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header, weights = json.loads(data[8:start]), {}
    facts = json.loads(header.pop("__metadata__")[HEADER])
    for name, place in header.items():
        first, last = place["data_offsets"]
        dtype = _DTYPES[place["dtype"]]
        numbers = torch.frombuffer(bytearray(data[start + first : start + last]), dtype=dtype)
        tensor = numbers.reshape(place["shape"])
        weights[name] = tensor.float() if tensor.is_floating_point() else tensor
    return weights, facts
