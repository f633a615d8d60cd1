"""Checkpoint files of torch.save, safetensors and pickled NumPy arrays, read as tensors and plain containers.

Everything is checked against the bytes there are before memory is taken: time and memory grow with the file and with
nothing that it says. What a zip file holds is compared with its checksums.
"""

import mmap
import os
import zipfile
from pathlib import Path

import numpy as np
import torch

from . import plain_pickle
from .plain_pickle import COPIES, Array, Broken, Dtype, Name, Refused, Stored, shown

MOST_VALUES = 500_000  # of a file, each counted as often as it is named
DEEPEST = 64  # containers in containers
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # at the beginning of torch.save's files before version 1.6


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or whose keys or weights are not those of an AutoFocusFormer."""


def load(path):
    """Read a checkpoint file without running anything in it.

    Parameters
    ----------
    path : str or Path
        A file of ``torch.save``, a pickle of arrays as detectron2 writes it (``*.pkl``) or, with safetensors installed,
        ``*.safetensors``.

    Returns
    -------
    dict
        What the file holds, on the CPU: tensors and plain containers with strings and whole numbers as keys. Arrays and
        NumPy's numbers come back as tensors and numbers; a configuration (as the official classification files carry)
        as a dict.

    Raises
    ------
    FileNotFoundError
        No such file.
    CheckpointError
        A file that is truncated or corrupted, that would run code to be read, that holds no dict, NaN, infinite or
        complex numbers, or more than 500,000 values. The message is one line with the file's name and the reason.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a string or a path, not {type(path).__name__}")
    path = Path(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"no checkpoint at {path if str(path).isprintable() and len(str(path)) < 1000 else shown(str(path))}"
        )
    try:
        content = (_load_safetensors if path.suffix == ".safetensors" else _load)(path)
    except Broken as error:
        raise CheckpointError(f"{path} is truncated or corrupted ({error})") from None
    except Refused as error:
        raise CheckpointError(f"{path} was refused: {error}") from None
    except (ImportError, CheckpointError):
        raise
    except Exception as error:  # of the libraries: bytes at random raise nearly anything
        reason = shown(" ".join(str(error).split()) or type(error).__name__)
        raise CheckpointError(f"{path} is truncated or corrupted ({reason})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    return content


def _load(path):
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return _load_zip(archive, path.stat().st_size)
    with path.open("rb") as file:
        if file.read(1) != b"\x80":  # the first instruction of every pickle that is read
            raise Broken("it begins neither as a pickle nor as a zip file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            value, end, _ = plain_pickle.read(data)
            if type(value) is int and value == _MAGIC:
                return _load_old(data, end)
            return _Plain(len(data)).value(value)


def _load_zip(archive, size):
    """A file of torch.save: a folder that holds data.pkl and, in data/, the storages."""
    members = archive.infolist()
    if any(each.compress_type != zipfile.ZIP_STORED for each in members) or sum(m.file_size for m in members) > size:
        raise Refused("its parts are packed, or are larger together than the file")
    pickles = [each.filename for each in members if each.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Refused("it is a zip file, but not of torch.save")
    folder = pickles[0].removesuffix("data.pkl")
    if folder + "byteorder" in archive.namelist() and archive.read(folder + "byteorder") != b"little":
        raise Refused("its numbers are in another byte order")

    def bytes_of(storage):
        try:
            member = archive.getinfo(f"{folder}data/{storage.key}")
        except KeyError:
            raise Broken(f"its part data/{shown(storage.key)} is missing") from None
        if member.file_size != storage.size:
            raise Broken(f"its part data/{shown(storage.key)} has {member.file_size} bytes, not {storage.size}")
        return archive.read(member)

    data = archive.read(pickles[0])
    return _Plain(size, bytes_of).value(plain_pickle.read(data)[0])


def _load_old(data, at):
    """A file of torch.save before version 1.6: five pickles, the last the storages' keys, then the storages."""
    protocol, at, _ = plain_pickle.read(data, at)
    system, at, _ = plain_pickle.read(data, at)
    if protocol != _PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("it is of another version or byte order")
    content, at, storages = plain_pickle.read(data, at)
    keys, at, _ = plain_pickle.read(data, at)
    if type(keys) is not list or not all(type(key) is str for key in keys) or set(keys) != set(storages):
        raise Broken("the numbers that it lists are not those that it names")
    starts = {}
    for storage in (storages[key] for key in keys):
        starts[storage.key] = at + 8
        if int.from_bytes(data[at : at + 8], "little") != storage.length or len(data) - at - 8 < storage.size:
            raise Broken("it is truncated, or its numbers are not where they belong")
        at += 8 + storage.size
    return _Plain(len(data), lambda storage: data[starts[storage.key] : starts[storage.key] + storage.size]).value(
        content
    )


def _load_safetensors(path):
    try:
        import safetensors  # noqa: F401
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError("reading .safetensors needs the package safetensors: pip install safetensors") from None
    weights = load_file(path)
    for name, tensor in weights.items():
        check_numbers(name, tensor)
    return weights


class _Plain:
    """Makes plain containers and tensors of what ``plain_pickle.read`` gave.

    Parameters
    ----------
    size : int
        Bytes of the file.
    bytes_of : callable, optional
        Gives the bytes of a Storage.
    """

    def __init__(self, size, bytes_of=None):
        self.left, self.count, self.bytes_of, self.made = COPIES * size + 2**20, 0, bytes_of, {}

    def value(self, value, place=None, depth=0):
        """Copy a value; ``place`` is (the place of its container, its key), put together only for a message."""
        self.count += 1
        if self.count > MOST_VALUES or depth > DEEPEST:
            raise Refused(f"it holds more than {MOST_VALUES:,} values, or containers nested more than {DEEPEST} deep")
        kind = type(value)
        if kind is dict:
            return {key: self.value(each, (place, key), depth + 1) for key, each in value.items()}
        if kind in (list, tuple):
            return kind([self.value(each, (place, i), depth + 1) for i, each in enumerate(value)])
        if kind in (set, str, int, float, bool, bytes, type(None)):
            return value
        if kind is Stored:
            return self.storage(value, place).as_strided(value.size, value.stride, value.offset)
        if kind is Array:
            return self.array(value, place)
        if kind is Name and value.text in plain_pickle.DTYPES:
            return getattr(torch, plain_pickle.DTYPES[value.text])
        if kind is Dtype:
            return np.dtype(value.code)
        raise Refused(f"its {_named(place)} is {shown(getattr(value, 'text', kind.__name__))}, which is no value")

    def storage(self, value, place):
        """The numbers of a Stored's storage, (length,), read once."""
        key = (value.storage.key, value.dtype)
        if key not in self.made:
            data = bytearray(self.bytes_of(value.storage))
            self.made[key] = check_numbers(_named(place), _tensor(data, value.dtype))
        return self.made[key]

    def array(self, value, place):
        """A tensor of an Array, or a number of one without shape."""
        if value.data is None:
            raise Refused(f"its {_named(place)} is an array that is never filled")
        if id(value) not in self.made:
            self.left -= len(value.data)
            if self.left < 0:
                raise Refused("its arrays are larger together than the file")
            order, code = ">" if value.dtype.swapped else "<", value.dtype.code
            numbers = np.frombuffer(value.data, order + code.replace("b", "u"))
            numbers = numbers != 0 if code == "b1" else numbers.astype(code)
            if value.shape is None:
                self.made[id(value)] = numbers.item()
            else:
                shaped = numbers.reshape(value.shape, order="F" if value.columns_first else "C")
                self.made[id(value)] = check_numbers(_named(place), torch.from_numpy(np.array(shaped, order="C")))
        return self.made[id(value)]


def _tensor(data, dtype):
    """A bytearray as numbers; of truth values, every byte but 0 is true."""
    if not data:
        return torch.empty(0, dtype=getattr(torch, dtype))
    if dtype == "bool":
        return torch.frombuffer(data, dtype=torch.uint8) != 0
    return torch.frombuffer(data, dtype=getattr(torch, dtype))


def _named(place):
    """A place as "model.norm.weight"."""
    names = []
    while place:
        place, name = place
        names.append(shown(str(name)))
    return ".".join(reversed(names)) or "content"


def check_numbers(name, tensor):
    """Refuse numbers that are not of the dtypes read, or not finite; else give them back."""
    if str(tensor.dtype).removeprefix("torch.") not in plain_pickle.SIZES:
        raise Refused(
            f"its {shown(name)} holds numbers of {tensor.dtype}; what is read is {', '.join(plain_pickle.SIZES)}"
        )
    if not is_finite(tensor):
        raise Refused(f"its {shown(name)} holds NaN or infinite numbers")
    return tensor


def is_finite(tensor):
    """Whether no number of a tensor is NaN or infinite; true of those without numbers or memory."""
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor.detach()))
