"""Linear layers by oneDNN equal PyTorch's own, gradients too, and what is no plain float32 layer is just called."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fast.ops import apply_linear, apply_multihead, dispatch, inner_products, linear, support
from parity_tests.compare import GRADIENT, assert_parity

SHAPES = [(2, 100, 96, 128), (1, 16384, 32, 48), (3, 1, 700, 513), (1, 1, 1024, 1024), (64, 70, 16, 33)]
NO_ONEDNN = not hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture
def taken(monkeypatch):
    """Take oneDNN's path whatever the processor; the list gets an entry for each product."""
    if NO_ONEDNN:
        pytest.skip("this PyTorch has no oneDNN")
    calls, multiply = [], linear._multiply
    monkeypatch.setattr(support, "onednn_unavailable", lambda: None)
    monkeypatch.setattr(linear, "_multiply", lambda *a: calls.append(a) or multiply(*a))
    with dispatch.force(linear="onednn"):
        yield calls


def run(layer, apply, x, grad_out):
    """Return the result and the gradients of x and of the parameters."""
    y = apply(layer, x)
    return [y.detach(), *torch.autograd.grad(y, (x, *layer.parameters()), grad_out)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch, n, channels, out", SHAPES)
def test_result_and_every_gradient_agree(batch, n, channels, out, bias, taken):
    torch.manual_seed(0)
    layer = nn.Linear(channels, out, bias=bias)
    wide = torch.randn(batch, channels, n).transpose(1, 2).requires_grad_()  # rows are not contiguous
    grad_out = torch.randn(batch, n, out)
    found = run(layer, apply_linear, wide, grad_out)
    assert len(taken) >= 2
    baseline = run(layer, lambda layer, x: layer(x), wide, grad_out)
    exact = run(copy.deepcopy(layer).double(), lambda layer, x: layer(x), wide.double(), grad_out.double())
    factors = {"result": 2, "gradient of x": GRADIENT, "of weight": GRADIENT, "of bias": GRADIENT}
    for (name, factor), *three in zip(factors.items(), found, exact, baseline, strict=False):
        assert_parity(*three, torch.float32, factor, name=f"linear: {name}")


ACTIVATIONS = {None: lambda y: y, torch.relu: torch.relu, nn.GELU(): torch.nn.functional.gelu, torch.tanh: torch.tanh}


@pytest.mark.parametrize("with_sum", [False, True], ids=["alone", "sum"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=["none", "relu", "gelu", "tanh"])
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "with_gradients"])
def test_activation_and_sum_are_part_of_the_product(gradients, activation, with_sum, taken):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 96), torch.randn(2, 300, 64)
    add = torch.randn(300, 2, 96).transpose(0, 1) if with_sum else None

    def plainly(layer, x, add=add):
        y = ACTIVATIONS[activation](layer(x))
        return y if add is None else y + add

    with torch.set_grad_enabled(gradients):
        found = apply_linear(layer, x, activation, add)
    exact = plainly(copy.deepcopy(layer).double(), x.double(), None if add is None else add.double())
    assert_parity(found.detach(), exact.detach(), plainly(layer, x).detach(), torch.float32, name="linear: activation")
    assert len(taken) >= (not with_sum or activation is not None or gradients)
    if gradients:
        grad_out = torch.randn_like(found)
        got = torch.autograd.grad(found, layer.parameters(), grad_out)
        exact = torch.autograd.grad(plainly(layer, x), layer.parameters(), grad_out)
        for ours, theirs in zip(got, exact, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_hooked_layers_get_activation_and_sum_and_what_hooks_saw_stays(taken):
    layer, x, seen = nn.Linear(64, 64), torch.randn(300, 64), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    found = apply_linear(layer, x, torch.relu, x)
    assert torch.equal(found, seen[0].relu() + x) and (seen[0] < 0).any() and not taken


@pytest.mark.parametrize("batch, queries, n", [(1, 100, 700), (3, 40, 513), (2, 3, 5), (0, 4, 5)])
def test_rows_times_rows(batch, queries, n, taken):
    torch.manual_seed(0)
    x, y = (torch.randn(batch, rows, 64, requires_grad=True) for rows in (queries, n))
    found, grad_out = inner_products(x, y), torch.randn(batch, queries, n)
    torch.testing.assert_close(found, x @ y.mT, rtol=1e-4, atol=1e-4)
    grads, exact = (torch.autograd.grad(out, (x, y), grad_out) for out in (found, x @ y.mT))
    torch.testing.assert_close(grads, exact, rtol=1e-4, atol=1e-4)
    assert bool(taken) == (batch * queries * n > 1000)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("path", ["onednn", "plain"])
def test_attention_of_all_tokens_is_that_of_the_module(path, masked, taken):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(64, 4, batch_first=True)
    nn.init.normal_(module.in_proj_bias)
    query, key, value = (torch.randn(2, n, 64) for n in (100, 300, 300))
    attn_mask = torch.rand(2, 100, 300) < 0.9 if masked else None
    mask = attn_mask.repeat_interleave(4, dim=0) if masked else None
    with dispatch.force(linear=path):
        found = apply_multihead(module, query, key, value, attn_mask)
    exact, grad_out = module(query, key, value, attn_mask=mask)[0], torch.randn_like(found)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    got, exact = (torch.autograd.grad(out, module.parameters(), grad_out) for out in (found, exact))
    torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-4)
    assert bool(taken) == (path == "onednn")
    module.register_forward_hook(lambda *_: taken.append("hook"))
    torch.testing.assert_close(apply_multihead(module, query, key, value, attn_mask), found, rtol=1e-4, atol=1e-5)
    assert taken[-1] == "hook"


