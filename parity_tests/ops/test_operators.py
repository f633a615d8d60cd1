"""The operators of torch.library: opcheck, torch.compile of the whole model, checkpointing, determinism, odd inputs."""

import pytest
import torch

import fast
from benchmarks.models import captured
from fast.neighborhoods import stage_geometry
from fast.ops import dispatch, indexing, neighborhood_attention
from fast.ops.nearest import cuda as nearest_cuda
from parity_tests.cases import case_named
from parity_tests.heads import SMALL_HEAD
from parity_tests.ops.triton_kernels import DEVICE, GPU, cuda
from parity_tests.weights import fill

CASE = case_named("last_cluster_of_one")
SMALL = {"num_classes": 4, "depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "heads": (1, 2, 2, 2)}
SMALL_BACKBONE = {name: value for name, value in SMALL.items() if name != "num_classes"}


def attention_inputs(dtype=torch.float64, case=CASE, heads=2):
    """Query, kv, blank, weight and bias of a case, by default one that ends in a short cluster; its geometry."""
    geometry = case.fast_geometry(torch.float64).renumbered()
    tokens, d = geometry.positions.shape[1], 3
    shapes = {"query": (tokens, heads, d), "kv": (tokens, heads, 2, d)}
    values = {name: case.normal(name, *shape, dtype=dtype) for name, shape in shapes.items()}
    small = {"blank": (heads, 2, d), "weight": (heads, 5), "bias": (heads,)}
    values |= {name: case.normal(name, *shape, dtype=dtype)[0] for name, shape in small.items()}
    return [x.clone().requires_grad_() for x in values.values()], geometry


def small_model(**overrides):
    model = fast.create_model("aff_nano", **SMALL | overrides)
    fill(model, seed=3, dtype=torch.float32)
    return model


def images(batch=2, height=64, width=96):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own doing
@pytest.mark.parametrize("path", [path for path in dispatch.PATHS["attention"] if path != "plain"])
def test_attention_is_a_sound_operator(path):
    with dispatch.force(attention=path):
        inputs, g = attention_inputs()
    torch.library.opcheck(torch.ops.aff.attention, (*inputs, g.members, g.plan.path, list(g.plan.tensors)))


@pytest.mark.parametrize("path", dispatch.PATHS["attention"])
@pytest.mark.parametrize("neighborhood", [24, 10_000], ids=["local", "global"])
def test_geometry_is_a_sound_operator(neighborhood, path):
    positions = torch.from_numpy(CASE.positions())
    arguments = (positions, CASE.cluster_size, neighborhood, *CASE.grid_size, "scanline", torch.float32, path)
    torch.library.opcheck(torch.ops.aff.stage_geometry, arguments)
    torch.library.opcheck(torch.ops.aff.local_stride, (positions, "l2"))


@pytest.mark.parametrize("case", ["one_token", "last_cluster_of_one", "n_below_neighbourhood"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("path", [path for path in dispatch.PATHS["attention"] if path != "triton"])
def test_attention_passes_gradcheck(path, heads, case):
    """Also with a batch, clusters or heads of one, where a permuted tensor may share the memory that it came from."""
    with dispatch.force(attention=path):
        inputs, geometry = attention_inputs(case=case_named(case), heads=heads)
    assert torch.autograd.gradcheck(lambda *x: neighborhood_attention(*x, geometry), inputs, fast_mode=True)


def test_autocast_does_not_reach_into_an_operator():
    def run():
        inputs, geometry = attention_inputs()
        inputs = [x.detach().to(dtype).requires_grad_() for x, dtype in zip(inputs, dtypes, strict=True)]
        out = neighborhood_attention(*inputs, geometry)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    dtypes = [torch.bfloat16] * 3 + [torch.float32] * 2
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    assert all(map(torch.equal, found, run()))


def test_the_whole_model_compiles_to_one_graph_at_two_sizes():
    model = small_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for x in (images(), images(1, 96, 64)):
        found = compiled(x)
        got = torch.autograd.grad(found.square().sum(), list(model.parameters()))
        expected = model(x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(got, torch.autograd.grad(expected.square().sum(), list(model.parameters())))


PATHS = {
    "best": {},
    "clusters": {operator: "plain" for operator in dispatch.PATHS} | {"attention": "clusters", "nearest": "grid"},
    "plain": {operator: paths[-1] for operator, paths in dispatch.PATHS.items()},
    "triton": {operator: "triton" for operator, paths in dispatch.PATHS.items() if "triton" in paths},
}


@pytest.mark.parametrize("kind", ["classifier", "segmenter"])
@pytest.mark.parametrize("paths", PATHS)
def test_the_same_seed_trains_the_same_weights_twice(paths, kind):
    def trained():
        torch.manual_seed(0)
        if kind == "classifier":
            model = fast.create_model("aff_nano", **SMALL, drop_path=0.2)
        else:
            layers = {"encoder_layers": 1, "decoder_layers": 1} if slow else {}
            model = fast.create_segmenter("aff_nano", backbone_overrides=SMALL_BACKBONE, **SMALL_HEAD | layers)
        model.to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            output = model(images(1, *size).to(DEVICE))
            output = output if kind == "classifier" else output.masks_queries_logits
            output.square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    slow = paths == "triton" and not GPU  # in Triton's interpreter
    steps, size = (1, (32, 32)) if slow else (2, (64, 96))
    torch.use_deterministic_algorithms(True)
    with dispatch.force(**PATHS[paths]):
        assert torch.equal(trained(), trained())


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_replays_as_a_cuda_graph(dtype):
    def trained(steps, replayed):
        torch.manual_seed(0)
        model = small_model().cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)

        def step():
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                loss = model(pictures).square().sum()
            loss.backward()
            optimizer.step()

        run = captured(step) if replayed else step  # capturing runs it three times
        for _ in range(steps - 3 if replayed else steps):
            run()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    pytest.importorskip("cupy", reason="capturing needs the neighbours' CUDA kernels, which never wait")
    nearest_cuda.warm()
    pictures = images().cuda()
    torch.testing.assert_close(trained(6, True), trained(6, False))


def test_checkpointing_changes_no_gradient():
    model = small_model()
    plain = torch.autograd.grad(model(images()).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing(True)
    saving = torch.autograd.grad(model(images()).square().sum(), list(model.parameters()))
    torch.testing.assert_close(saving, plain)


def test_strided_inputs_give_what_contiguous_ones_give():
    inputs, geometry = attention_inputs()
    plain = neighborhood_attention(*inputs, geometry)
    grad_out = torch.randn(plain.shape, dtype=plain.dtype, generator=torch.Generator().manual_seed(2))
    strided = [torch.stack([x.detach(), x.detach()], dim=-1)[..., 0].requires_grad_() for x in inputs]
    strided[0] = inputs[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    found = neighborhood_attention(*strided, geometry)
    assert not strided[0].is_contiguous() and torch.equal(found, plain)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad_out) for y, x in ((found, strided), (plain, inputs))))


def test_a_batch_of_no_images_gives_no_logits_and_zero_gradients():
    model = small_model().eval()
    logits = model(images(0))
    assert logits.shape == (0, 4)
    logits.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_more_places_than_an_index_holds_are_refused():
    far = torch.tensor([[[0, 0], [2**40, 2**40], [5, 5], [9, 1]]])
    with pytest.raises(ValueError, match="^grid_size must be at least 1 x 1, of at most"):
        stage_geometry(far, 2, 2, (2**41, 2**41))


def test_many_tokens_taken_piece_by_piece_give_the_same_and_hooks_see_all(monkeypatch):
    torch.manual_seed(0)
    images, block, seen = torch.randn(2, 3, 64, 96), fast.attention.AttentionBlock, []
    model, feed = fast.create_segmenter("aff_nano", num_classes=3, num_queries=5).eval(), block._feed_forward
    with torch.no_grad():
        whole = model(images).masks_queries_logits
        monkeypatch.setattr(block, "_feed_forward", lambda *a, **o: seen.append(a[1].shape[1]) or feed(*a, **o))
        monkeypatch.setattr(indexing, "AT_ONCE", 10000)
        torch.testing.assert_close(model(images).masks_queries_logits, whole, rtol=1e-4, atol=1e-4)
        assert seen[0] < sum(seen[:2]) < 16 * 24  # pieces of the first stage's tokens
        seen.clear()
        model.backbone.stages[0].blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)
        model(images)
    assert seen[0] == 16 * 24
