"""Neighbourhoods from clusters: each token sees all tokens of its nearest R clusters (paper sec. 3.1.2)."""

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from .checks import check_arrays, check_indices, check_span, check_whole
from .clustering import balanced_clusters, check_cluster_size, cluster_sums
from .position import relative_position


def nearest_count(neighborhood, cluster_size, k):
    """Return R, the clusters that make a neighbourhood of about ``neighborhood`` tokens: at least 1, at most k.

    Sec. 3.1.2.
    """
    check_whole("neighborhood", neighborhood, 1)
    check_cluster_size(cluster_size)
    check_whole("k", k, 1)
    return max(1, min(round(neighborhood / cluster_size), k))


def scaled_distances(positions, sums, counts):
    """Squared distances from tokens to cluster centres, times L^2, with L the least common multiple of the counts.

    Sec. 3.1.2.

    ``|p - S/c|^2 L^2 = |c p - S|^2 (L/c)^2`` is an integer, so distances compare exactly:
    (n, 2), (k, 2), (k,) -> (n, k).
    """
    check_arrays(positions=(positions, "whole", "n 2"), sums=(sums, "whole", "k 2"), counts=(counts, "whole", "k"))
    check_indices("counts", counts, 2**31, 1)
    scale = np.lcm.reduce(counts) // counts  # L / c
    gap = (positions[:, None] * counts[:, None] - sums) * scale[:, None]  # (n, k, 2)
    return (gap**2).sum(axis=-1)


def nearest_clusters(positions, sums, counts, nearest):
    """Find the nearest cluster centres of every token by comparing all of them: the definition (sec. 3.1.2).

    Parameters
    ----------
    positions : (n, 2) int64 array
    sums, counts : (k, 2) and (k,) int64 arrays
        S and c of each cluster; its centre is S / c.
    nearest : int
        R; all k clusters if it is more than k.

    Returns
    -------
    (n, R) int64 array
        Cluster numbers, nearest first; of two at the same distance the lower number comes first.
    """
    check_whole("nearest", nearest, 1)
    distances = scaled_distances(positions, sums, counts)
    return np.argsort(distances, axis=1, kind="stable")[:, :nearest]


def nearest_clusters_kdtree(positions, sums, counts, nearest):
    """Find the same as ``nearest_clusters`` through SciPy's k-d tree: the check on it (sec. 3.1.2).

    The tree works with rounded centres and breaks ties by chance, so it only names candidates: all centres up to a hair
    beyond the R-th. Exact integer distances then order those.
    """
    check_arrays(positions=(positions, "whole", "n 2"), sums=(sums, "whole", "k 2"), counts=(counts, "whole", "k"))
    check_whole("nearest", nearest, 1)
    nearest = min(nearest, len(counts))
    tree = cKDTree(sums / counts[:, None])
    radius = tree.query(positions, k=[nearest])[0][:, 0]
    found = np.empty((len(positions), nearest), dtype=np.int64)
    for i, candidates in enumerate(tree.query_ball_point(positions, radius * (1 + 1e-9) + 1e-9)):
        candidates = np.sort(candidates)
        scale = np.lcm.reduce(counts) // counts[candidates]
        gap = (positions[i] * counts[candidates, None] - sums[candidates]) * scale[:, None]
        found[i] = candidates[np.argsort((gap**2).sum(axis=-1), kind="stable")[:nearest]]
    return found


def nearest_tokens(queries, positions, nearest):
    """Find the nearest tokens of each query point by comparing all of them (sec. 4.1).

    Parameters
    ----------
    queries : (q, 2) int64 array
        (x, y), in the same unit as the positions.
    positions : (n, 2) int64 array
    nearest : int
        k; all n tokens if it is more than n.

    Returns
    -------
    (q, k) int64 array
        Token indices, nearest first (L2); of two at the same distance the first in raster order comes first.
    """
    check_arrays(queries=(queries, "real or whole", "q 2"), positions=(positions, "whole", "n 2"))
    check_whole("nearest", nearest, 1)
    check_span(queries, positions)
    raster = np.lexsort(positions.T)  # by y, then x
    distances = ((queries[:, None] - positions[raster]) ** 2).sum(axis=-1)  # (q, n)
    return raster[np.argsort(distances, axis=1, kind="stable")[:, :nearest]]


@dataclass(frozen=True)
class StageGeometry:
    """All that a stage needs to know of where its n tokens are: made once, read by every block and the merge.

    Sec. 3.1.2.
    """

    order: np.ndarray  # (n,) int64: token indices, cluster after cluster
    cluster: np.ndarray  # (n,) int64: the cluster of each token
    neighbors: np.ndarray  # (n, M) int64: token indices of each token's neighbourhood; 0 where a slot is empty
    valid: np.ndarray  # (n, M) bool: False where a slot is empty
    relative: np.ndarray  # (n, M, 5) float64: relative_position of the neighbour seen from the token


def stage_geometry(positions, cluster_size, neighborhood, grid_size, curve="scanline"):
    """Cluster the tokens and list the neighbourhood of each (sec. 3.1.2).

    Parameters
    ----------
    positions : (n, 2) int64 array
    cluster_size : int
        m.
    neighborhood : int
        Wanted size of a neighbourhood, tokens. If it is n or more, every token sees all n.
    grid_size : (h, w)
    curve : str

    Returns
    -------
    StageGeometry
        With M = R m slots, or M = n where all tokens are seen.
    """
    check_arrays(positions=(positions, "whole", "n 2"))
    check_whole("neighborhood", neighborhood, 1)
    n = len(positions)
    order, cluster = balanced_clusters(positions, cluster_size, grid_size, curve)
    if neighborhood >= n:
        neighbors, valid = np.tile(np.arange(n), (n, 1)), np.ones((n, n), dtype=bool)
    else:
        sums, counts = cluster_sums(positions, order, cluster_size)
        k = len(counts)
        nearest = nearest_clusters(positions, sums, counts, nearest_count(neighborhood, cluster_size, k))
        members = np.pad(order, (0, k * cluster_size - n), constant_values=-1).reshape(k, cluster_size)
        neighbors = members[nearest].reshape(n, -1)  # (n, R, m) -> (n, M)
        valid = neighbors >= 0
        neighbors = np.where(valid, neighbors, 0)
    relative = relative_position(positions[neighbors] - positions[:, None])
    return StageGeometry(order, cluster, neighbors, valid, relative)
