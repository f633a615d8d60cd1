"""The interface that timm gives its models, for the backbone: names, arguments and results as there.

Source: Wightman, PyTorch Image Models (timm), its documentation "Feature Extraction" and "Model Creation"; nothing here
needs timm. ``timm_models`` enters the variants in timm's own list.
"""

from torch import nn

from .checks import check_arrays, check_choice, check_whole, is_whole, shown
from .patch_embedding import MEAN, SMALLEST_SIDE, STD
from .selection import token_counts

POOLS = ("avg", "")  # of the classifier: the mean over the tokens, or none
FORMATS = ("NCHW", "NLC")
MOST_CLASSES = 2**20


class FeatureInfo(list):
    """A dict a stage (num_chs, reduction in pixels, module, index), and timm's ways to read it.

    Parameters
    ----------
    info : iterable of dict
    out_indices : sequence of int
        The stages that a feature extractor returns.
    """

    def __init__(self, info, out_indices):
        super().__init__({**each, "index": i} for i, each in enumerate(info))
        self.out_indices = tuple(out_indices)

    def get(self, key, idx=None):
        """Return a value of the stages returned, or of the stage or stages ``idx``."""
        if isinstance(idx, int):
            return self[idx][key]
        return [self[i][key] for i in (self.out_indices if idx is None else idx)]

    def channels(self, idx=None):
        """Return the number of channels, as ``get``."""
        return self.get("num_chs", idx)

    def reduction(self, idx=None):
        """Return the nominal stride in pixels, as ``get``."""
        return self.get("reduction", idx)

    def module_name(self, idx=None):
        """Return the name of the module, as ``get``."""
        return self.get("module", idx)


def take_indices(count, indices=None):
    """Return which of ``count`` stages are meant, and the last of them.

    Parameters
    ----------
    count : int
    indices : int or sequence of int, optional
        A number: the last so many; a sequence: those, negative ones from the end; by default all.

    Raises
    ------
    ValueError
        None, or one that there is not.
    """
    taken = range(-indices, 0) if is_whole(indices) else range(count) if indices is None else indices
    several = isinstance(taken, tuple | list | set | frozenset) and all(map(is_whole, taken))
    if not (several or isinstance(taken, range)) or not taken or any(not -count <= i < count for i in taken):
        raise ValueError(f"there are {count} stages, from 0 to {count - 1} or -{count} to -1, not {shown(indices)}")
    taken = [i % count for i in taken]
    return taken, max(taken)


def checked_pool(global_pool):
    """Return ``global_pool`` if it is known; ValueError if not."""
    if not isinstance(global_pool, str) or global_pool not in POOLS:
        raise ValueError(f'global_pool must be "avg" (mean over the tokens) or "" (none), not {shown(global_pool)}')
    return global_pool


def pretrained_cfg(config, name="", size=224, **more):
    """Return what timm calls a model's pretrained_cfg or default_cfg: its input, and what its ends are called."""
    smallest = _smallest_side(config, size)
    return {
        "architecture": name,
        "num_classes": config.num_classes,
        "input_size": (3, size, size),
        "min_input_size": (3, smallest, smallest),
        "fixed_input_size": False,
        "pool_size": None,
        "interpolation": "bicubic",
        "crop_pct": 0.875 if size == 224 else 1.0,
        "crop_mode": "center",
        "mean": MEAN,
        "std": STD,
        "first_conv": "patch_embedding.conv1",
        "classifier": "head",
        "paper_ids": "arXiv:2304.12406",
        **more,
    }


