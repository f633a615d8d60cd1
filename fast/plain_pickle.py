"""Pickles read as plain values: an interpreter of pickle's instructions that calls nothing a file names.

A pickle is a program for a stack machine; an unpickler that imports and calls what the program names runs whatever its
author wants. Here a name is a key of a fixed table of functions of this file, each of which checks its arguments and
makes a plain value: a container, a number, or a note (``Stored``, ``Array``) of where the numbers of a tensor lie.
Nothing is allocated that the file itself does not hold, and no instruction changes anything but those values.
"""

import struct
from dataclasses import dataclass
from math import prod

MOST_INSTRUCTIONS = 500_000  # of one pickle; a checkpoint of 1,000 tensors has some 40,000
MOST_BYTES = 64  # of one whole number
MOST_AXES = 16
MOST_LENGTH = 2**31  # of an axis, and of a whole number that is a key
COPIES = 4  # bytes may be copied until they amount to so many times the pickle
SIZES = {  # bytes of one number of each dtype that is read
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "bool": 1,
    "int8": 1, "int16": 2, "int32": 4, "int64": 8, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8,
}  # fmt: skip
STORAGES = {
    "Half": "float16", "BFloat16": "bfloat16", "Float": "float32", "Double": "float64", "Bool": "bool",
    "Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64", "Byte": "uint8",
}  # fmt: skip
STORAGES = {f"torch.{name}Storage": dtype for name, dtype in STORAGES.items()} | {"torch.storage.UntypedStorage": None}
DTYPES = {f"torch.{dtype}": dtype for dtype in SIZES}
CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")  # of NumPy's dtypes


class Refused(ValueError):
    """A pickle that is not read: it would run something, or take too much; the message is about "it", the file."""


class Broken(Refused):
    """A pickle that breaks off or makes no sense."""


@dataclass(frozen=True)
class Name:
    """A global that a pickle names, "module.name"."""

    text: str


@dataclass(frozen=True)
class Storage:
    """Numbers stored beside the pickle: their dtype (None: bytes), key, and how many there are."""

    dtype: str | None
    key: str
    length: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.length * SIZES.get(self.dtype, 1)


@dataclass(frozen=True)
class Stored:
    """A tensor: a part of a Storage."""

    storage: Storage
    dtype: str
    offset: int
    size: tuple
    stride: tuple


@dataclass
class Dtype:
    """A NumPy dtype: its kind and size, as "f8", and whether its bytes are in the other order."""

    code: str
    swapped: bool = False


@dataclass
class Array:
    """A NumPy array: its dtype, shape (None: a number), whether columns come first, and bytes; None until filled."""

    dtype: Dtype | None = None
    shape: tuple | None = ()
    columns_first: bool = False
    data: bytes | None = None


def read(data, start=0):
    """Run a pickle.

    Parameters
    ----------
    data : bytes or mmap
        A file's content.
    start : int
        Where the pickle begins.

    Returns
    -------
    value
        Containers (dict, list, tuple, set), numbers, strings, bytes, Name, Stored, Array, Dtype. Containers may be
        shared and may hold themselves.
    end : int
        Where the pickle ends.
    storages : dict
        Of each key that the pickle names, its Storage.

    Raises
    ------
    Refused
        A name that is not of the fixed table, or too much of something.
    Broken
        An end before its time, instructions that are not read, or arguments that do not fit.
    """
    machine = _Machine(data, start)
    try:
        return machine.run(), machine.at, machine.storages
    except (IndexError, KeyError, TypeError, struct.error, UnicodeError):
        raise Broken(f"its instructions make no sense at byte {machine.at}") from None


def shown(text):
    """Make text of a file fit for a message: printable and short."""
    return "".join(c if c.isprintable() else "?" for c in text[:80]) + ("..." if len(text) > 80 else "")


