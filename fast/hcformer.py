"""Point-based HCFormer: queries read the last stage's tokens, and masks climb back through soft clusters.

Source: Suzuki, HCFormer, arXiv 2205.09949, carried over to points. The query decoder is Mask2Former's, on one level.
"""

from torch import nn

from .checks import check_arrays, shown
from .mask2former import Projection, QueryDecoder
from .ops import apply_linear
from .segmenter import Segmenter, output
from .soft_clusters import SoftAssignment, decode_clusters


class HCFormer(Segmenter):
    """A backbone (``features_only``) with the point-based HCFormer head: images (B, 3, H, W) -> SegmenterOutput."""

    def __init__(self, backbone, config):
        super().__init__()
        self.config = config
        self.backbone = backbone
        dims = backbone.config.dims
        self.assignments = nn.ModuleList(SoftAssignment(a, b) for a, b in zip(dims[:-1], dims[1:], strict=True))
        self.projection = Projection(dims[-1], config.hidden_dim)
        self.mask_features = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.decoder = QueryDecoder(config, levels=1)

    def segment(self, images, auxiliary=True):
        """Images (B, 3, H, W) of one size -> SegmenterOutput, with or without auxiliary logits."""
        stages, token_sets = self.backbone.run_token_sets(images)
        grid_size, last = token_sets[0].grid_size, token_sets[-1]
        assignments = [
            assign(t.positions, t.features, s.merged_positions, s.merged_features, grid_size)
            for assign, t, s in zip(self.assignments, token_sets[:-1], stages[:-1], strict=True)
        ]
        memory = self.projection(last.features)
        mask_features = apply_linear(self.mask_features, memory)
        predictions = self.decoder(mask_features, [memory], [last.positions], auxiliary=auxiliary)
        return output([(classes, climb(masks, assignments).unflatten(2, grid_size)) for classes, masks in predictions])


def climb(masks, assignments):
    """Lift mask logits (B, q, n_last) through the assignments of all merges, the last merge first: -> (B, q, h w)."""
    check_arrays(masks=(masks, "real", "B q n"))
    pairs = assignments if isinstance(assignments, tuple | list) else [None]
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise TypeError(f"assignments must be a list of pairs of tensors, not {shown(type(assignments).__name__)}")
    values = masks.transpose(1, 2)
    for candidates, assignment in reversed(assignments):
        values = decode_clusters(values, candidates, assignment)
    return values.transpose(1, 2)
