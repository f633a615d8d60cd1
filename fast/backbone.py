"""The backbone: four stages of clustering, local attention and merging (paper sec. 3, Fig. 2, Table 1)."""

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import AttentionBlock
from .checks import check_choice, check_sides, is_number, is_whole, shown
from .clustering import check_cluster_size
from .curves import CURVES
from .grid_prior import METRICS, grid_prior, local_stride, reserved_tokens
from .interface import ModelInterface, checked_pool, classifier, init_linear, pretrained_cfg
from .merging import Merging
from .neighborhoods import nearest_tokens, stage_geometry
from .ops.indexing import gather_rows
from .patch_embedding import PatchEmbedding, grid_positions, prepare_image
from .selection import Importance, choose, token_counts

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
    drop_path: float = 0.0  # of the last block; rises linearly from 0 at the first
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
    """What one stage did; tokens in raster order. The fields of the merge are None in the last stage."""

    positions: Tensor  # (B, n, 2) int64
    features: Tensor  # (B, n, C): after the last block, before any norm
    order: Tensor  # (B, n) int64: token indices, cluster after cluster
    cluster: Tensor  # (B, n) int64
    scores: Tensor | None = None  # (B, n): s
    kept: Tensor | None = None  # (B, K) int64: indices of the tokens kept
    merged_positions: Tensor | None = None  # (B, K, 2) int64
    merged_features: Tensor | None = None  # (B, K, C')


@dataclass(frozen=True)
class TokenSet:
    """Normalised features of one stage, on tokens: what a segmentation or detection head reads."""

    positions: Tensor  # (B, n, 2) int64, cells of the finest grid
    features: Tensor  # (B, n, C)
    grid_size: tuple  # (h, w) of the finest grid

    def to_grid(self, h, w):
        """Spread the tokens over h x w cells: each takes the features of the token nearest to its centre.

        Returns (B, C, h, w). Distances are exact integers; of two tokens as near, the first in raster order.
        """
        check_sides("h, w", (h, w))
        height, width = self.grid_size
        x, y = grid_positions((h, w), self.positions.device).unbind(-1)
        x, y = ((2 * x + 1) * width - w) * h, ((2 * y + 1) * height - h) * w  # centres, in units of a cell / (2 h w)
        queries = torch.stack([x, y], dim=-1).expand(self.positions.shape[0], -1, -1)
        nearest = nearest_tokens(queries, self.positions * (2 * h * w), 1)[..., 0]
        return gather_rows(self.features, nearest).transpose(1, 2).unflatten(2, (h, w))


for _kind in (StageTokens, TokenSet):  # pytrees, so that models that return them can be exported
    torch.export.register_dataclass(_kind, serialized_type_name=f"autofocusformer.{_kind.__name__}")


class Stage(nn.Module):
    """Attention blocks on one set of tokens and, except in the last stage, the choice and merging of the next."""

    def __init__(self, config, index, drop_paths):
        super().__init__()
        self.config, self.index = config, index
        dim, heads = config.dims[index], config.heads[index]
        self.blocks = nn.ModuleList(
            AttentionBlock(dim, heads, config.mlp_ratio, config.layer_scale, p) for p in drop_paths
        )
        if index + 1 < STAGES:
            self.importance = Importance(dim)
            self.merging = Merging(dim, config.dims[index + 1])

    def forward(self, positions, features, geometry, keep=None, checkpointing=False):
        """Attend, then keep ``keep`` tokens and merge: positions and features (B, n, ...) -> StageTokens."""
        features = self.run_blocks(features, geometry, checkpointing and torch.is_grad_enabled())
        order, cluster = (column.expand(positions.shape[0], -1) for column in (geometry.order, geometry.cluster))
        if keep is None:
            return StageTokens(positions, features, order, cluster)
        scores = self.importance(features)
        kept = self.select_tokens(positions, scores, keep)
        merged = self.merging(features, scores, kept, geometry)
        merged_positions = gather_rows(positions, kept)
        return StageTokens(positions, features, order, cluster, scores, kept, merged_positions, merged)

    def run_blocks(self, features, geometry, checkpointing=False):
        """Run the attention blocks on the tokens put cluster after cluster."""
        x, g = geometry.to_clusters(features), geometry.renumbered()
        for block in self.blocks:
            x = checkpoint(block, x, g, use_reentrant=False) if checkpointing else block(x, g)
        return geometry.from_clusters(x)

    def select_tokens(self, positions, scores, keep):
        """Indices (B, K) of the tokens that stay, in raster order."""
        on_grid = self.index == 0  # every cell of the grid holds a token: the nearest is 1 away
        stride = torch.ones_like(positions[..., 0]) if on_grid else local_stride(positions, self.config.stride_metric)
        reserved = reserved_tokens(positions, self.index + 1) & self.config.reserve
        return choose(scores, grid_prior(positions, stride), reserved, keep, self.config.alpha)