class _Machine:
    """The stack, the marks, the memo, and one method for each instruction that takes more than a line."""

    def __init__(self, data, start):
        self.data, self.at, self.copied = data, start, 0
        self.stack, self.outer, self.memo, self.storages = [], [], {}, {}

    def run(self):
        for _ in range(MOST_INSTRUCTIONS):
            code = self.take(1)[0]
            if code == ord("."):
                return self.stack.pop()
            if code not in _ACTIONS:
                raise Broken(f"it holds the pickle instruction {bytes([code])!r}, which is not read")
            _ACTIONS[code](self)
        raise Refused(f"its pickle has more than {MOST_INSTRUCTIONS:,} instructions")

    def take(self, count):
        if count > len(self.data) - self.at:
            raise Broken("its pickle breaks off")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form):
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, form):
        return self.take(self.number(form)).decode("utf-8")

    def line(self):
        end = self.data.find(b"\n", self.at, self.at + 200)
        _expect(end >= 0, "the name of a global", "no end of line")
        return self.take(end + 1 - self.at)[:-1].decode("utf-8")

    def spend(self, count):
        """Count bytes that are copied, lest one string that is used often fill the memory."""
        self.copied += count
        if self.copied > COPIES * len(self.data) + 2**20:
            raise Refused("its pickle copies the same bytes again and again")

    def push(self, value):
        self.stack.append(value)

    def mark(self):
        self.outer.append(self.stack)
        self.stack = []

    def to_mark(self):
        items, self.stack = self.stack, self.outer.pop()
        return items

    def name(self, module, name):
        module = _RENAMED.get(module, module).replace("numpy.core.", "numpy._core.")
        text = f"{module}.{name}"
        if text in _NAMES:
            return self.push(Name(text))
        if text.startswith("torch.") and text.endswith("Storage") and name.isidentifier():
            raise Refused(f"it holds numbers of {shown(text)}; what is read is {', '.join(SIZES)}")
        raise Refused(f"reading it would run {shown(text)}; only tensors, arrays and plain containers are read")

    def global_of_stack(self):
        name, module = self.stack.pop(), self.stack.pop()
        _expect(type(name) is str and type(module) is str, "the name of a global", name)
        self.name(module, name)

    def whole(self, count):
        _expect(count <= MOST_BYTES, "a whole number", f"{count} bytes")
        self.push(int.from_bytes(self.take(count), "little", signed=True))

    def put(self, index):
        self.memo[index] = self.stack[-1]

    def pop(self, count):
        _expect(count <= len(self.stack), "a container", "too few values")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def set_items(self, pairs):
        target = self.stack[-1]
        _expect(type(target) is dict and len(pairs) % 2 == 0, "a dict", target)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target[_key(key)] = value

    def append(self, items):
        _expect(type(self.stack[-1]) is list, "a list", self.stack[-1])
        self.stack[-1].extend(items)

    def add(self, items):
        _expect(type(self.stack[-1]) is set, "a set", self.stack[-1])
        self.stack[-1].update(map(_key, items))

    def storage(self):
        storage = _storage(self.stack.pop())
        _expect(self.storages.setdefault(storage.key, storage) == storage, "a storage named before", storage.key)
        self.push(storage)

    def new(self):
        arguments, name = self.stack.pop(), self.stack.pop()
        _expect(type(name) is Name and name.text in _DICTS and arguments == (), "a new object", name)
        self.push({})

    def reduce(self):
        arguments, name = self.stack.pop(), self.stack.pop()
        known = type(name) is Name and name.text in _FUNCTIONS
        _expect(known and type(arguments) is tuple, "a function and its arguments", name)
        self.push(_FUNCTIONS[name.text](self, *arguments))

    def build(self):
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Array:
            _fill_array(target, state)
        elif type(target) is Dtype:
            _set_order(target, state)
        else:  # attributes, as yacs and torch put on their dicts: of no use here
            _expect(type(target) is dict, "an object with attributes", target)


def _expect(holds, what, value):
    """Refuse a value that is not what it should be, without looking into it: it may be huge, or hold itself."""
    if not holds:
        given = value.text if type(value) is Name else value if type(value) is str else type(value).__name__
        raise Broken(f"it gives {shown(given)!r} for {what}")


def _key(key):
    """Take strings and whole numbers that are not large as keys: the hashes of others can be made to collide."""
    _expect(type(key) is str or (type(key) in (int, bool) and abs(key) < MOST_LENGTH), "a key", key)
    return key


def _shape(shape):
    """Take a few lengths of axes, none of them huge, as a tuple."""
    few = type(shape) in (tuple, list) and len(shape) <= MOST_AXES
    _expect(few and all(type(n) is int and 0 <= n < MOST_LENGTH for n in shape), "the lengths of axes", shape)
    return tuple(shape)


