"""The operators that models call. Each has a folder with all of its forms; ``dispatch`` chooses among them.

A folder holds ``plain`` (eager PyTorch with autograd: the definition of this side), kernels beside it (``cpu`` in C++,
``triton`` or ``cuda`` for GPUs), and in its ``__init__`` the operator that torch.library, and so torch.compile, sees.
"""

from . import one_copy  # noqa: F401, first
from .attention import neighborhood_attention
from .linear import apply_linear, inner_products
from .merging import merge, parameter_matrix
from .multihead import apply_multihead
from .nearest import local_stride, nearest_clusters, nearest_tokens
from .ordering import choose, cluster_tokens
from .sampling import sample, sample_levels

__all__ = [
    "apply_linear",
    "apply_multihead",
    "choose",
    "cluster_tokens",
    "inner_products",
    "local_stride",
    "merge",
    "nearest_clusters",
    "nearest_tokens",
    "neighborhood_attention",
    "parameter_matrix",
    "sample",
    "sample_levels",
]
