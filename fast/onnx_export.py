"""Models as ONNX files: one image size, any batch, every operator ONNX's own (opset 18).

    data = export_onnx(model, (224, 224))                            # bytes, for a file or an InferenceSession

Needs the packages onnx and onnxscript. Every operator is exported by its plain path. What PyTorch sees as one opaque
step even there (clusters, nearest clusters and tokens, local strides) is written out by ``ONE_STEP``: the same
integers, but nothing asks for a tensor's value. ONNX's TopK puts equal values in the order of their indices, as a
stable sort does. The first stage's geometry is the same for every image and is stored. An ONNX model does not refuse
images that hold NaN or infinity.
"""

import importlib
import json
import logging
import math
import warnings

import torch
from torch import nn

from .backbone import AutoFocusFormer
from .checks import is_whole, shown
from .clustering import patch_grid
from .curves import curve_ranks
from .neighborhoods import nearest_count
from .ops import dispatch, ordering
from .ops.indexing import gather_rows
from .ops.nearest import _raster_order
from .ops.nearest.plain import smallest, widened
from .patch_embedding import MEAN, SMALLEST_SIDE, STD
from .segmenter import Segmenter
from .selection import token_counts

OPSET = 18
PACKAGES = ("onnx", "onnxscript")
PAIRS_AT_ONCE = 1 << 21  # distances of an image held at a time: bounds the memory of a session
PLAIN = {operator: paths[-1] for operator, paths in dispatch.PATHS.items()}