def _storage(identity):
    """("storage", type, key, location, length[, None]) -> Storage."""
    form = type(identity) is tuple and len(identity) in (5, 6) and type(identity[0]) is str and identity[0] == "storage"
    _expect(form and identity[5:] in ((), (None,)), "a storage", identity)
    kind, key, length = identity[1], identity[2], identity[4]
    _expect(type(kind) is Name and kind.text in STORAGES, "the type of a storage", kind)
    _expect(type(key) is str and type(length) is int and length >= 0, "the key and length of a storage", key)
    return Storage(STORAGES[kind.text], key, length)


def _tensor(machine, storage, offset, size, stride, requires_grad=False, hooks=None, last=None):
    """torch._utils._rebuild_tensor, _v2 (last: attributes) and _v3 (last: the dtype)."""
    _expect(type(storage) is Storage and not hooks and type(offset) is int and offset >= 0, "a tensor", storage)
    dtype = storage.dtype
    if dtype is None:
        _expect(type(last) is Name and last.text in DTYPES, "the dtype of a tensor", last)
        dtype = DTYPES[last.text]
    else:
        _expect(not last, "further attributes of a tensor", last)
    size, stride = _shape(size), _shape(stride)
    _expect(len(size) == len(stride), "the strides of a tensor", stride)
    last_one = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else offset - 1
    there = storage.size // SIZES[dtype]
    _expect(max(last_one + 1, prod(size)) <= there, "the place of a tensor in its storage", str(size))
    return Stored(storage, dtype, offset, size, stride)


def _parameter(machine, tensor, requires_grad, hooks):
    """torch._utils._rebuild_parameter."""
    _expect(type(tensor) is Stored and not hooks, "a parameter", tensor)
    return tensor


def _dict(machine, pairs=()):
    """collections.OrderedDict, of nothing or of a list of pairs, as Python 2 wrote it."""
    _expect(type(pairs) in (list, tuple), "the items of a dict", pairs)
    _expect(all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs), "the items of a dict", pairs)
    machine.spend(8 * len(pairs))
    return {_key(key): value for key, value in pairs}


def _set(machine, items=()):
    """set and frozenset."""
    _expect(type(items) in (list, tuple), "the items of a set", items)
    machine.spend(8 * len(items))
    return set(map(_key, items))


def _bytes(machine, text="", encoding="latin1"):
    """bytes() and _codecs.encode(text, "latin1"), the forms in which old protocols hold bytes."""
    _expect(type(text) is str and encoding in ("latin1", "latin-1"), "text that stands for bytes", text)
    machine.spend(len(text))
    return text.encode("latin1")


def _size(machine, lengths=()):
    """torch.Size, a tuple."""
    return _shape(lengths)


def _device(machine, kind, number=0):
    """torch.device, its name."""
    _expect(type(kind) is str, "a device", kind)
    return kind


def _dtype(machine, code, align=False, copy=True):
    """numpy.dtype: from a fixed list, whatever else the file says of it."""
    _expect(type(code) is str and code in CODES, "a NumPy dtype", code)
    return Dtype(code)


def _set_order(dtype, state):
    """The state of a NumPy dtype, which for those of the list is a byte order and nothing else."""
    form = type(state) is tuple and len(state) == 8 and all(type(each) in (int, str, type(None)) for each in state)
    _expect(form and (state[0], *state[2:]) == (3, None, None, None, -1, -1, 0), "the state of a dtype", state)
    _expect(state[1] in ("<", ">", "|", "="), "a byte order", state[1])
    dtype.swapped = state[1] == ">"


def _array(machine, kind, shape, code):
    """numpy._core.multiarray._reconstruct: an array to be filled."""
    _expect(type(kind) is Name and kind.text == "numpy.ndarray", "the type of an array", kind)
    return Array()


def _fill_array(array, state):
    """The state of an array: (1, shape, dtype, columns first, bytes)."""
    _expect(type(state) is tuple and len(state) == 5 and array.data is None, "the state of an array", state)
    _, shape, dtype, columns_first, data = state
    _set_array(array, shape, dtype, columns_first is True, data.encode("latin1") if type(data) is str else data)


