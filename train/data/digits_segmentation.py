"""Scattered Digits as a segmentation data set: small digits (countable) on photographs (by kind, not countable)."""

import numpy as np

from .digit_parts import KINDS, kinds_of
from .digits import CLASSES, DigitsConfig, ScatteredDigits, Scene
from .sample import ClassInfo, Sample, Vocabulary

LOOK = DigitsConfig(
    height=128, width=128, digits=(4, 12), digit_size=(12, 36), background=0.6, contrast=(0.4, 0.6), photographs=2
)
COLOURS = (
    *((230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48)),
    *((145, 30, 180), (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212)),
    *((170, 60, 40), (110, 160, 0), (170, 255, 195), (120, 110, 200), (255, 215, 180), (190, 0, 110)),
)


def vocabulary(task: str, backgrounds: str = "scenes") -> Vocabulary:
    """Return the ten digits (labels 0 to 9) and, unless the task is instance, the six kinds of photographs (10 on)."""
    names = [*CLASSES, *kinds_of(backgrounds)]
    classes = [ClassInfo(name, i, i < len(CLASSES), COLOURS[i]) for i, name in enumerate(names)]
    return Vocabulary(tuple(classes[: len(CLASSES)] if task == "instance" else classes), "digits")


class DigitsSource:
    """Rendered pictures; what a pixel shows is known exactly, so none is ignored.

    Parameters
    ----------
    split : {"train", "val"}
    length : int
        Pictures in an epoch.
    task : {"semantic", "instance", "panoptic"}
    look : DigitsConfig
    seed : int
    epochs : int
        Epochs with pictures of their own; validation has 1.
    """

    def __init__(
        self, split: str, length: int, task: str = "panoptic", look: DigitsConfig = LOOK, seed: int = 0, epochs: int = 1
    ):
        self.split, self.length, self.task, self.vocabulary = split, length, task, vocabulary(task, look.backgrounds)
        self.pictures = ScatteredDigits(look, split, length * epochs, seed)

    def __len__(self):
        return self.length

    def name(self, index: int) -> str:
        """Return a name for a picture that is nowhere on disk."""
        return f"digits_{self.split}_{index:06}"

    def load(self, index: int, epoch: int = 0) -> Sample:
        """Render a picture with its masks."""
        scene = self.pictures.scene(epoch * self.length + index)
        parts = find_parts(scene, self.task, self.pictures.config.backgrounds)
        shape = scene.image.shape[:2]
        masks = np.array([mask for _, mask in parts], dtype=bool).reshape(-1, *shape)
        labels = np.array([label for label, _ in parts], dtype=np.int64)
        crowd, ignore = np.zeros(len(parts), dtype=bool), np.zeros(shape, dtype=bool)
        return Sample(scene.image, masks, labels, crowd, ignore, self.name(index))

    def order(self, generator: np.random.Generator) -> np.ndarray:
        """Draw one epoch's order of the pictures, (n,) int64."""
        return generator.permutation(len(self))


def find_parts(scene: Scene, task: str, backgrounds: str = "scenes") -> list[tuple[int, np.ndarray]]:
    """List a scene's (label, mask (H, W) bool): each digit, or if semantic each class of digits; then the kinds."""
    digits = [(digit.label, digit.mask) for digit in scene.digits]
    if task == "instance":
        return digits
    if task == "semantic":
        present = sorted({label for label, _ in digits})
        digits = [(i, np.any([mask for label, mask in digits if label == i], axis=0)) for i in present]
    bare = ~np.any([mask for _, mask in digits], axis=0) if digits else np.ones(scene.ground.shape, dtype=bool)
    present = enumerate(kinds_of(backgrounds), start=len(CLASSES))
    kinds = [(label, (scene.ground == KINDS.index(kind)) & bare) for label, kind in present]
    return digits + [(label, mask) for label, mask in kinds if mask.any()]
