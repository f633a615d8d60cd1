"""Point-based HCFormer: queries read the last stage's tokens, and masks climb back through soft clusters.

Source: Suzuki, HCFormer, arXiv 2205.09949, carried over to points. The query decoder is Mask2Former's, on one level.
"""

from .checks import check_arrays, shown
from .layers import as_weights, layer_norm, linear, subset
from .mask2former import _check_inputs, attention_mask, decoder_layer, predict, sine_embedding
from .soft_clusters import decode_clusters, soft_assignment


def forward(stages, token_sets, grid_size, weights, config, largest=None):
    """Segment one image from what the backbone's four stages did (ref. 34).

    Parameters
    ----------
    stages : list of backbone.StageTokens
    token_sets : list of (positions (n, 2), features (n, C))
        The stages' tokens after their layer norms, as ``backbone.token_sets`` returns them.
    grid_size : (h, w)
    weights : dict
        ``assignments.<i>`` (see ``soft_clusters``), ``projection``, ``mask_features``, ``decoder.*``.
    config : mask2former.HeadConfig
    largest : (2,) array, optional
        For ``sine_embedding``.

    Returns
    -------
    predictions : list of (class logits (q, classes + 1), mask logits (q, h, w))
    """
    _check_inputs(token_sets, grid_size, config)
    weights = as_weights(weights)
    assignments = [
        soft_assignment(positions, features, s.merged_positions, s.merged_features, subset(weights, f"assignments.{i}"))
        for i, (s, (positions, features)) in enumerate(zip(stages[:-1], token_sets[:-1], strict=True))
    ]
    (positions, features), projection = token_sets[-1], subset(weights, "projection")
    memory = layer_norm(linear(features, subset(projection, "0")), subset(projection, "1"))
    mask_features = linear(memory, subset(weights, "mask_features"))
    part = subset(weights, "decoder")
    code = sine_embedding(positions, config.hidden_dim, largest)
    memory = memory + part["level_embedding.weight"][0]
    out = part["query_features.weight"]
    predictions = [predict(out, mask_features, part)]
    for i in range(config.decoder_layers):
        layer = {**subset(part, f"layers.{i}"), "query_positions": part["query_positions.weight"]}
        out = decoder_layer(out, memory, code, attention_mask(predictions[-1][1]), layer, config.heads)
        predictions.append(predict(out, mask_features, part))
    return [(classes, climb(masks, assignments).reshape(-1, *grid_size)) for classes, masks in predictions]


def climb(masks, assignments):
    """Lift mask logits (q, n_last) through the assignments of all merges, the last merge first: -> (q, h w).

    Ref. 34.
    """
    check_arrays(masks=(masks, "real", "q n"))
    pairs = assignments if isinstance(assignments, tuple | list) else [None]
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise TypeError(f"assignments must be a list of pairs of arrays, not {shown(type(assignments).__name__)}")
    values = masks.T
    for candidates, assignment in reversed(assignments):
        values = decode_clusters(values, candidates, assignment)
    return values.T