def _array_of_bytes(machine, data, dtype, shape, order):
    """numpy._core.numeric._frombuffer, which protocol 5 calls."""
    _expect(order in ("C", "F"), "the order of an array", order)
    array = Array()
    _set_array(array, shape, dtype, order == "F", data)
    return array


def _set_array(array, shape, dtype, columns_first, data):
    _expect(type(dtype) is Dtype, "the dtype of an array", dtype)
    _expect(type(data) is bytes, "the bytes of an array", data)
    shape = _shape(shape)
    _expect(prod(shape) * int(dtype.code[1]) == len(data), f"the shape of an array of {len(data)} bytes", str(shape))
    array.dtype, array.shape, array.columns_first, array.data = dtype, shape, columns_first, data


def _scalar(machine, dtype, data):
    """numpy._core.multiarray.scalar: a number."""
    array = Array()
    _set_array(array, (), dtype, False, data.encode("latin1") if type(data) is str else data)
    array.shape = None
    return array


_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2's modules
_DICTS = ("collections.OrderedDict", "yacs.config.CfgNode")
_FUNCTIONS = {
    **dict.fromkeys(_DICTS, _dict),
    **dict.fromkeys(["builtins.set", "builtins.frozenset"], _set),
    **dict.fromkeys(["builtins.bytes", "builtins.bytearray", "_codecs.encode"], _bytes),
    **{f"torch._utils._rebuild_{name}": _tensor for name in ("tensor", "tensor_v2", "tensor_v3")},
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "numpy.dtype": _dtype,
    "numpy._core.multiarray._reconstruct": _array,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _array_of_bytes,
}
_NAMES = {*_FUNCTIONS, *STORAGES, *DTYPES, "numpy.ndarray"}
_ACTIONS = {
    b"\x80": lambda m: m.take(1),  # protocol
    b"\x95": lambda m: m.take(8),  # length of a frame
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": lambda m: m.whole(m.number("<B")),
    b"\x8b": lambda m: m.whole(m.number("<I")),
    b"G": lambda m: m.push(m.number(">d")),
    b"X": lambda m: m.push(m.text("<I")),
    b"\x8c": lambda m: m.push(m.text("<B")),
    b"\x8d": lambda m: m.push(m.text("<Q")),
    b"U": lambda m: m.push(m.take(m.number("<B")).decode("latin1")),  # Python 2's strings
    b"T": lambda m: m.push(m.take(m.number("<I")).decode("latin1")),
    b"C": lambda m: m.push(m.take(m.number("<B"))),
    b"B": lambda m: m.push(m.take(m.number("<I"))),
    b"\x8e": lambda m: m.push(m.take(m.number("<Q"))),
    b"\x96": lambda m: m.push(m.take(m.number("<Q"))),  # a bytearray
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"\x8f": lambda m: m.push(set()),
    b"(": lambda m: m.mark(),
    b"t": lambda m: m.push(tuple(m.to_mark())),
    b"\x85": lambda m: m.push(tuple(m.pop(1))),
    b"\x86": lambda m: m.push(tuple(m.pop(2))),
    b"\x87": lambda m: m.push(tuple(m.pop(3))),
    b"a": lambda m: m.append(m.pop(1)),
    b"e": lambda m: m.append(m.to_mark()),
    b"s": lambda m: m.set_items(m.pop(2)),
    b"u": lambda m: m.set_items(m.to_mark()),
    b"\x90": lambda m: m.add(m.to_mark()),
    b"\x91": lambda m: m.push(_set(m, m.to_mark())),
    b"0": lambda m: m.pop(1),
    b"1": lambda m: m.to_mark(),
    b"q": lambda m: m.put(m.number("<B")),
    b"r": lambda m: m.put(m.number("<I")),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"h": lambda m: m.push(m.memo[m.number("<B")]),
    b"j": lambda m: m.push(m.memo[m.number("<I")]),
    b"c": lambda m: m.name(m.line(), m.line()),
    b"\x93": lambda m: m.global_of_stack(),
    b"Q": lambda m: m.storage(),
    b"\x81": lambda m: m.new(),
    b"R": lambda m: m.reduce(),
    b"b": lambda m: m.build(),
}
_ACTIONS = {code[0]: action for code, action in _ACTIONS.items()}