def test_only_the_gradients_that_are_asked_for_are_computed(taken):
    layer, x = nn.Linear(64, 64), torch.randn(300, 64)
    layer.weight.requires_grad_(False)
    (grad,) = torch.autograd.grad(apply_linear(layer, x).sum(), [layer.bias])
    assert grad.tolist() == [300.0] * 64 and len(taken) == 1


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_no_plain_layer_is_called(taken):
    x, layer = torch.randn(300, 64), nn.Linear(64, 64)
    hooked = copy.deepcopy(layer)
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    doubled = Doubled(64, 64)
    doubled.load_state_dict(layer.state_dict())
    assert torch.equal(apply_linear(hooked, x), layer(x) + 1)
    assert torch.equal(apply_linear(doubled, x), 2 * layer(x))
    assert apply_linear(copy.deepcopy(layer).double(), x.double()).dtype == torch.float64
    assert apply_linear(copy.deepcopy(layer).bfloat16(), x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert apply_linear(layer, x).dtype == torch.bfloat16
    assert torch.equal(apply_linear(layer, x[:3]), layer(x[:3])) and not taken
    assert not torch.isnan(apply_linear(layer, x)).any() and len(taken) == 1


def test_the_result_may_be_changed_in_place(taken):
    layer, x = nn.Linear(64, 64), torch.randn(3, 100, 64)
    apply_linear(layer, x).relu_().sum().backward()
    expected = (layer(x).relu() > 0).float().sum(dim=(0, 1))
    assert torch.equal(layer.bias.grad, expected) and taken


def test_pytorch_counts_its_operations(taken):
    layer, x = nn.Linear(64, 128), torch.randn(3, 100, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        apply_linear(layer, x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 300 * 64 * 128 and len(taken) == 3


def test_a_second_derivative_is_refused(taken):
    layer, x = nn.Linear(64, 64), torch.randn(300, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(apply_linear(layer, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_compiling_sees_the_layer_itself(taken):
    layer, x = nn.Linear(64, 64), torch.randn(300, 64)
    found = torch.compile(lambda x: apply_linear(layer, x), fullgraph=True, backend="eager")(x)
    assert torch.equal(found, layer(x)) and not taken


@pytest.mark.parametrize(
    "capability, vendor, reason",
    [
        ("AVX512", "vendor_id : AuthenticAMD", None),
        ("AVX512", "vendor_id : GenuineIntel", "MKL"),
        ("AVX2", "vendor_id : AuthenticAMD", "AVX-512"),
    ],
)
@pytest.mark.skipif(NO_ONEDNN, reason="no oneDNN")
def test_onednn_is_taken_where_mkl_goes_without_the_wide_vectors(capability, vendor, reason, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(support, "_vendor", lambda: vendor)
    said = support.onednn_unavailable.__wrapped__()
    assert said is None if reason is None else reason in said
