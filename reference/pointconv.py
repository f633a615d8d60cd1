"""PointConv, in place of a 3 x 3 convolution, over the nearest nine tokens (paper sec. 4.1, ref. [39])."""

import numpy as np

from .layers import layer_norm, linear, subset
from .merging import slot_weights
from .neighborhoods import nearest_tokens
from .position import relative_position

NEAREST = 9


def pointconv(positions, features, weights):
    """Convolve tokens with weights that depend on relative position (sec. 4.1, ref. 39).

    Parameters
    ----------
    positions : (n, 2) int64 array
    features : (n, C) array
    weights : dict
        ``weight_net``, ``norm``, ``linear``, as in ``merging``.

    Returns
    -------
    (n, C') array
        Over the nine nearest tokens, the token itself among them: vec( sum_j W_j f_j^T ), layer norm, linear. Here the
        relative position is that of the token seen from its neighbour, p_i - p_j, as the released weights expect.
    """
    nearest = nearest_tokens(positions, positions, NEAREST)  # (n, 9)
    relative = relative_position(positions[:, None] - positions[nearest])
    slots = slot_weights(relative, np.ones(nearest.shape, dtype=bool), subset(weights, "weight_net"))
    mixed = np.einsum("nkw,nkc->nwc", slots, features[nearest]).reshape(len(positions), -1)  # (n, 4 C)
    return linear(layer_norm(mixed, subset(weights, "norm")), subset(weights, "linear"))
