"""The rule of parity, and the table of what was compared, printed at the end of a run.

Discrete results must be equal, every element. A continuous result is accepted if

    max|fast - oracle|  <=  factor x max|baseline - oracle|  +  16 eps max|oracle|

where the oracle is the reference in float64 on inputs rounded to the tested dtype, the baseline is the same formula in
plain PyTorch in the tested dtype, and eps is that dtype's. The factor is 2, and 3 for gradients.
"""

import json
from dataclasses import dataclass

import numpy as np
import torch

FLOOR = 16  # in eps of the tested dtype, relative to the largest value
GRADIENT = 3  # factor for gradients
KINDS = {torch.bool: "b", torch.int64: "i", torch.float64: "f"}  # of results that must be equal


@dataclass
class Row:
    """What was compared of one algorithm, in one dtype on one device."""

    cases: int = 0
    worst: float | None = None  # error / allowed error; None: nothing continuous
    equal: int = 0
    compared: int = 0

    def add(self, other):
        """Take in what another process compared."""
        self.cases += other.cases
        self.equal += other.equal
        self.compared += other.compared
        if other.worst is not None:
            self.worst = max(self.worst or 0.0, other.worst)


class Table:
    """Rows by (algorithm, dtype, device)."""

    def __init__(self):
        self.rows = {}

    def row(self, algorithm, values):
        """Return the row of an algorithm for the dtype and device of the tensor ``values``, new if need be."""
        key = (algorithm, str(values.dtype).removeprefix("torch."), values.device.type)
        return self.rows.setdefault(key, Row())

    def pack(self):
        """Return all rows as one json text."""
        return json.dumps([[key, vars(row)] for key, row in self.rows.items()], default=lambda value: value.item())

    def add(self, packed):
        """Take in the packed rows of another process."""
        for key, row in json.loads(packed):
            self.rows.setdefault(tuple(key), Row()).add(Row(**row))

    def lines(self):
        """The table as text, one line a row, sorted."""
        heading = "{:38} {:9} {:6} {:>5}  {:>21}  {}"
        yield heading.format("algorithm", "dtype", "device", "cases", "worst error / allowed", "indices equal")
        for key, row in sorted(self.rows.items()):
            worst = "-" if row.worst is None else f"{row.worst:.3f}"
            equal = f"{row.equal} of {row.compared}" if row.compared else "-"
            yield heading.format(*key, row.cases, worst, equal)


TABLE = Table()  # of this test session


def assert_parity(fast, oracle, baseline, dtype, factor=2, *, name="result", table=TABLE):
    """Accept a continuous result by the rule at the top of this file, or say what is wrong with it.

    Parameters
    ----------
    fast : tensor
        The result to compare.
    oracle : float64 array
    baseline : tensor or array
    dtype : torch.dtype
        The tested dtype; ``fast`` must have it.
    factor : float
    name : str
        Algorithm, and layer after a colon; the part before the colon names the row of the table.
    table : Table

    Raises
    ------
    AssertionError
        Another shape or dtype, a value that is not finite, or an error larger than allowed: the message names the first
        element at fault.
    ValueError
        An oracle or baseline that tells nothing: not finite, misshapen, or a baseline off by more than sqrt(eps).
    """
    oracle = np.asarray(oracle, dtype=np.float64)
    _check_form(fast, oracle.shape, dtype, name)
    eps, largest = torch.finfo(dtype).eps, np.abs(oracle).max(initial=0.0)
    allowed = factor * _baseline_error(oracle, baseline, eps, largest, name) + FLOOR * eps * largest
    values = _float64(fast)
    error = np.abs(values - oracle)
    wrong = ~(error <= allowed)  # also true where NaN
    row = table.row(name.split(":")[0], fast)
    row.cases += 1
    ratio = error.max(initial=0.0) / allowed if allowed > 0 else float(wrong.any())
    row.worst = max(row.worst or 0.0, ratio)
    if wrong.any():
        first = tuple(np.argwhere(wrong)[0].tolist())
        raise AssertionError(
            f"{name}: {wrong.sum()} of {wrong.size} elements are off; the first, {first}, is {values[first]!r}, not "
            f"{oracle[first]!r} (largest error {error.max():.3g}, allowed {allowed:.3g})"
        )


def assert_layers(fast, oracle, baseline, dtype, factor=2, *, name, table=TABLE):
    """Compare dicts of layers in the order of ``oracle``, so that the first layer that differs is the one named."""
    if set(fast) != set(oracle):
        raise AssertionError(f"{name}: layers {sorted(fast)} instead of {sorted(oracle)}")
    for layer, expected in oracle.items():
        assert_parity(fast[layer], expected, baseline[layer], dtype, factor, name=f"{name}: {layer}", table=table)


def assert_equal(fast, expected, *, name="result", table=TABLE):
    """Accept a discrete result (int64, bool, or float64 to the bit) only if every element is equal.

    Raises
    ------
    AssertionError
        Another shape or kind of dtype, or a difference: the message names the first element at fault.
    """
    expected = np.asarray(expected)
    if KINDS.get(fast.dtype) != expected.dtype.kind:
        raise AssertionError(f"{name}: dtype {fast.dtype} instead of {expected.dtype}")
    _check_form(fast, expected.shape, fast.dtype, name)
    values = fast.detach().cpu().numpy()
    same = values == expected
    row = table.row(name.split(":")[0], fast)
    row.cases, row.equal, row.compared = row.cases + 1, row.equal + int(same.sum()), row.compared + same.size
    if not same.all():
        first = tuple(np.argwhere(~same)[0].tolist())
        raise AssertionError(
            f"{name}: {(~same).sum()} of {same.size} elements differ; the first, {first}, is {values[first]!r}, not "
            f"{expected[first]!r}"
        )


def count_equal(fast, expected, *, name, table=TABLE):
    """Enter a choice in the table without judging it; return how many of ``expected`` are not in ``fast``.

    For choices that follow floating-point scores end to end: (K,) token numbers, compared as sets.
    """
    flipped = len(set(expected.tolist()) - set(fast.tolist()))
    row = table.row(name, fast)
    row.cases, row.compared, row.equal = (
        row.cases + 1,
        row.compared + len(expected),
        row.equal + len(expected) - flipped,
    )
    return flipped


def _check_form(fast, shape, dtype, name):
    if tuple(fast.shape) != tuple(shape):
        raise AssertionError(f"{name}: shape {tuple(fast.shape)} instead of {tuple(shape)}")
    if fast.dtype != dtype:
        raise AssertionError(f"{name}: dtype {fast.dtype} instead of {dtype}")


def _baseline_error(oracle, baseline, eps, largest, name):
    baseline = _float64(baseline)
    if baseline.shape != oracle.shape:
        raise ValueError(f"{name}: the baseline has shape {baseline.shape}, the oracle {oracle.shape}")
    error = np.abs(baseline - oracle).max(initial=0.0)
    if not (np.isfinite(largest) and error <= eps**0.5 * largest):
        raise ValueError(f"{name}: a baseline off by {error:.3g} where values reach {largest:.3g} proves nothing")
    return error


def _float64(values):
    return np.asarray(values.detach().double().cpu() if torch.is_tensor(values) else values, dtype=np.float64)
