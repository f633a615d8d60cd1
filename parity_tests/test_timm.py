"""timm's own checks of a model, made of ours; and ours by timm's factory, optimisers and feature extractor.

After timm 1.0.31. Of its tests/test_models.py, those that take any model were also run with ours in its lists (of
modules and of non-standard inputs), and passed: test_model_forward, _backward, _default_cfgs_non_std (with its checks
of contract, frozen weights, devices and dtypes), _forward_features, _forward_intermediates,
_forward_intermediates_features and test_prune_intermediate_layers_contract. Those that name their models are here in
our words: test_reset_classifier_keeps_pool, _features_only_grad_checkpointing_backward,
_prune_intermediate_layers_params_used, _forward_after_prune_intermediate_layers,
_forward_intermediates_stop_early_final_norm; test_param_groups_layer_decay of tests/test_optim.py;
test_list_models_filter_types of tests/test_factory.py.

Not applicable: torchscript and fx (the operators are custom and torch.export takes their place, a model cannot be
traced with symbols for images); default_cfgs of convolutional networks (features in 4 axes of a fixed pool_size; ours
are tokens, as of the transformers that timm calls non-standard); in_chans other than 3, output_stride, set_input_size
(any size goes); pretrained weights of the hub (none there); and tests of single architectures.
"""

import copy
import math

import pytest
import timm
import torch
from timm.models import FeatureInfo, group_parameters
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2, param_groups_layer_decay

import fast
import fast.timm_models

NANO, NAMES = "aff_nano", ("aff_nano", "aff_mini_1_5")
EXACT = {"rtol": 0, "atol": 0}


def images(name=NANO, batch=1, seed=0):
    """Random images of the smallest size of a model."""
    size = timm.get_pretrained_cfg_value(name, "min_input_size")
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(seed))


def model_of(name=NANO, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


def test_timm_lists_our_models():
    assert timm.list_models("aff*") == sorted(fast.list_models())
    assert isinstance(timm.create_model("aff_tiny", device="meta"), fast.AutoFocusFormer)


def test_our_list_filters_as_timm_s():
    for options in ({"filter": "*_1_5"}, {"filter": ["aff_n*", "aff_t*"]}, {"exclude_filters": "*base*"}):
        ours = {"filter": "aff*", **options}
        assert sorted(fast.list_models(**options)) == timm.list_models(**ours), options
    assert fast.list_models(pretrained=True) == [NANO] and fast.list_models("resnet*") == []


def test_names_of_arguments_are_timm_s():
    new = {"num_heads": (1, 1, 2, 2), "embed_dims": (8, 8, 16, 16), "drop_path_rate": 0.1}
    for create in (fast.create_model, timm.create_model):
        config = create(NANO, **new).config
        assert (config.heads, config.dims, config.drop_path) == tuple(new.values())
    with pytest.raises(ValueError, match="num_heads and heads are two names of one thing"):
        fast.create_model(NANO, num_heads=(1,) * 4, heads=(1,) * 4)
    with pytest.raises(ValueError, match="in_chans must be 3"):
        fast.create_model(NANO, in_chans=1)
    with pytest.raises(ValueError, match="global_pool must be"):
        fast.create_model(NANO, global_pool="max")
    with pytest.raises(ValueError, match="out_indices needs features_only=True"):
        fast.create_model(NANO, out_indices=2)
    with pytest.raises(ValueError, match="there are 4 stages"):
        fast.create_model(NANO, features_only=True, out_indices=(4,))
    with pytest.raises(ValueError, match="drop_rate must be 0"):
        timm.create_model(NANO, drop_rate=0.1)


@torch.no_grad()
def test_weights_of_a_file(tmp_path):
    model, x = model_of(num_classes=3), images()
    torch.save(model.state_dict(), tmp_path / "ours.pth")
    torch.save(fast.checkpoints.to_official(model.state_dict()), tmp_path / "official.pth")
    for path in tmp_path.glob("*.pth"):
        made = fast.create_model(NANO, num_classes=3, checkpoint_path=path).eval()
        torch.testing.assert_close(made(x), model(x), **EXACT)
        overlay = {"file": str(path), "num_classes": 3}
        made = timm.create_model(NANO, pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay).eval()
        torch.testing.assert_close(made(x), model(x), **EXACT)
        with pytest.raises(fast.checkpoints.CheckpointError, match=r"head.weight is \(3, 64\), not \(4, 64\)"):
            fast.create_model(NANO, num_classes=4, checkpoint_path=path)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_forward(name):
    model, x = model_of(name), images(name)
    outputs = model(x)
    assert outputs.shape == (1, 1000) and outputs.isfinite().all()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), outputs, rtol=1e-4, atol=1e-5)


def test_backward_reaches_every_parameter():
    model = model_of(num_classes=42).train()
    outputs = model(images(batch=2))
    outputs.mean().backward()
    assert outputs.shape == (2, 42) and outputs.isfinite().all()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg(name):
    with torch.device("meta"):
        model = timm.create_model(name, device="meta", dtype=torch.float32).eval()
    cfg, names = model.default_cfg, set(model.state_dict())
    assert model.in_chans == cfg["input_size"][0] and model.num_classes == cfg["num_classes"] == 1000
    assert {cfg["classifier"] + ".weight", cfg["first_conv"] + ".weight"} <= names
    assert timm.data.resolve_data_config(model=model)["mean"] == cfg["mean"] == fast.patch_embedding.MEAN
    with pytest.raises(TypeError, match="takes no argument not_a_model_arg; there are alpha, "):
        timm.create_model(name, not_a_model_arg=1)
    x = torch.randn(1, *cfg["input_size"], device="meta")
    features = model.forward_features(x)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert features.shape[-1] == model.num_features and pre_logits.shape == (1, model.head_hidden_size)
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    model.float().reset_classifier(0)
    assert model.num_classes == 0 and model(x).shape == pre_logits.shape
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    assert timm.create_model(name, num_classes=0, global_pool="", device="meta").eval()(x).shape == features.shape


