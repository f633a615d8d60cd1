"""The comparer refuses planted errors and accepts right results: else nothing here proves anything."""

import numpy as np
import pytest
import torch

from parity_tests.cases import DTYPES, Case
from parity_tests.compare import Table, assert_equal, assert_layers, assert_parity, count_equal

RNG = np.random.default_rng(0)
ORACLE = RNG.standard_normal((6, 5, 5))


def correct(dtype):
    """A right result: rounded once, and off by one more unit in the last place here and there."""
    result = torch.from_numpy(ORACLE).to(dtype)
    result[::2] *= 1 + torch.finfo(dtype).eps
    return result


PLANTED = {
    "off_by_one_index": lambda x: x.roll(1, dims=1),
    "transposed_axes": lambda x: x.transpose(1, 2),
    "wrong_scale": lambda x: x * 1.001,
    "one_bias_left_out": lambda x: torch.cat([x[:-1], x[-1:] - 0.01]),
    "one_wrong_sign": lambda x: torch.where(torch.arange(x.numel()).view_as(x) == 77, -x, x),
    "one_nan": lambda x: torch.where(torch.arange(x.numel()).view_as(x) == 77, torch.nan, x),
    "one_infinity": lambda x: torch.where(torch.arange(x.numel()).view_as(x) == 77, torch.inf, x),
    "unwritten_row": lambda x: torch.cat([x[:-1], torch.full_like(x[-1:], torch.nan)]),
    "zeros": torch.zeros_like,
    "wrong_shape": lambda x: x[:-1],
    "batch_axis_lost": lambda x: x[0],
    "wrong_dtype": lambda x: x.to(torch.float16),
}
COARSE = {"wrong_scale", "one_bias_left_out"}  # below what bfloat16 resolves


def check(fast, dtype, factor=2, baseline=None):
    baseline = torch.from_numpy(ORACLE).to(dtype) if baseline is None else baseline
    assert_parity(fast, ORACLE, baseline, dtype, factor, table=Table())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_right_results_are_accepted(dtype):
    check(correct(dtype), dtype)
    check(correct(dtype), dtype, factor=3)


@pytest.mark.parametrize(
    "error, dtype", [(e, d) for e in PLANTED for d in DTYPES if not (e in COARSE and d == torch.bfloat16)], ids=str
)
def test_planted_errors_are_refused(error, dtype):
    with pytest.raises(AssertionError, match="result: "):
        check(PLANTED[error](correct(dtype)), dtype)


@pytest.mark.parametrize("share, accepted", [(0.99, True), (1.01, False)])
@pytest.mark.parametrize("factor", [2, 3])
def test_limit_is_the_rule(factor, share, accepted):
    oracle, baseline = np.array([1.0, 100.0]), np.array([1.0 + 1e-3, 100.0])
    allowed = factor * 1e-3 + 16 * torch.finfo(torch.float32).eps * 100
    fast = torch.tensor([1 + share * allowed, 100.0])
    if accepted:
        assert_parity(fast, oracle, baseline, torch.float32, factor, table=Table())
    else:
        with pytest.raises(AssertionError, match=r"1 of 2 elements are off; the first, \(0,\)"):
            assert_parity(fast, oracle, baseline, torch.float32, factor, table=Table())


def test_a_bad_baseline_or_oracle_is_an_error_of_the_test():
    fast = correct(torch.float32)
    for baseline in (ORACLE * 1.01, ORACLE[:-1], np.where(ORACLE > 1, np.nan, ORACLE)):
        with pytest.raises(ValueError, match="baseline"):
            check(fast, torch.float32, baseline=baseline)


def test_first_differing_element_and_layer_are_named():
    right = {"first": correct(torch.float32), "second": correct(torch.float32)}
    oracle, baseline = dict.fromkeys(right, ORACLE), dict.fromkeys(right, torch.from_numpy(ORACLE).float())
    assert_layers(right, oracle, baseline, torch.float32, name="block", table=Table())
    wrong = {"first": right["first"], "second": right["second"].clone()}
    wrong["second"][2, 3, 4] += 1
    with pytest.raises(AssertionError, match=r"block: second: 1 of 150 .* \(2, 3, 4\)"):
        assert_layers(wrong, oracle, baseline, torch.float32, name="block", table=Table())
    with pytest.raises(AssertionError, match="layers"):
        assert_layers({"first": right["first"]}, oracle, baseline, torch.float32, name="block", table=Table())


@pytest.mark.parametrize(
    "planted",
    [
        lambda x: x + (x == 7),
        lambda x: x.flip(0),
        lambda x: x[:-1],
        lambda x: x.int(),
        lambda x: x.double(),
        lambda x: x > 3,
    ],
    ids=["off_by_one", "flipped", "wrong_shape", "int32", "float", "bool"],
)
def test_discrete_results_must_be_equal(planted):
    expected = np.arange(20).reshape(4, 5)
    assert_equal(torch.from_numpy(expected), expected, table=Table())
    with pytest.raises(AssertionError, match="result: "):
        assert_equal(planted(torch.from_numpy(expected)), expected, table=Table())


def test_ratios_must_be_equal_to_the_last_bit():
    expected = np.array([0.1, 0.5])
    with pytest.raises(AssertionError, match="1 of 2"):
        assert_equal(torch.from_numpy(np.nextafter(expected, [1, 0.5])), expected, table=Table())


def test_table_counts_cases_errors_and_indices():
    table = Table()
    assert_parity(correct(torch.float32), ORACLE, correct(torch.float32), torch.float32, name="gelu", table=table)
    assert_parity(correct(torch.float32), ORACLE, correct(torch.float32), torch.float32, name="gelu: b", table=table)
    assert_equal(torch.arange(4), np.arange(4), name="ranks", table=table)
    assert count_equal(torch.tensor([1, 2, 5]), np.array([1, 2, 3]), name="choice", table=table) == 1
    lines = [line.split() for line in table.lines()]
    assert lines[0][:4] == ["algorithm", "dtype", "device", "cases"]
    assert lines[1][:4] == ["choice", "int64", "cpu", "1"] and lines[1][-3:] == ["2", "of", "3"]
    assert lines[2][:4] == ["gelu", "float32", "cpu", "2"] and 0 < float(lines[2][4]) < 1
    assert lines[3][-3:] == ["4", "of", "4"]


def test_cases_are_deterministic_and_hold_ties():
    case = Case("example", (16, 16), 64, batch=3)
    positions = case.positions()
    assert positions.shape == (3, 64, 2) and (positions == case.positions()).all()
    assert not (positions[0] == positions[1]).all()
    gaps = ((positions[0][:, None] - positions[0]) ** 2).sum(-1)
    assert len(np.unique(gaps)) < 0.1 * gaps.size


def test_tables_of_several_processes_add_up():
    one, other = Table(), Table()
    for table, error in ((one, 0.25), (other, 0.5)):
        row = table.row("sum", torch.zeros(1))
        row.cases, row.worst = 2, np.float64(error)
    other.row("order", torch.zeros(1, dtype=torch.int64)).equal = np.int64(3)
    one.add(other.pack())
    assert list(one.rows) == [("sum", "float32", "cpu"), ("order", "int64", "cpu")]
    assert [(row.cases, row.worst, row.equal) for row in one.rows.values()] == [(4, 0.5, 0), (0, None, 3)]
