"""The whole backbone, from an image and a dict of weights to logits (paper sec. 3, Fig. 2, Table 1).

Weights are named as ``fast``'s models name them: ``patch_embedding.*``, ``stages.<i>.blocks.<j>.*``,
``stages.<i>.importance.*``, ``stages.<i>.merging.*``, ``norm.*``, ``head.*``, with i and j counted from 0.
"""

from dataclasses import dataclass

import numpy as np

from .attention import attention_block
from .checks import check_arrays, check_choice, is_number, is_whole, shown
from .clustering import check_cluster_size
from .curves import CURVES
from .grid_prior import METRICS, grid_prior, local_stride, reserved_tokens
from .layers import as_weights, layer_norm, linear, subset
from .merging import merging
from .neighborhoods import stage_geometry
from .patch_embedding import grid_positions, patch_embedding, prepare_image
from .selection import importance, select, token_counts

STAGES = 4
MOST = {  # more is a slip, and would fill the memory
    "depths": 64, "dims": 2**14, "neighborhood": 2**24, "mlp_ratio": 64, "num_classes": 2**20,
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Shape and choices of a backbone; the four-number fields hold one number a stage. Defaults: AFF-Mini (Table 1)."""

    num_classes: int = 1000
    depths: tuple = (2, 2, 6, 2)  # blocks
    dims: tuple = (32, 128, 256, 384)  # C
    heads: tuple = (2, 4, 8, 16)
    mlp_ratio: float = 2.0  # hidden channels of the MLP, as a multiple of C
    cluster_size: int = 8  # m
    neighborhood: tuple = (48, 48, 48, 49)  # tokens; 49 are all there are in the last stage at 224 x 224
    rate: float = 0.25  # share of the tokens that a merge keeps
    alpha: float = 4.0
    reserve: bool = True
    layer_scale: float | None = None  # initial value of the blocks' scales; None: no scales
    drop_path: float = 0.0  # training only
    curve: str = "scanline"
    stride_metric: str = "l2"

    def __post_init__(self):
        for name in ("depths", "dims", "heads", "neighborhood"):
            value = getattr(self, name)
            whole = isinstance(value, tuple | list) and all(is_whole(v) and v >= 1 for v in value)
            if not whole or len(value) != STAGES:
                raise ValueError(f"{name} must hold {STAGES} positive whole numbers, one a stage, not {shown(value)}")
            if name in MOST and max(value) > MOST[name]:
                raise ValueError(f"{name} must be at most {MOST[name]:,} each, not {shown(max(value))}")
            object.__setattr__(self, name, tuple(value))
        for dim, heads in zip(self.dims, self.heads, strict=True):
            if dim % heads:
                raise ValueError(f"dims {self.dims} must be multiples of heads {self.heads}")
        check_choice("curve", self.curve, CURVES)
        check_choice("stride_metric", self.stride_metric, METRICS)
        check_cluster_size(self.cluster_size)
        hidden = is_number(self.mlp_ratio) and 1 / min(self.dims) <= self.mlp_ratio <= MOST["mlp_ratio"]
        classes = is_whole(self.num_classes) and 0 <= self.num_classes <= MOST["num_classes"]
        limits = {
            "rate": (is_number(self.rate) and 0 < self.rate <= 1, "in (0, 1]"),
            "alpha": (is_number(self.alpha), "a finite number"),
            "mlp_ratio": (hidden, f"positive, for at least one hidden channel, and at most {MOST['mlp_ratio']}"),
            "layer_scale": (self.layer_scale is None or is_number(self.layer_scale), "a finite number or None"),
            "reserve": (isinstance(self.reserve, bool), "True or False"),
            "drop_path": (is_number(self.drop_path) and 0 <= self.drop_path < 1, "in [0, 1)"),
            "num_classes": (classes, f"a whole number from 0 to {MOST['num_classes']:,}"),
        }
        for name, (holds, what) in limits.items():
            if not holds:
                raise ValueError(f"{name} must be {what}, not {shown(getattr(self, name))}")


@dataclass(frozen=True)
class StageTokens:
    """What one stage did; tokens in raster order. The fields of the merge are None in the last stage.

    Sec. 3, Fig. 2.
    """

    positions: np.ndarray  # (n, 2) int64
    features: np.ndarray  # (n, C): after the last block, before any norm
    order: np.ndarray  # (n,) int64: token indices, cluster after cluster
    cluster: np.ndarray  # (n,) int64
    scores: np.ndarray | None = None  # (n,): s
    kept: np.ndarray | None = None  # (K,) int64: indices of the tokens kept
    merged_positions: np.ndarray | None = None  # (K, 2) int64
    merged_features: np.ndarray | None = None  # (K, C')


def forward_stage(config, weights, index, positions, features, grid_size, keep):
    """Run stage ``index`` (from 0): cluster, attend and, unless ``keep`` is None, choose K = ``keep`` tokens, merge.

    Sec. 3, Fig. 2.
    """
    geometry = stage_geometry(positions, config.cluster_size, config.neighborhood[index], grid_size, config.curve)
    for block in range(config.depths[index]):
        features = attention_block(features, geometry, subset(weights, f"blocks.{block}"), config.heads[index])
    if keep is None:
        return StageTokens(positions, features, geometry.order, geometry.cluster)
    scores = importance(features, subset(weights, "importance"))
    prior = grid_prior(positions, local_stride(positions, config.stride_metric))
    reserved = reserved_tokens(positions, index + 1) & config.reserve
    kept = select(scores, prior, reserved, keep, config.alpha)
    merged = merging(features, scores, kept, geometry, subset(weights, "merging"))
    return StageTokens(positions, features, geometry.order, geometry.cluster, scores, kept, positions[kept], merged)


def forward_features(config, weights, image):
    """Run all stages on one image (sec. 3, Fig. 2).

    Parameters
    ----------
    config : Config
    weights : dict of str to array
        As the module's docstring names them; used in float64.
    image : (3, H, W) array
        uint8, or floating point and normalised; see ``patch_embedding.prepare_image``.

    Returns
    -------
    list of StageTokens
        One for each stage.

    Raises
    ------
    ValueError, TypeError
        As ``patch_embedding.prepare_image`` and ``selection.token_counts`` say.
    """
    if not isinstance(config, Config):
        raise TypeError(f"config must be a Config, not {shown(type(config).__name__)}")
    weights = as_weights(weights)
    image = prepare_image(image)
    grid_size = (image.shape[1] // 4, image.shape[2] // 4)
    counts = token_counts(grid_size, config.rate, config.reserve, len(config.depths))
    positions, features = grid_positions(grid_size), patch_embedding(image, subset(weights, "patch_embedding"))
    stages = []
    for index, keep in enumerate([*counts[1:], None]):
        part = subset(weights, f"stages.{index}")
        stages.append(forward_stage(config, part, index, positions, features, grid_size, keep))
        positions, features = stages[-1].merged_positions, stages[-1].merged_features
    return stages


def forward_head(weights, features):
    """Classify: layer norm, mean over the tokens, linear; features (n, C) -> logits (num_classes,), float64.

    Sec. 3, Table 1.
    """
    weights = as_weights(weights)
    check_arrays(features=(features, "real", "n+ C"))
    return linear(layer_norm(features, subset(weights, "norm")).mean(axis=0), subset(weights, "head"))


def forward(config, weights, image):
    """Classify one image: see ``forward_features`` for the arguments (sec. 3, Table 1).

    Returns
    -------
    logits : (num_classes,) float64 array
    stages : list of StageTokens
    """
    stages = forward_features(config, weights, image)
    return forward_head(weights, stages[-1].features), stages


def token_sets(weights, stages):
    """Return each stage's tokens after a layer norm of their own (``norms.<i>``), as a segmentation head reads them.

    Sec. 4.1.

    stages as ``forward_features`` returns them -> list of (positions (n, 2), features (n, C)): res2, res3, res4, res5.
    """
    weights = as_weights(weights)
    norms = [subset(weights, f"norms.{i}") for i in range(len(stages))]
    return [(s.positions, layer_norm(s.features, norm)) for s, norm in zip(stages, norms, strict=True)]