def export_onnx(model, size, classes=None, mean=MEAN, std=STD, positions=False):
    """Export a classifier, a feature extractor, or a segmenter of either head.

    Parameters
    ----------
    model : AutoFocusFormer, Mask2Former or HCFormer
        In float32 on the CPU. It is put into evaluation.
    size : (H, W)
        Of the images, pixels. The numbers of tokens follow from it, so that a file is for one size.
    classes : list of str, optional
        Names of the classes, for the metadata.
    mean, std : three floats
        By which images in 0..1 are to be normalised, for the metadata.
    positions : bool
        Whether a classifier or a segmenter returns the positions of each stage's tokens, too.

    Returns
    -------
    bytes
        An ONNX model. Its input "images" is (batch, 3, H, W) float32, normalised. Its outputs are "logits"; or
        "class_queries_logits" and "masks_queries_logits" (batch, q, H / 4, W / 4, rounded up); or the stages'
        "positions_1", ... (int64) and "features_1", ... Metadata: kind, and as JSON input_size (H, W), mean, std and
        classes.

    Raises
    ------
    ImportError
        A package is missing; the message names the extra that brings it.
    TypeError, ValueError
        No such model, or one elsewhere or of another dtype; a size that the model does not take.
    """
    _check(model, size)
    _need_packages()
    images, wrapped = torch.zeros(2, 3, *size), Named(model.eval(), positions)
    with torch.no_grad(), dispatch.force(**PLAIN):
        names = list(wrapped.named(images))  # the first stage's geometry is kept, and becomes constants
        program = torch.export.export(wrapped, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        program = program.run_decompositions(ONE_STEP)
    facts = {"kind": kind_of(model), "input_size": list(size), "mean": list(mean), "std": list(std)}
    return _convert(program, names, facts | ({"classes": list(classes)} if classes else {}))


def kind_of(model):
    """Return "classifier", "features" or "segmenter"."""
    if isinstance(model, Segmenter):
        return "segmenter"
    return "features" if model.features_only else "classifier"


class Named(nn.Module):
    """A model whose output is a tuple of tensors; ``named`` returns it as a dict."""

    def __init__(self, model, positions=False):
        super().__init__()
        self.model, self.positions = model, positions

    def forward(self, images):
        """Images (B, 3, H, W) -> tuple of tensors."""
        return tuple(self.named(images).values())

    def named(self, images):
        """Images (B, 3, H, W) -> dict of tensors, as an ONNX model's outputs."""
        found, backbone = [], _backbone(self.model)
        hooks = [
            stage.register_forward_hook(lambda *call: found.append(call[-1].positions)) for stage in backbone.stages
        ]
        try:
            output = self.model(images)
        finally:
            for hook in hooks:
                hook.remove()
        kind = kind_of(self.model)
        if kind == "features":
            sets = list(zip(backbone.out_indices, output, strict=True))
            positions = {f"positions_{i + 1}": each.positions for i, each in sets}
            return positions | {f"features_{i + 1}": each.features for i, each in sets}
        names = ("class_queries_logits", "masks_queries_logits")
        named = {name: output[name] for name in names} if kind == "segmenter" else {"logits": output}
        return named | ({f"positions_{i}": each for i, each in enumerate(found, 1)} if self.positions else {})


def _backbone(model):
    return model.backbone if isinstance(model, Segmenter) else model


def _check(model, size):
    """Refuse what cannot be exported, before any work."""
    if not isinstance(model, AutoFocusFormer | Segmenter):
        raise TypeError(f"model must be an AutoFocusFormer or a segmenter, not {shown(type(model).__name__)}")
    if not (isinstance(size, tuple | list) and len(size) == 2 and all(map(is_whole, size))):
        raise TypeError(f"size must be two whole numbers, height and width in pixels, not {shown(size)}")
    if min(size) < SMALLEST_SIDE:
        raise ValueError(f"size must be at least {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels, not {size[0]} x {size[1]}")
    odd = next((w for w in model.parameters() if w.dtype != torch.float32 or w.device.type != "cpu"), None)
    if odd is not None:
        raise ValueError(f"model must be in float32 on the CPU, not {odd.dtype} on {odd.device}: model.float().cpu()")
    config = _backbone(model).config
    token_counts(tuple(-(-side // 4) for side in size), config.rate, config.reserve)


def _need_packages():
    try:
        for name in PACKAGES:
            importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'exporting to ONNX needs the package {error.name}: pip install "autofocusformer[onnx]"'
        ) from error


def _convert(program, names, facts):
    """Translate an exported program into bytes of ONNX, with none of the paths and traces that PyTorch notes."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the packages, about each other
            logger.setLevel(logging.ERROR)  # or it says what it does not fold
            # not optimised: the optimiser takes Shepard's + 1e-11 for + 0 and drops it, then 1 / 0 is no number
            options = {"input_names": ["images"], "output_names": names, "opset_version": OPSET, "optimize": False}
            proto = torch.onnx.export(program, (), dynamo=True, verbose=False, **options).model_proto
    finally:
        logger.setLevel(level)
    graph = proto.graph
    for each in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del each.metadata_props[:]
        each.doc_string = ""
    for key, value in facts.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    return proto.SerializeToString()


def _stage_geometry(positions, cluster_size, neighborhood, h, w, curve, dtype, path):
    (batch, n), device = positions.shape[:2], positions.device
    ranks = curve_ranks(*patch_grid(n, cluster_size, (h, w)), curve, device)
    order, cluster, place, members, sums = ordering.plain.cluster_tokens(positions, ranks, cluster_size, (h, w))
    if neighborhood >= n:
        token = torch.arange(n, device=device).repeat(batch, 1)
        return [order, cluster, token[:, None].clone(), token, token.new_zeros(batch, n, 1)]
    k = sums.shape[1]
    last = n - cluster_size * (k - 1)
    multiple = math.lcm(cluster_size, last) if k > 1 else last
    factors = torch.full((k, 1), multiple // cluster_size, device=device)
    factors = torch.cat([factors[: k - 1], torch.full((1, 1), multiple // last, device=device)])
    nearest = nearest_count(neighborhood, cluster_size, k)
    return [order, cluster, members, place, _nearest(positions * multiple, sums * factors, nearest)[0]]


def _nearest(points, items, nearest, metric="l2"):
    """``ops.nearest.plain.nearest_of_all``, so many points at a time as the size says, whatever the batch."""
    n, parts = items.shape[1], []
    rows, each = max(1, PAIRS_AT_ONCE // n), torch.arange(n, device=items.device)
    for start in range(0, points.shape[1], rows):
        offsets = widened(points[:, start : start + rows, None]) - items[:, None]
        dx, dy = offsets.unbind(-1)
        squared = dx * dx + dy * dy if metric == "l2" else (dx.abs() + dy.abs()).square()
        parts.append(smallest(squared, each.expand_as(squared), min(nearest, n), n))
    return [torch.cat(each, dim=1) for each in zip(*parts, strict=True)]


def _nearest_tokens(queries, positions, nearest, width):
    raster = _raster_order(positions, width)
    found = _nearest(queries, gather_rows(positions, raster), nearest)[0]
    return raster.gather(1, found.flatten(1)).view(found.shape)


def _local_stride(positions, metric):
    if positions.shape[1] == 1:
        return torch.ones_like(positions[..., 0])
    squared = _nearest(positions, positions, 2, metric)[1][..., 1:]
    powers = 2 ** torch.arange(31, device=positions.device)
    return 1 + ((squared > powers * powers) * powers).sum(dim=-1)  # 2^i, i the number of squares that are less


def _stable_sort(x, *, stable=None, dim=-1, descending=False):
    return torch.ops.aten.sort.default(x, dim, descending)  # which becomes TopK


def _stable_argsort(x, *, stable=None, dim=-1, descending=False):
    return _stable_sort(x, dim=dim, descending=descending)[1]


ONE_STEP = {  # by plain paths, for one size and any batch
    torch.ops.aten.sort.stable: _stable_sort,
    torch.ops.aten.argsort.stable: _stable_argsort,
    torch.ops.aff.stage_geometry.default: _stage_geometry,
    torch.ops.aff.nearest_tokens.default: _nearest_tokens,
    torch.ops.aff.local_stride.default: _local_stride,
}