def test_a_new_classifier_keeps_device_dtype_mode_and_pool():
    model = model_of().to("meta", torch.float64)
    model.requires_grad_(False).reset_classifier(0)
    model.reset_classifier(0, "")
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    model.reset_classifier(2)
    assert {(p.device.type, p.dtype) for p in model.get_classifier().parameters()} == {("meta", torch.float64)}
    assert model.global_pool == "" and not any(module.training for module in model.modules())
    model.reset_classifier(2, "avg")
    assert model.global_pool == "avg"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("out_indices", [None, (1, 3), (0,), -1], ids=str)
@torch.no_grad()
def test_maps_of_a_feature_extractor(name, out_indices):
    out_indices = (3,) if out_indices == -1 else out_indices
    model = model_of(name, features_only=True, **({"out_indices": out_indices} if out_indices else {}))
    x, info = images(name), model.feature_info
    maps = model(x)
    assert len(maps) == len(out_indices or range(4))
    assert info.reduction() == [4 * 2**i for i in out_indices or range(4)]
    for found, channels, reduction in zip(maps, info.channels(), info.reduction(), strict=True):
        assert found.shape == (1, channels, *(math.ceil(side / reduction) for side in x.shape[2:]))
        assert found.isfinite().all()


@torch.no_grad()
def test_our_feature_extractor_returns_the_stages_asked_for():
    whole, x = fast.create_model(NANO, features_only=True).eval(), images()
    for asked, taken in (((0, 2), [0, 2]), (1, [3]), ((-3,), [1])):
        model = fast.create_model(NANO, features_only=True, out_indices=asked).eval()
        model.load_state_dict({name: whole.state_dict()[name] for name in model.state_dict()})
        assert model.feature_info.channels() == [whole.config.dims[i] for i in taken]
        for found, i in zip(model(x), taken, strict=True):
            torch.testing.assert_close(found.features, whole(x)[i].features, **EXACT)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_train(checkpointing):
    model = model_of(features_only=True).train()
    model.model.set_grad_checkpointing(checkpointing)
    sum(found.pow(2).mean() for found in model(images(batch=2))).backward()
    wanted = model_of(features_only=True).train()
    sum(found.pow(2).mean() for found in wanted(images(batch=2))).backward()
    for (name, p), q in zip(model.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


@torch.no_grad()
def test_forward_intermediates():
    model, x = model_of(), images()
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    features, maps = model.forward_intermediates(x)
    torch.testing.assert_close(features, model.forward_features(x), **EXACT)
    assert [each.shape[1] for each in maps] == info.channels() == list(model.config.dims)
    tokens = model.forward_intermediates(x, output_fmt="NLC", norm=True, intermediates_only=True)
    torch.testing.assert_close(tokens[-1], features, **EXACT)
    torch.testing.assert_close(tokens[0].transpose(1, 2).unflatten(2, maps[0].shape[2:]), maps[0], **EXACT)
    for norm in (False, True):
        _, found = model.forward_intermediates(x, indices=[0], norm=norm, stop_early=True)
        torch.testing.assert_close(found[0], maps[0], **EXACT)
    with pytest.raises(ValueError, match="output_fmt must be one of NCHW, NLC"):
        model.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize("index", range(4))
def test_pruned_models_return_the_same_and_leave_no_parameter_unused(index):
    model, x = model_of(), images(batch=2)
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
        early = model.forward_intermediates(x, indices=[index], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(early[0], maps[index], **EXACT)
        kept = copy.deepcopy(model)
        kept.prune_intermediate_layers([3], prune_head=False)
        torch.testing.assert_close(kept(x), model(x), **EXACT)
    for prune_norm in (False, True):
        pruned = copy.deepcopy(model)
        taken = pruned.prune_intermediate_layers([index], prune_norm=prune_norm)
        final, found = pruned.forward_intermediates(x, indices=taken)
        torch.testing.assert_close(found[0], maps[index], **EXACT)
        torch.testing.assert_close(pruned.forward_features(x), final, **EXACT)
        torch.testing.assert_close(pruned(x), final, **EXACT)
        (found[0].sum() + final.sum()).backward()
        assert not [name for name, p in pruned.named_parameters() if p.grad is None]
    getter = FeatureGetterNet(copy.deepcopy(model), out_indices=(index,), norm=False).eval()
    torch.testing.assert_close(getter(x)[0], maps[index], **EXACT)


def test_layer_decay_follows_depth():
    model = model_of(depths=(1, 1, 2, 1))
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers["patch_embedding.conv1.weight"] == 0 and layers["head.weight"] == max(layers.values()) == 6
    assert [layers[f"stages.{i}.blocks.{j}.norm1.weight"] for i, j in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0))] == [
        *range(1, 6)
    ]
    assert layers["stages.0.importance.weight"] == 1 and layers["norm.weight"] == 5
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert scale[id(p)] == 0.5 ** (6 - layers[name]), name
        assert decay[id(p)] == (0.05 if p.ndim > 1 else 0.0), name
    assert create_optimizer_v2(model, "adamw", lr=1e-3, layer_decay=0.5).param_groups
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse["stages.2.blocks.1.norm1.weight"] == 3 and coarse["stages.2.merging.linear.weight"] == 3
