"""Point-based Mask2Former: its layers one by one, both decoders, the mask that guides attention, and gradients."""

import dataclasses

import numpy as np
import pytest
import torch

import fast.mask2former
import reference.mask2former
from parity_tests import plain_heads
from parity_tests.cases import DTYPES, SMALL
from parity_tests.compare import GRADIENT, assert_equal, assert_layers, assert_parity
from parity_tests.gradients import assert_directional, backward, flat
from parity_tests.heads import DIMS, small_config, token_sets
from parity_tests.weights import fill, tensors
from reference.layers import subset

CANVASES = {"square": ((8, 8), 2), "wide": ((9, 14), 1), "few_tokens": ((4, 5), 2)}
CHOSEN = ("shepard_power", "sampling_offsets.weight", "level_embedding", "query_positions.weight", "adapter.0.weight")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def filled(module, dtype=torch.float64, seed=2):
    """A module of ``dtype`` with non-trivial weights, and those weights for the reference."""
    weights = fill(module, seed=seed, dtype=dtype)
    return module.to(dtype), weights


def test_config_is_the_same_in_both_twins():
    ours, theirs = (dataclasses.fields(m.HeadConfig) for m in (reference.mask2former, fast.mask2former))
    assert [(f.name, f.default) for f in ours] == [(f.name, f.default) for f in theirs]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("largest", [None, (17, 40)], ids=["own_maximum", "given_maximum"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_sine_embedding_agrees(case, largest, dtype, device):
    positions = case.positions()
    top = None if largest is None else np.tile(largest, (case.batch, 1))
    given = None if largest is None else torch.from_numpy(top).to(device)
    got = fast.mask2former.sine_embedding(torch.from_numpy(positions).to(device), 12, given, dtype)
    tops = [None if top is None else top[i] for i in range(case.batch)]
    oracle = [reference.mask2former.sine_embedding(p, 12, t) for p, t in zip(positions, tops, strict=True)]
    baseline = [plain_heads.sine_embedding(p, 12, t, dtype) for p, t in zip(positions, tops, strict=True)]
    assert_parity(got, np.stack(oracle), torch.stack(baseline), dtype, name="sine_embedding")


def test_sine_embedding_by_hand():
    """x = 0, 1 of a largest 1, then y = 0: one sine block, one cosine block, divisors 1 and 100."""
    code = reference.mask2former.sine_embedding(np.array([[1, 0], [0, 0]]), 8)
    angle = 2 * np.pi / (1 + 1e-6)
    expected = [np.sin(angle), np.sin(angle / 100), np.cos(angle), np.cos(angle / 100), 0, 0, 1, 1]
    np.testing.assert_allclose(code, [expected, [0, 0, 1, 1] * 2], atol=1e-15)


@pytest.mark.parametrize("sine_max", ["image", "batch"])
def test_level_codes_are_divided_by_the_image_or_the_batch(sine_max):
    positions = torch.tensor([[[0, 1], [3, 2]], [[1, 7], [2, 0]]])
    codes = fast.mask2former.level_codes([positions], 8, sine_max, torch.float64)[0]
    tops = [(3, 2), (2, 7)] if sine_max == "image" else [(3, 7), (3, 7)]
    for p, top, code in zip(positions.numpy(), tops, codes, strict=True):
        np.testing.assert_allclose(code, reference.mask2former.sine_embedding(p, 8, np.array(top)), atol=1e-14)


def test_attention_mask_agrees_and_a_query_blocked_everywhere_sees_all():
    logits = np.round(np.random.default_rng(0).standard_normal((2, 5, 9)), 1)
    logits[0, 1], logits[1, 3], logits[0, 2] = -1.0, -1e-9, 0.0
    got = fast.mask2former.attention_mask(torch.from_numpy(logits).requires_grad_())
    assert_equal(got, np.stack([reference.mask2former.attention_mask(m) for m in logits]), name="attention_mask")
    assert not got[0, 1].any() and not got[1, 3].any() and not got[0, 2].any() and got.any()
    assert not got.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries, tokens", [(5, 13), (1, 1), (30, 4)], ids=str)
def test_decoder_layer_agrees_under_the_same_mask(queries, tokens, dtype, device):
    """Also with more queries than tokens; fast's attention is PyTorch's, the reference's is written out."""
    config, _ = small_config()
    module, weights = filled(fast.mask2former.DecoderLayer(config), dtype)
    out, memory, code = (draw(2, n, 16, seed=n + i, dtype=dtype) for i, n in enumerate((queries, tokens, tokens)))
    query_pos = draw(queries, 16, seed=7, dtype=dtype)
    attn_mask = fast.mask2former.attention_mask(draw(2, queries, tokens, seed=8))
    with torch.no_grad():
        got = module.to(device)(*(x.to(device) for x in (out, memory, code, attn_mask, query_pos)))
    weights = {**weights, "query_positions": query_pos.double().numpy()}
    exact = [x.double().numpy() for x in (out, memory, code)]
    oracle = [reference.mask2former.decoder_layer(*c, weights, 2) for c in zip(*exact, attn_mask.numpy(), strict=True)]
    low = tensors(weights, dtype)
    baseline = [plain_heads.decoder_layer(*c, low, 2) for c in zip(out, memory, code, attn_mask, strict=True)]
    assert_parity(got, np.stack(oracle), torch.stack(baseline), dtype, name="decoder_layer")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_predictions_of_queries_agree(dtype, device):
    config, _ = small_config()
    module, weights = filled(fast.mask2former.QueryDecoder(config), dtype)
    out, features = draw(2, 6, 16, seed=1, dtype=dtype), draw(2, 21, 16, seed=2, dtype=dtype)
    with torch.no_grad():
        got = module.to(device).predict(out.to(device), features.to(device))
    exact, low = (out.double().numpy(), features.double().numpy()), tensors(weights, dtype)
    oracle = [reference.mask2former.predict(*c, weights) for c in zip(*exact, strict=True)]
    baseline = [plain_heads.predict(*c, low) for c in zip(out, features, strict=True)]
    names = "classes", "masks"
    got, oracle, baseline = (
        dict(zip(names, pair, strict=True))
        for pair in (got, map(np.stack, zip(*oracle, strict=True)), map(torch.stack, zip(*baseline, strict=True)))
    )
    assert_layers(got, oracle, baseline, dtype, name="predict")


def encoder_setting(name, dtype, lookup="rounded"):
    """An encoder layer, its weights, and what both twins' layers take."""
    grid_size, batch = CANVASES[name]
    config, theirs = small_config(lookup=lookup)
    sets, _ = token_sets(grid_size, batch, dims=(16,) * 4, dtype=dtype)
    source, positions = (torch.cat([getattr(t, f) for t in sets[:0:-1]], dim=1) for f in ("features", "positions"))
    module, weights = filled(fast.mask2former.EncoderLayer(config), dtype)
    sizes = [t.positions.shape[1] for t in sets[:0:-1]]
    tables = fast.deformable.lookup_tables([t.positions for t in sets[:0:-1]], grid_size)
    code = draw(*source.shape, seed=3, dtype=dtype)
    return module, weights, theirs, (source, code, positions, sizes, grid_size, tables)


def per_image(function, source, code, positions, sizes, grid_size, *rest):
    columns = zip(source, code, np.asarray(positions), strict=True)
    return [function(s, c, p, sizes, grid_size, *rest) for s, c, p in columns]


@pytest.mark.parametrize("lookup", ["rounded", "exact"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", CANVASES)
def test_encoder_layer_agrees(name, dtype, lookup, device):
    module, weights, config, given = encoder_setting(name, dtype, lookup)
    moved = [x.to(device) if torch.is_tensor(x) else x for x in given]
    with torch.no_grad():
        got = module.to(device)(*moved)
    exact = [given[0].double().numpy(), given[1].double().numpy(), *given[2:5]]
    oracle = per_image(reference.mask2former.encoder_layer, *exact, weights, config)
    baseline = per_image(plain_heads.encoder_layer, *given[:5], tensors(weights, dtype), config)
    assert_parity(got, np.stack(oracle), torch.stack(baseline), dtype, name="encoder_layer")


def heads_of(grid_size, batch, dtype=torch.float64, **overrides):
    """Pixel decoder and query decoder with their weights, config of the reference, and token sets for both twins."""
    config, theirs = small_config(**overrides)
    pixels, pixel_weights = filled(fast.mask2former.PixelDecoder(config, DIMS), dtype)
    queries, query_weights = filled(fast.mask2former.QueryDecoder(config), dtype, seed=3)
    return pixels, queries, pixel_weights, query_weights, theirs, *token_sets(grid_size, batch, dtype=dtype)


def run_queries(queries, mask_features, levels, sets):
    grid_size, positions = sets[0].grid_size, [t.positions for t in sets[:0:-1]]
    return queries(mask_features, levels, positions, [p[..., 1] * grid_size[1] + p[..., 0] for p in positions])


@pytest.mark.parametrize("sine_max", ["image", "batch"])
@pytest.mark.parametrize("options", [{}, {"lookup": "exact"}, {"num_queries": 40}], ids=str)
@pytest.mark.parametrize("name", CANVASES)
def test_decoders_agree_in_float64(name, options, sine_max):
    """All layers, from token sets on; 40 queries are more than the deep levels have tokens."""
    grid_size, batch = CANVASES[name]
    pixels, queries, pixel_weights, query_weights, config, sets, exact = heads_of(
        grid_size, batch, sine_max=sine_max, **options
    )
    with torch.no_grad():
        mask_features, levels = pixels(sets)
        got = run_queries(queries, mask_features, levels, sets)
    tops = [t.positions.amax(dim=1).numpy() for t in sets[:0:-1]]
    for i, image in enumerate(exact):
        largest = [top.max(axis=0) if sine_max == "batch" else top[i] for top in tops]
        features, deep = reference.mask2former.pixel_decoder(image, grid_size, pixel_weights, config, largest)
        np.testing.assert_allclose(mask_features[i], features, rtol=1e-9, atol=1e-11)
        for ours, theirs in zip(levels, deep, strict=True):
            np.testing.assert_allclose(ours[i], theirs, rtol=1e-9, atol=1e-11)
        positions = [p for p, _ in image[:0:-1]]
        expected = reference.mask2former.query_decoder(
            features, deep, positions, grid_size, query_weights, config, largest
        )
        for ours, theirs in zip(got, expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(a[i], b, rtol=1e-8, atol=1e-10)


def test_forward_of_the_reference_is_its_parts():
    pixels, queries, pixel_weights, query_weights, config, _, exact = heads_of((8, 8), 1)
    both = {f"pixel_decoder.{k}": v for k, v in pixel_weights.items()}
    both |= {f"decoder.{k}": v for k, v in query_weights.items()}
    shaped, features, levels = reference.mask2former.forward(exact[0], (8, 8), both, config)
    expected, deep = reference.mask2former.pixel_decoder(exact[0], (8, 8), pixel_weights, config)
    positions = [p for p, _ in exact[0][:0:-1]]
    parts = reference.mask2former.query_decoder(expected, deep, positions, (8, 8), query_weights, config)
    assert (features == expected).all() and all((a == b).all() for a, b in zip(levels, deep, strict=True))
    assert len(shaped) == len(parts) == 5
    for (classes, masks), (c, m) in zip(shaped, parts, strict=True):
        assert (classes == c).all() and (masks == m.reshape(-1, 8, 8)).all()


@pytest.mark.parametrize("name", CANVASES)
def test_gradients_agree_with_central_differences_of_the_reference(name):
    """From the last predictions through both decoders to the token sets and a part of the weights."""
    grid_size, batch = CANVASES[name]
    pixels, queries, pixel_weights, query_weights, config, sets, exact = heads_of(
        grid_size, batch, decoder_layers=3, encoder_layers=1
    )
    cells = grid_size[0] * grid_size[1]
    grad_out = draw(batch, 6, 6 + cells, seed=5)
    head = torch.nn.ModuleDict({"pixel_decoder": pixels, "decoder": queries})

    def ours(inputs):
        given = [dataclasses.replace(t, features=inputs[f"res{i}"]) for i, t in enumerate(sets)]
        return torch.cat(run_queries(queries, *pixels(given), sets)[-1], dim=2)

    def theirs(inputs):
        images = [[(p, inputs[f"res{i}"][b]) for i, (p, _) in enumerate(image)] for b, image in enumerate(exact)]
        results = [reference.mask2former.forward(image, grid_size, inputs, config)[0][-1] for image in images]
        return np.stack([np.concatenate([c, m.reshape(6, -1)], axis=1) for c, m in results])

    inputs = {f"res{i}": t.features for i, t in enumerate(sets)}
    gradients = backward(head, inputs, ours, grad_out)
    weights = {f"pixel_decoder.{k}": v for k, v in pixel_weights.items()}
    weights |= {f"decoder.{k}": v for k, v in query_weights.items()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    chosen = {k: gradients[k] for k in sorted(gradients) if k.startswith("res") or k.endswith(CHOSEN)}
    at = {k: v.numpy() for k, v in inputs.items()} | weights
    assert_directional(chosen, theirs, at, grad_out.numpy(), name="mask2former gradient")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_element_of_the_gradients_of_a_decoder_layer_agrees(dtype):
    config, _ = small_config()
    module, weights = filled(fast.mask2former.DecoderLayer(config), dtype)
    attn_mask, query_pos = fast.mask2former.attention_mask(draw(1, 5, 11, seed=8)), draw(5, 16, seed=7, dtype=dtype)
    inputs = {name: draw(1, n, 16, seed=n, dtype=dtype) for name, n in (("out", 5), ("memory", 11))}
    code, grad_out = draw(1, 11, 16, seed=3, dtype=dtype), draw(1, 5, 16, seed=4, dtype=dtype)
    got = backward(module, inputs, lambda i: module(i["out"], i["memory"], code, attn_mask, query_pos), grad_out)

    def formula(i):
        held = {**i, "query_positions": query_pos.to(i["out"].dtype)}
        columns = i["out"][0], i["memory"][0], code[0].to(i["out"].dtype), attn_mask[0]
        return plain_heads.decoder_layer(*columns, held, 2)[None]

    references = [flat({**inputs, **tensors(weights, dtype)}, formula, grad_out, d) for d in (torch.float64, dtype)]
    assert_layers(got, *references, dtype, GRADIENT, name="decoder_layer gradient")


def test_multihead_attention_of_the_reference_is_pytorchs():
    module, weights = filled(torch.nn.MultiheadAttention(16, 2, batch_first=True))
    query, key, value = (draw(n, 16, seed=i) for i, n in enumerate((5, 9, 9)))
    attn_mask = fast.mask2former.attention_mask(draw(1, 5, 9, seed=8))[0]
    with torch.no_grad():
        expected = module(query[None], key[None], value[None], attn_mask=attn_mask)[0][0]
    columns = (x.numpy() for x in (query, key, value))
    got = reference.mask2former.multihead_attention(*columns, weights, 2, attn_mask.numpy())
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)
    assert "in_proj_weight" in weights and subset(weights, "out_proj")


def test_attention_masks_come_from_the_level_at_hand(monkeypatch):
    """Layer i reads level i mod 3: the masks' widths, in order, are the levels' sizes."""
    pixels, queries, *_, sets, _ = heads_of((8, 8), 1)
    seen, real = [], fast.mask2former.attention_mask
    monkeypatch.setattr(fast.mask2former, "attention_mask", lambda m: seen.append(m.shape[2]) or real(m))
    with torch.no_grad():
        run_queries(queries, *pixels(sets), sets)
    sizes = [t.positions.shape[1] for t in sets[:0:-1]]
    assert seen == [*sizes, sizes[0]]