def _smallest_side(config, size):
    """Side of the smallest square, a multiple of 32, of which ``config.rate`` keeps enough tokens; at most ``size``."""
    for side in range(SMALLEST_SIDE, size, SMALLEST_SIDE):
        try:
            token_counts((side // 4, side // 4), config.rate, config.reserve, len(config.depths))
        except ValueError:
            continue
        return side
    return size


class ModelInterface(nn.Module):
    """What timm and its tools ask of a model, besides ``forward`` and ``forward_features``."""

    @property
    def feature_info(self):
        """What each stage returns, a ``FeatureInfo``."""
        dims = self.config.dims[: len(self.stages)]
        info = [{"num_chs": c, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, c in enumerate(dims)]
        return FeatureInfo(info, self.out_indices)

    def no_weight_decay(self):
        """Return the names of the parameters that weight decay should spare beyond those of one dimension: none."""
        return set()

    def group_matcher(self, coarse=False):
        """Return timm's patterns of parameters' names by depth: the stem, then each block, or each stage if ``coarse``.

        What chooses and merges tokens is counted with the block before, as norms are.
        """
        after = (99999,)  # timm's mark: counted with the layer before
        fine = [
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.(?:importance|merging)", after),
            (r"^norms\.(\d+)", after),
            (r"^norm\.", after),
        ]
        return {"stem": r"^patch_embedding", "blocks": r"^(?:stages|norms)\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable=True):
        """Recompute each block in the backward pass instead of keeping what it made: less memory, more time."""
        self.grad_checkpointing = enable

    def get_classifier(self):
        """Return the classifier, an ``nn.Linear`` (or ``nn.Identity`` for 0 classes)."""
        return self.head

    def reset_classifier(self, num_classes, global_pool=None):
        """Replace the classifier by a new one for ``num_classes`` classes (0: none), and the pooling unless None."""
        check_whole("num_classes", num_classes, 0, MOST_CLASSES)
        if global_pool is not None:
            self.global_pool = checked_pool(global_pool)
        like = next(self.parameters())
        self.head = classifier(self.num_features, num_classes).to(device=like.device, dtype=like.dtype)
        self.head.train(self.training)
        init_linear(self.head)
        self.num_classes = num_classes

    def forward_head(self, features, pre_logits=False):
        """Mean over the tokens (B, n, C) -> (B, C), then the classifier -> (B, num_classes) unless ``pre_logits``."""
        check_arrays(features=(features, "real", f"B n {self.num_features}"))
        pooled = features.mean(dim=1) if self.global_pool else features
        return pooled if pre_logits else self.head(pooled)

    def forward_intermediates(
        self, x, indices=None, norm=False, stop_early=False, output_fmt="NCHW", intermediates_only=False
    ):
        """Return the features of some stages beside the last stage's.

        Parameters
        ----------
        x : (B, 3, H, W) tensor
            As ``forward_features`` takes it.
        indices : int or sequence of int, optional
            Stages, as ``take_indices``.
        norm : bool
            Whether the layer norms that there are are applied: of a classifier the last stage's, of a feature extractor
            each.
        stop_early : bool
            Whether to run no stage after the last one wanted.
        output_fmt : {"NCHW", "NLC"}
            Maps (B, C, h, w) of 1/4, 1/8, 1/16, 1/32 of the image, rounded up, each cell with the features of the
            nearest token (``TokenSet.to_grid``); or the tokens themselves (B, n, C).
        intermediates_only : bool
            Whether to leave out the first of the results.

        Returns
        -------
        features : (B, n, C) tensor
            Of the last stage that ran, after the final layer norm if that is the last there is.
        intermediates : list of tensors
        """
        check_choice("output_fmt", output_fmt, FORMATS)
        taken, last = take_indices(len(self.stages), indices)
        stages, grid_size = self.run_stages(x, last + 1 if stop_early else None)
        found = []
        for i, stage in enumerate(stages):
            if i in taken:
                tokens = self.token_set(stage, i, grid_size, norm)
                size = [-(-side // (4 * 2**i)) for side in x.shape[2:]]
                found.append(tokens.to_grid(*size) if output_fmt == "NCHW" else tokens.features)
        if intermediates_only:
            return found
        return self.token_set(stages[-1], len(stages) - 1, grid_size).features, found

    def prune_intermediate_layers(self, indices=1, prune_norm=False, prune_head=True):
        """Take away what the features of some stages do not need; return the indices of those stages.

        Parameters
        ----------
        indices : int or sequence of int
            Stages, as ``take_indices``.
        prune_norm, prune_head : bool
            Of a classifier, whether its layer norm and its head go; both do where a stage does.
        """
        taken, last = take_indices(len(self.stages), indices)
        cut = last + 1 < len(self.stages)
        if cut:
            self.stages = self.stages[: last + 1]
            del self.stages[-1].importance, self.stages[-1].merging
            self.num_features = self.head_hidden_size = self.config.dims[last]
        if self.features_only:
            norms = list(self.norms)[: last + 1]
            self.norms = nn.ModuleList(norm if i in taken else nn.Identity() for i, norm in enumerate(norms))
            self.out_indices = taken
            return taken
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
        return taken


def classifier(channels, num_classes):
    """Return a linear layer, or an identity for 0 classes."""
    return nn.Linear(channels, num_classes) if num_classes > 0 else nn.Identity()


def init_linear(module):
    """Fill a linear layer: weights normal, cut off, of standard deviation 0.02, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
