"""The real parts of Scattered Digits: photographs and handwritten digits, read from installed packages, cut by split.

Training and validation share neither a digit (the last fifth of the scans is for validation) nor a pixel of a
photograph (the left two thirds of each are for training, the right third for validation). Scenes show different things
on the left and on the right, so that a part does not tell what the whole is of; textures are alike all over, so that
their kinds can be learnt from one part and found in the other.
"""

from dataclasses import dataclass

import numpy as np

SPLITS = ("train", "val")
KINDS = ("building", "plant", "mineral", "people", "animal", "object", "stars", "tissue", "retina")
PHOTOGRAPHS = {  # name in scikit-image (or, with .jpg, in scikit-learn) -> kind
    "brick": "building",
    "china.jpg": "building",
    "grass": "plant",
    "flower.jpg": "plant",
    "gravel": "mineral",
    "moon": "mineral",
    "astronaut": "people",
    "camera": "people",
    "cat": "animal",
    "coffee": "object",
    "coins": "object",
    "rocket": "object",
    "hubble_deep_field": "stars",
    "immunohistochemistry": "tissue",
    "retina": "retina",
}
BACKGROUNDS = {  # which photographs a set of pictures is painted on
    "scenes": tuple(PHOTOGRAPHS)[:12],
    "textures": ("brick", "grass", "gravel", "hubble_deep_field", "immunohistochemistry", "retina"),
}
_EYE = slice(220, 1190)  # rows and columns of the retina's photograph that show no black surroundings


def kinds_of(backgrounds: str) -> tuple[str, ...]:
    """List the kinds of a set of photographs ("scenes" or "textures"), in the order of KINDS."""
    present = {PHOTOGRAPHS[name] for name in BACKGROUNDS[backgrounds]}
    return tuple(kind for kind in KINDS if kind in present)


@dataclass(frozen=True)
class Material:
    """The real parts of one split: photograph parts (h, w, 3) uint8 by name, glyphs (n, 10, 10) uint8, labels (n,)."""

    photographs: dict[str, np.ndarray]
    glyphs: np.ndarray
    labels: np.ndarray


def load_material(split: str, backgrounds: str = "scenes") -> Material:
    """Read one split's photographs and digits from scikit-image and scikit-learn.

    Parameters
    ----------
    split : {"train", "val"}
    backgrounds : {"scenes", "textures"}

    Returns
    -------
    Material
        Glyphs are the 8 x 8 scans, ink bright (0 to 240), with one empty pixel around.

    Raises
    ------
    ValueError
        Unknown split.
    FileNotFoundError
        An installed package lacks a photograph.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    from sklearn.datasets import load_digits

    scans = load_digits()
    cut = len(scans.target) * 4 // 5
    mine = slice(cut) if split == "train" else slice(cut, None)
    glyphs = np.pad((scans.images[mine] * 15).astype(np.uint8), ((0, 0), (1, 1), (1, 1)))
    photographs = {name: _part(read_photograph(name), split) for name in BACKGROUNDS[backgrounds]}
    return Material(photographs, glyphs, scans.target[mine])


def read_photograph(name: str) -> np.ndarray:
    """Read one photograph from its package, whole, or of the retina the square inside its disc.

    Parameters
    ----------
    name : str
        A key of PHOTOGRAPHS.

    Returns
    -------
    ndarray of uint8, shape (h, w, 3)
        RGB; grey photographs get three equal channels.

    Raises
    ------
    FileNotFoundError
        The package lacks the photograph.
    """
    import skimage.data
    from sklearn.datasets import load_sample_image

    package = "scikit-learn" if name.endswith(".jpg") else "scikit-image"
    try:
        photograph = load_sample_image(name) if name.endswith(".jpg") else getattr(skimage.data, name)()
    except (AttributeError, ImportError, OSError) as error:
        raise FileNotFoundError(f"photograph {name} is missing from {package}: reinstall {package}") from error
    if name == "retina":
        photograph = photograph[_EYE, _EYE]
    return photograph if photograph.ndim == 3 else np.repeat(photograph[..., None], 3, axis=2)


def _part(photograph: np.ndarray, split: str) -> np.ndarray:
    """Cut the split's part out: the left two thirds for training, the rest for validation."""
    cut = photograph.shape[1] * 2 // 3
    return photograph[:, :cut] if split == "train" else photograph[:, cut:]