class AutoFocusFormer(ModelInterface):
    """AutoFocusFormer, for classification or, with ``features_only``, as a feature extractor.

    Parameters
    ----------
    config : Config
    features_only : bool
        If true there is no classifier, and ``forward`` returns a list of four ``TokenSet``: the tokens of each stage
        before its merge, each through a layer norm of its own.
    global_pool : {"avg", ""}
        How the classifier pools the tokens: their mean, or not at all.
    """

    def __init__(self, config, features_only=False, global_pool="avg"):
        super().__init__()
        self.config, self.features_only = config, features_only
        self.in_chans, self.out_indices = 3, list(range(STAGES))
        self.num_classes = 0 if features_only else config.num_classes
        self.num_features = self.head_hidden_size = config.dims[-1]
        self.global_pool = checked_pool(global_pool)
        self.pretrained_cfg = self.default_cfg = pretrained_cfg(config)
        self.grad_checkpointing = False
        self.patch_embedding = PatchEmbedding(config.dims[0])
        self.stages = nn.ModuleList(Stage(config, i, p) for i, p in enumerate(_drop_paths(config)))
        self._grid_geometry = (None, None)  # of the last grid size: the first stage's tokens are always the full grid
        if features_only:
            self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in config.dims)
        else:
            self.norm = nn.LayerNorm(self.num_features)
            self.head = classifier(self.num_features, config.num_classes)
        self.apply(init_linear)

    def run_stages(self, images, count=None):
        """Run all stages, or the first ``count``, on images (B, 3, H, W): StageTokens of each, and grid_size (h, w)."""
        images = prepare_image(images)
        grid_size = tuple(
            operator.index(side) // 4 for side in images.shape[2:]
        )  # torch.compile: one graph for each size
        counts = token_counts(grid_size, self.config.rate, self.config.reserve, STAGES)
        features = self.patch_embedding(images.to(self.patch_embedding.conv1.weight.dtype))
        positions = grid_positions(grid_size, images.device).expand(images.shape[0], -1, -1)
        parts, stages = list(self.stages)[:count], []
        for stage, keep in zip(parts, [*counts[1 : len(parts)], None], strict=True):
            geometry = self._geometry(stage.index, positions, grid_size)
            stages.append(stage(positions, features, geometry, keep, self.grad_checkpointing))
            positions, features = stages[-1].merged_positions, stages[-1].merged_features
        return stages, grid_size

    def _geometry(self, index, positions, grid_size):
        """Geometry of a stage; the first stage's is the same for every image, and is kept for the next call."""
        c = self.config
        arguments = (c.cluster_size, c.neighborhood[index], grid_size, c.curve, self._position_dtype())
        if index > 0:
            return stage_geometry(positions, *arguments)
        key = (arguments, positions.device)
        if self._grid_geometry[0] != key or not self._grid_geometry[1].current:
            with torch.inference_mode(False):  # it is kept for training too
                grid = grid_positions(grid_size, positions.device)[None]
                self._grid_geometry = (key, stage_geometry(grid, *arguments))
        return self._grid_geometry[1]

    def _position_dtype(self):
        """Dtype of the relative positions: that of the weights, at least float32."""
        return torch.promote_types(self.patch_embedding.norm.weight.dtype, torch.float32)

    def forward_features(self, images, return_stages=False):
        """Return the last stage's tokens (B, n, C) after the final layer norm, and the four StageTokens if asked.

        Parameters
        ----------
        images : (B, 3, H, W) tensor
            Floating point, normalised with ImageNet's mean and standard deviation; or uint8, normalised here.
        return_stages : bool

        Raises
        ------
        ValueError, TypeError
            As ``patch_embedding.prepare_image`` and ``selection.token_counts`` say.
        """
        stages, _ = self.run_stages(images)
        features = self.norm(stages[-1].features)
        return (features, stages) if return_stages else features

    def forward(self, images):
        """Images (B, 3, H, W) -> logits (B, num_classes), or a list of TokenSets if ``features_only``."""
        if not self.features_only:
            return self.forward_head(self.forward_features(images))
        token_sets = self.run_token_sets(images)[1]
        return [token_sets[i] for i in self.out_indices]

    def run_token_sets(self, images):
        """Feature extractor only: the StageTokens, and the TokenSets made of them by a layer norm each."""
        stages, grid_size = self.run_stages(images)
        return stages, [self.token_set(stage, i, grid_size) for i, stage in enumerate(stages)]

    def token_set(self, stage, index, grid_size, norm=True):
        """Return the TokenSet of a stage, after the layer norm that there is for it unless ``norm`` is false."""
        if not norm:
            return TokenSet(stage.positions, stage.features, grid_size)
        if self.features_only:
            return TokenSet(stage.positions, self.norms[index](stage.features), grid_size)
        last = index + 1 == len(self.stages)
        return TokenSet(stage.positions, self.norm(stage.features) if last else stage.features, grid_size)


def _drop_paths(config):
    """Each stage's list of drop path probabilities, one a block: linear in depth, from 0 to ``config.drop_path``."""
    step = config.drop_path / max(1, sum(config.depths) - 1)
    starts = [sum(config.depths[:i]) for i in range(STAGES)]
    return [[step * (start + j) for j in range(depth)] for start, depth in zip(starts, config.depths, strict=True)]
