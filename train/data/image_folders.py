"""Class folders: images of a class each."""

from pathlib import Path

import numpy as np

from ..common.errors import UserError
from .images import describe_unread, list_pictures, open_rgb

LAYOUT = "expected train/ and val/ in it, each with a folder of images per class, or with .tar shards"


class Folders:
    """Class folders, as torchvision's ImageFolder has them; pictures lie in them at any depth, also behind links.

    Parameters
    ----------
    root : Path
        Folder with one folder of images per class; classes are numbered by name.
    """

    def __init__(self, root: Path):
        if not root.is_dir():
            raise UserError(f"no folder {root}: {LAYOUT}")
        self.classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        if not self.classes:
            raise UserError(f"{root} has no class folders: {LAYOUT}")
        self.num_classes, self.samples = len(self.classes), []
        for label, name in enumerate(self.classes):
            found = list_pictures(root / name)
            if not found:
                unread = describe_unread(root / name)
                raise UserError(f"{root / name} has no images: fill or remove this class{f'; {unread}' * bool(unread)}")
            self.samples += [(str(path), label) for path in found]

    def __len__(self):
        return len(self.samples)

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return self.samples[index][0]

    def load(self, index: int, epoch: int = 0):
        """Read an image, the same in every epoch: (RGB picture, class number)."""
        path, label = self.samples[index]
        return open_rgb(path), label

    def order(self, generator: np.random.Generator) -> np.ndarray:
        """Draw one epoch's order of the images, (n,) int64."""
        return generator.permutation(len(self))
