"""What functions ask of their arguments, and one line that says what was given instead.

Checks of sizes and arrays are left out where torch.compile traces: sizes may be symbols there.
"""

import math

import torch

LONGEST = 60  # characters of a value in a message
MOST_CELLS = 2**26  # of a grid that is made
FARTHEST = 2**31  # cells from side to side of one that is not
NUMBERS = {  # by _kind_of
    "whole": "i", "real": "f", "real or whole": "fi", "true or false": "b",
}  # fmt: skip


def _kind_of(dtype):
    """The kind of a dtype's numbers: f real, i whole, b true or false, c complex."""
    if dtype.is_floating_point or dtype.is_complex:
        return "f" if dtype.is_floating_point else "c"
    return "b" if dtype == torch.bool else "i"


def is_whole(value):
    """Whether a value is a whole number."""
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def is_number(value):
    """Whether a value is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -(10**300) < value < 10**300 if isinstance(value, int) else math.isfinite(value)


def shown(value):
    """Write a value on one line, cut off where it is long."""
    many = is_whole(value) and not -(10**LONGEST) < value < 10**LONGEST
    text = "a number of many digits" if many else " ".join(repr(value).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def check_choice(name, value, known):
    """Refuse a value of the argument ``name`` that is none of the strings ``known``."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {shown(value)}")


def check_whole(name, value, least, most=2**31 - 1):
    """Refuse what is no whole number from ``least`` to ``most``."""
    if torch.compiler.is_compiling():
        return
    if not is_whole(value):
        raise TypeError(f"{name} must be a whole number, not {shown(value)}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be from {least:,} to {most:,}, not {shown(value)}")


def check_number(name, value):
    """Refuse what is no finite number."""
    if not is_number(value):
        kind = ValueError if isinstance(value, float) else TypeError
        raise kind(f"{name} must be a finite number, not {shown(value)}")


def check_sides(name, sides, most=MOST_CELLS):
    """Refuse what is no pair (h, w) of whole numbers, at least 1 each, with at most ``most`` cells."""
    if torch.compiler.is_compiling():
        return
    if not isinstance(sides, tuple | list) or len(sides) != 2 or not all(map(is_whole, sides)):
        raise TypeError(f"{name} must be two whole numbers, height and width, not {shown(sides)}")
    if min(sides) < 1 or sides[0] * sides[1] > most:
        raise ValueError(f"{name} must be at least 1 x 1, of at most {most:,} cells, not {shown(sides)}")


def check_indices(name, indices, count, least=0):
    """Refuse whole numbers that are not from ``least`` to ``count`` - 1; on a CPU only, lest it waits."""
    if torch.compiler.is_compiling() or not (indices.is_cpu and indices.numel()):
        return
    low, high = (int(end) for end in indices.aminmax())
    if not (least <= low and high < count):
        raise ValueError(f"{name} must be from {least} to {count - 1}, not {low} to {high}")


def check_arrays(**arrays):
    """Refuse arrays of other numbers or shapes than are wanted.

    Parameters
    ----------
    **arrays : (array, numbers, axes)
        By argument: what was given, a key of ``NUMBERS``, and a word for each axis, as "n 2" or "... 2". Axes of
        one word have one length, those of a number that one, those of a word with + at least 1; three points stand
        for any axes, of all arrays that have them the same.

    Raises
    ------
    TypeError
        No dense tensor, or one of other numbers.
    ValueError
        Another shape.
    """
    if torch.compiler.is_compiling():  # what is compiled has been called before, or fails there
        return
    lengths = {}
    for name, (array, numbers, axes) in arrays.items():
        if not isinstance(array, torch.Tensor) or array.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, not {shown(type(array).__name__)}")
        if _kind_of(array.dtype) not in NUMBERS[numbers]:
            raise TypeError(f"{name} must hold {numbers} numbers, not {array.dtype}")
        words = axes.split()
        if words[0] == "...":
            first = lengths.setdefault("...", tuple(array.shape[: array.ndim - len(words) + 1]))
            words = [*map(str, first), *words[1:]]
        least = [int(word.endswith("+")) for word in words]
        words = [word.removesuffix("+") for word in words]
        wanted = [int(word) if word.isdigit() else lengths.get(word) for word in words]
        fits = array.ndim == len(words) and all(w in (None, n) for w, n in zip(wanted, array.shape, strict=True))
        fits = fits and all(n >= one for n, one in zip(array.shape, least, strict=True))
        if not fits:
            known = [f"{w} = {n}" for w, n in lengths.items() if w in words or (n and w == axes[:3])]
            shape = f"({', '.join(axes.split())})" + f" with {', '.join(known)}" * bool(known)
            raise ValueError(f"{name} must have shape {shape}, not {tuple(array.shape)}")
        lengths |= {word: n for word, n in zip(words, array.shape, strict=True) if not word.isdigit()}
